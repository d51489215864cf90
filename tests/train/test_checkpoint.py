"""State, position and config in one commit; restored onto the same mesh or another, bit for bit."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itjax.base import schema
from itjax.base.records import DataPosition
from itjax.parallel import layout
from itjax.parallel.mesh import mesh_for
from itjax.train import checkpoint, optimizer
from itjax.train.checkpoint import Checkpoints
from itjax.train.state import TrainState, abstract, fresh, state_axes
from tests.fakes import tiny_model

TX = optimizer.make(schema.Optimizer(weight_decay=0.1))
SETTINGS = schema.Checkpoint(keep=2, asynchronous=False)


def placed(parallel: schema.Parallel) -> tuple[TrainState, TrainState]:
    """A state on a mesh, and its abstract twin with shardings."""
    model, mesh = tiny_model(), mesh_for(parallel)
    shapes = abstract(model.abstract, {}, TX)
    shardings = layout.shardings(state_axes(model.axes, model.abstract, TX, {}), mesh, shapes)
    state = jax.device_put(fresh(model.init(jax.random.key(0)), {}, TX), shardings)
    return state, layout.located(shapes, shardings)


def save(folder, state, step):
    with contextlib.closing(Checkpoints(folder, SETTINGS)) as saved:
        numbered = TrainState(jnp.int32(step), state.params, {}, state.opt_state)
        saved.save(numbered, DataPosition(step, "plan"), {"steps": 9}, {"sources": {"mine": {"kept": 3}}})


@pytest.mark.parametrize("then, now", [("a1", "b2"), ("", "b2"), ("a1", "")])
def test_adapters_of_another_base_are_refused(tmp_path, then, now):
    folder = tmp_path / "7" / checkpoint.CONFIG
    folder.mkdir(parents=True)
    (folder / "metadata").write_text(json.dumps({checkpoint.BASE: then}))
    checkpoint.check_base(tmp_path, 7, then, way_out="leave it")
    with pytest.raises(
        ValueError, match=f"7: was trained on the base {then or 'drawn'}.* and it is {now or 'drawn'}.*leave it"
    ):
        checkpoint.check_base(tmp_path, 7, now, way_out="leave it")


def test_moments_lie_where_their_parameters_lie():
    state, _ = placed(schema.Parallel(data=2, fsdp=2, tensor=2))
    adam = next(part for part in state.opt_state if hasattr(part, "mu"))
    for moments in (adam.mu, adam.nu):
        same = jax.tree.map(lambda p, m: p.sharding == m.sharding, state.params, moments)
        assert all(jax.tree.leaves(same))
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state.params))


@pytest.mark.parametrize("parallel", [schema.Parallel(data=1, fsdp=4, tensor=2), schema.Parallel(data=8)])
def test_a_state_restores_onto_any_mesh(tmp_path, parallel):
    state, _ = placed(schema.Parallel(data=2, fsdp=2, tensor=2))
    save(tmp_path, state, 4)
    _, like = placed(parallel)
    with contextlib.closing(Checkpoints(tmp_path, SETTINGS)) as saved:
        restored, position = saved.restore(4, like)
    assert position == DataPosition(4, "plan")
    assert restored.step == 4
    for before, after, wanted in zip(*map(jax.tree.leaves, (state.params, restored.params, like.params)), strict=True):
        np.testing.assert_array_equal(before, after)
        assert after.sharding == wanted.sharding


def test_the_newest_are_kept_and_the_latest_is_found(tmp_path):
    state, _ = placed(schema.Parallel())
    for step in (1, 2, 5):
        save(tmp_path, state, step)
    with contextlib.closing(Checkpoints(tmp_path, SETTINGS)) as saved:
        assert saved.latest() == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5"]


def test_a_step_older_than_the_latest_is_not_declined_in_silence(tmp_path):
    state, _ = placed(schema.Parallel())
    for step in (5, 4):
        save(tmp_path, state, step)
    assert (tmp_path / "4").is_dir()


def test_a_checkpoint_says_what_it_was_trained_on(tmp_path):
    save(tmp_path, placed(schema.Parallel(data=8))[0], 4)
    assert json.loads((tmp_path / "4" / "data_manifest" / "metadata").read_text()) == {"sources": {"mine": {"kept": 3}}}
