"""The verify command: everything holds on a small run, and each kind of fault is seen."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itjax import verify
from itjax.base.records import PackedBatch
from itjax.parallel.mesh import AXES
from tests.contract import runs

SLOW_ON_EIGHT = pytest.param(8, "data 1 x fsdp 2 x context 2 x tensor 2", marks=pytest.mark.slow)


@pytest.mark.parametrize("devices, mesh", [(2, "data 1 x fsdp 2 x context 1 x tensor 1"), SLOW_ON_EIGHT])
def test_every_check_holds(tmp_path, devices, mesh):
    out = tmp_path / "checks.json"
    process = runs.start(
        tmp_path / "run", devices=devices, module="itjax.verify", more=[f"--json={out}"], rows=8, length=256
    )
    assert "full rematerialization" not in runs.finish(process)
    result = json.loads(out.read_text())
    names = [check["name"] for check in result["checks"]]
    assert result["ok"]
    for claim in ("unpacked", "2 micro-batches", f"mesh {mesh}", "more padding", "remat full"):
        assert any(claim in name for name in names), claim
    assert all(check["ok"] for check in result["checks"])


def row(*segments: int) -> np.ndarray:
    return np.array([segments], np.int32)


BATCH = PackedBatch(
    tokens_BT=row(11, 12, 21, 0),
    targets_BT=row(12, 13, 22, 0),
    segments_BT=row(1, 1, 2, 0),
    positions_BT=row(0, 1, 0, 0),
    weights_BT=row(0, 1, 1, 0).astype(np.float32),
    source_BT=row(0, 0, 0, 0),
)


def test_unpacked_puts_every_segment_alone():
    alone = verify.unpacked(BATCH, 2)
    assert alone.tokens_BT.tolist() == [[11, 12, 0, 0], [21, 0, 0, 0]]
    assert alone.segments_BT.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert alone.positions_BT.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
    assert alone.weights_BT.sum() == BATCH.weights_BT.sum()


def test_every_check_holds_for_adapters_over_a_small_base(tmp_path):
    out = tmp_path / "checks.json"
    settings = {"lora.rank": 4, "lora.base": "int8", "rows": 8}
    runs.finish(runs.start(tmp_path / "run", devices=1, module="itjax.verify", more=[f"--json={out}"], **settings))
    result = json.loads(out.read_text())
    assert result["ok"]
    assert [check["name"] for check in result["checks"] if "adapters" in check["name"]] == [
        "adapters: the first step is the base",
        "adapters: merged is unmerged",
    ]


def test_a_mesh_is_any_product_of_the_devices():
    dense = verify.meshes(8, ("data", "fsdp", "tensor"), length=64)
    assert len(dense) == 10
    assert all(shape.data * shape.fsdp * shape.tensor == 8 and shape.expert == 1 for shape in dense)
    assert len(verify.meshes(8, AXES, length=64)) == 35


def test_rows_are_cut_only_where_they_divide_into_stripes():
    assert {shape.context for shape in verify.meshes(8, ("data", "context"), length=80)} == {1, 2, 4}


def test_distance_is_relative_to_the_gradient():
    one = verify.Outcome(2.0, {"a": np.array([3.0, 4.0])})
    other = verify.Outcome(2.0, {"a": np.array([3.0, 4.5])})
    assert verify.distance(one, other) == pytest.approx(0.1)
    assert not verify.check("x", float("nan"), 1.0).ok


def test_noise_is_for_numbers_of_ordinary_size():
    ones = jnp.ones(4)
    for leaf in ("codes", "scales"):
        assert verify._noisy(f"layers/attn/q/kernel/{leaf}", ones, jax.random.key(0), 0.02) is ones
    moved = verify._noisy("layers/attn/q/lora_b", 0 * ones, jax.random.key(0), 0.02)
    assert len(set(moved.tolist())) == 4
