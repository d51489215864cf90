"""Folders of safetensors to sharded parameters and back: every number at its place, every process its own bytes."""

import json
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from itjax.base import schema, tree
from itjax.hub import tensors, weights
from itjax.hub.mxfp4 import mxfp4
from itjax.hub.names import Entry
from itjax.hub.tensors import Reader
from itjax.parallel import layout
from itjax.parallel.mesh import mesh_for

oracle = pytest.importorskip("safetensors.numpy")

L, D, N, K, H, F, V, E = (
    2,
    8,
    4,
    2,
    2,
    12,
    16,
    4,
)  # layers, width, heads, key heads, head size, ffn, vocabulary, experts


def leaf(path: str, shape: tuple[int, ...], axes: tuple[str, ...], name: str, **entry) -> tuple:
    return path, shape, axes, Entry(path, name, **entry)


LLAMA = [
    leaf("embed/kernel", (V, D), ("vocab", "embed"), "model.embed_tokens.weight"),
    leaf("layers/attn_norm/scale", (L, D), ("layers", "embed"), "model.layers.{layer}.input_layernorm.weight"),
    leaf("layers/attn/q/kernel", (L, D, N, H), ("layers", "embed", "heads", "head_size"),
         "model.layers.{layer}.self_attn.q_proj.weight", contract=1),
    leaf("layers/attn/q/bias", (L, N, H), ("layers", "heads", "head_size"),
         "model.layers.{layer}.self_attn.q_proj.bias"),
    leaf("layers/attn/o/kernel", (L, N, H, D), ("layers", "heads", "head_size", "embed"),
         "model.layers.{layer}.self_attn.o_proj.weight", contract=2),
    leaf("layers/mlp/down/kernel", (L, F, D), ("layers", "ffn", "embed"),
         "model.layers.{layer}.mlp.down_proj.weight", contract=1),
    leaf("final_norm/scale", (D,), ("embed",), "model.norm.weight"),
    leaf("head/kernel", (V, D), ("vocab", "embed"), "lm_head.weight"),
]  # fmt: skip
FUSED = [  # one tensor for q, k and v, another for both gates, as Phi has them
    leaf("embed/kernel", (V, D), ("vocab", "embed"), "wte"),
    leaf("layers/attn/q/kernel", (L, D, N, H), ("layers", "embed", "heads", "head_size"), "h.{layer}.qkv",
         contract=1, part=slice(0, N * H)),
    leaf("layers/attn/k/kernel", (L, D, K, H), ("layers", "embed", "kv_heads", "head_size"), "h.{layer}.qkv",
         contract=1, part=slice(N * H, N * H + K * H)),
    leaf("layers/attn/v/kernel", (L, D, K, H), ("layers", "embed", "kv_heads", "head_size"), "h.{layer}.qkv",
         contract=1, part=slice(N * H + K * H, None)),
]  # fmt: skip
EXPERTS = [  # a tensor per expert; and one of all experts, gate and up interleaved, not turned, as GPT-OSS has them
    leaf("embed/kernel", (V, D), ("vocab", "embed"), "wte"),
    leaf("layers/mlp/down/kernel", (L, E, F, D), ("layers", "experts", "ffn", "embed"), "h.{layer}.{expert}.down",
         contract=1, experts=True),
    leaf("layers/mlp/gate/kernel", (L, E, D, F), ("layers", "experts", "embed", "ffn"), "h.{layer}.gate_up",
         contract=1, experts=True, flip=False, part=slice(0, None, 2)),
    leaf("layers/mlp/up/kernel", (L, E, D, F), ("layers", "experts", "embed", "ffn"), "h.{layer}.gate_up",
         contract=1, experts=True, flip=False, part=slice(1, None, 2)),
    leaf("layers/mlp/gate/bias", (L, E, F), ("layers", "experts", "ffn"), "h.{layer}.gate_up_bias",
         experts=True, part=slice(0, None, 2)),
    leaf("layers/mlp/up/bias", (L, E, F), ("layers", "experts", "ffn"), "h.{layer}.gate_up_bias",
         experts=True, part=slice(1, None, 2)),
]  # fmt: skip
ALTERNATING = {f"layers/mlp/{name}" for name in ("gate/kernel", "up/kernel", "gate/bias", "up/bias")}
TABLES = {"llama": LLAMA, "fused": FUSED, "experts": EXPERTS}
MESHES = [schema.Parallel(), schema.Parallel(data=1, fsdp=8), schema.Parallel(data=1, fsdp=2, expert=2, tensor=2)]


def entries(table) -> list[Entry]:
    return [entry for *_, entry in table]


def drawn(table) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape, *_ in table}


def like(table, parallel: schema.Parallel, *, dtype=jnp.float32, rows: int = V) -> dict:
    mesh = mesh_for(parallel)
    flat = {}
    for path, shape, axes, _ in table:
        shape = (rows, D) if path in weights.TABLES else shape
        sharding = NamedSharding(mesh, layout.spec(axes, shape, dict(mesh.shape), layout.RULES))
        flat[path] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return tree.unflatten(flat)


def published(table, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a folder, written out by hand and not by strides."""
    out = {}
    for path, _, _, entry in table:
        for layer in range(L) if path.startswith("layers/") else [0]:
            for expert in range(E) if "{expert}" in entry.name else [0]:
                one = values[path][layer] if path.startswith("layers/") else values[path]
                one = one[expert] if "{expert}" in entry.name else one
                out.setdefault(entry.name.format(layer=layer, expert=expert), []).append((entry, one))
    return {name: _published(parts) for name, parts in out.items()}


def _published(parts: list[tuple[Entry, np.ndarray]]) -> np.ndarray:
    turned = []
    for entry, one in parts:
        if entry.contract:
            lead = one.shape[:1] if entry.experts and "{expert}" not in entry.name else ()
            body = one.shape[len(lead) :]
            matrix = one.reshape(*lead, int(np.prod(body[: entry.contract])), -1)
            one = matrix.swapaxes(-1, -2) if entry.flip else matrix
        elif entry.path not in weights.TABLES and not entry.experts:
            one = one.reshape(-1)
        turned.append(one)
    if len(parts) == 1:
        return np.ascontiguousarray(turned[0])
    if parts[0][0].part.step == 2:
        return np.ascontiguousarray(np.stack(turned, -1).reshape(*turned[0].shape[:-1], -1))
    return np.ascontiguousarray(np.concatenate(turned, 0))


@pytest.mark.parametrize("parallel", MESHES, ids=["copies", "fsdp", "all"])
@pytest.mark.parametrize("name", TABLES)
def test_every_number_lands_at_its_place_on_any_mesh(tmp_path, name, parallel):
    table, values = TABLES[name], drawn(TABLES[name])
    oracle.save_file(published(table, values), tmp_path / "model.safetensors")
    wanted = like(table, parallel)
    loaded = tree.flatten(weights.load(tmp_path, entries(table), wanted))
    assert loaded.keys() == values.keys()
    for path, array in loaded.items():
        np.testing.assert_array_equal(array, values[path])
        assert array.sharding.is_equivalent_to(tree.flatten(wanted)[path].sharding, array.ndim)


@pytest.mark.parametrize("name", TABLES)
def test_what_is_saved_is_what_the_library_reads(tmp_path, name):
    table, values = TABLES[name], drawn(TABLES[name])
    shapes = tree.flatten(like(table, MESHES[-1]))
    params = tree.unflatten({path: jax.device_put(values[path], leaf.sharding) for path, leaf in shapes.items()})
    weights.save(tmp_path, params, entries(table), dtype="float32")
    read = oracle.load_file(tmp_path / "model.safetensors")
    wanted = published(table, values)
    assert read.keys() == wanted.keys()
    for tensor, array in wanted.items():
        np.testing.assert_array_equal(read[tensor], array)


@pytest.mark.parametrize(
    "in_files, here",
    [
        (np.float64, jnp.float32),
        (np.float16, jnp.float32),
        (ml_dtypes.bfloat16, jnp.float32),
        (np.float32, jnp.bfloat16),
        (ml_dtypes.bfloat16, jnp.bfloat16),
    ],
)
def test_any_float_becomes_the_dtype_of_the_parameter(tmp_path, in_files, here):
    values = {path: array.astype(in_files) for path, array in drawn(LLAMA).items()}
    oracle.save_file(published(LLAMA, values), tmp_path / "model.safetensors")
    loaded = tree.flatten(weights.load(tmp_path, entries(LLAMA), like(LLAMA, MESHES[-1], dtype=here)))
    for path, array in loaded.items():
        assert array.dtype == here
        np.testing.assert_array_equal(array, values[path].astype(np.float32).astype(here))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_shards_of_any_float_have_a_true_index(tmp_path, dtype):
    values = drawn(EXPERTS)
    weights.save(
        tmp_path, tree.unflatten(jax.tree.map(jnp.asarray, values)), entries(EXPERTS), dtype=dtype, shard_bytes=2000
    )
    index = json.loads((tmp_path / tensors.INDEX).read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    read = {}
    for file in files:
        inside = oracle.load_file(file)
        assert {name for name, where in index["weight_map"].items() if where == file.name} == inside.keys()
        assert sum(array.nbytes for array in inside.values()) <= 2000 or len(inside) == 1
        read |= inside
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in read.values())
    for tensor, array in published(EXPERTS, values).items():
        assert str(read[tensor].dtype) == dtype
        np.testing.assert_array_equal(read[tensor], array.astype(read[tensor].dtype))


def test_a_dtype_that_is_no_float_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="dtype: 'int8' is not written; choose one of float64, float32"):
        weights.save(tmp_path, {}, [], dtype="int8")


# --- what is read -----------------------------------------------------------------------------------------------------


def test_bytes_are_read_once_however_many_devices_keep_a_copy(tmp_path):
    oracle.save_file(published(LLAMA, drawn(LLAMA)), tmp_path / "model.safetensors")
    size = sum(array.nbytes for array in drawn(LLAMA).values())
    for parallel in MESHES:
        reader = Reader()
        weights.load(tmp_path, entries(LLAMA), like(LLAMA, parallel), reader=reader)
        assert reader.num_bytes == size


CLUSTER = """
    import os, sys
    port, number, folder = sys.argv[1:]
    import jax
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(number))
    import numpy as np
    from pathlib import Path
    from itjax.base import schema, tree
    from itjax.hub import weights
    from itjax.hub.tensors import Reader
    from tests.hub import test_weights as here

    meshes = {"llama": schema.Parallel(data=1, fsdp=4), "experts": schema.Parallel(data=1, expert=4)}
    for name, mesh in meshes.items():
        table, values, path = here.TABLES[name], here.drawn(here.TABLES[name]), Path(folder) / name
        reader = Reader()
        loaded = weights.load(path, here.entries(table), here.like(table, mesh), reader=reader)
        for path_, array in tree.flatten(loaded).items():
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(shard.data, values[path_][shard.index])
        weights.save(path / "again", loaded, here.entries(table), dtype="float32", shard_bytes=2000)
        print(name, reader.num_bytes)
"""


def test_two_processes_load_and_save_together(tmp_path):
    """A real cluster: each process reads its half (and all of what is whole everywhere), the first one writes."""
    whole = {"llama": {"layers/attn/q/bias"}, "experts": set()}  # what no axis of the mesh splits
    for name in whole:
        (tmp_path / name / "again").mkdir(parents=True)
        oracle.save_file(published(TABLES[name], drawn(TABLES[name])), tmp_path / name / "model.safetensors")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", textwrap.dedent(CLUSTER), port]
    environment = {"PATH": "", "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "JAX_PLATFORMS": "cpu"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([*command, n, str(tmp_path)], env=environment, **streams) for n in "01"]
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    for name, paths in whole.items():
        values = drawn(TABLES[name])
        num_bytes = {path: array.nbytes if path in paths else array.nbytes // 2 for path, array in values.items()}
        for path in set(num_bytes) & ALTERNATING:  # what lies between is read with each, but for the last number
            num_bytes[path] += num_bytes[path] - 4 * L * E // 2 if name == "experts" else 0
        read = [int(line.split()[1]) for out in outputs for line in out.splitlines() if line.startswith(name)]
        assert read == [sum(num_bytes.values())] * 2
        again = {}
        for file in (tmp_path / name / "again").glob("*.safetensors"):
            again |= oracle.load_file(file)
        for tensor, array in published(TABLES[name], values).items():
            np.testing.assert_array_equal(again[tensor], array)


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_everything_that_does_not_fit_is_one_error(tmp_path):
    found = published(LLAMA, drawn(LLAMA))
    del found["model.norm.weight"]
    found["model.layers.1.self_attn.q_proj.weight"] = np.zeros((3, 3), np.float32)
    found["model.layers.0.mlp.down_proj.weight"] = np.zeros((D, F), np.int8)
    found["model.layers.2.mlp.down_proj.weight"] = np.zeros((D, F), np.float32)
    found["model.layers.0.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
    oracle.save_file(found, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="4 tensors do not fit") as error:
        weights.load(tmp_path, entries(LLAMA), like(LLAMA, MESHES[0]))
    assert str(error.value).splitlines() == [
        f"{tmp_path}: 4 tensors do not fit config.json:",
        f"  {tmp_path.name}: model.layers.1.self_attn.q_proj.weight: have F32 [3, 3], want [8, 8]",
        f"  {tmp_path.name}: model.layers.0.mlp.down_proj.weight: have I8 [8, 12], "
        "want one of F64, F32, F16, BF16; other numbers are not read",
        f"  {tmp_path.name}: model.norm.weight: have none, want [8]",
        f"  {tmp_path.name}: model.layers.2.mlp.down_proj.weight: have F32 [8, 12], and the model has no such parameter",
        "Give the folder as it was published, with the config.json that belongs to the weights",
    ]


def test_nothing_is_read_before_all_of_it_fits(tmp_path):
    found = published(LLAMA, drawn(LLAMA))
    del found["model.norm.weight"]
    oracle.save_file(found, tmp_path / "model.safetensors")
    reader = Reader()
    with pytest.raises(ValueError, match="1 tensor does not fit"):
        weights.load(tmp_path, entries(LLAMA), like(LLAMA, MESHES[0]), reader=reader)
    assert reader.num_bytes == 0


def test_float8_is_refused_with_its_name(tmp_path):
    found = {name: array.astype(ml_dtypes.float8_e4m3fn) for name, array in published(LLAMA, drawn(LLAMA)).items()}
    oracle.save_file(found, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"have F8_E4M3 \[16, 8\], want one of F64, F32, F16, BF16"):
        weights.load(tmp_path, entries(LLAMA), like(LLAMA, MESHES[0]))


# --- heads and vocabularies -------------------------------------------------------------------------------------------

TIED = [row for row in LLAMA if row[0] != "head/kernel"]
REPEATS = [Entry("embed/kernel", "lm_head.weight")]


def test_a_tied_folder_may_repeat_its_embedding_as_a_head_but_not_have_another(tmp_path):
    found = published(TIED, drawn(TIED))
    oracle.save_file(found | {"lm_head.weight": found["model.embed_tokens.weight"]}, tmp_path / "model.safetensors")
    loaded = weights.load(tmp_path, entries(TIED), like(TIED, MESHES[0]), repeats=REPEATS)
    assert "head" not in loaded
    for other in (found["model.embed_tokens.weight"] + 1, found["model.embed_tokens.weight"][:-1].copy()):
        oracle.save_file(found | {"lm_head.weight": other}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r'lm_head.weight: differs .* write "tie_word_embeddings": false'):
            weights.load(tmp_path, entries(TIED), like(TIED, MESHES[0]), repeats=REPEATS)


@pytest.mark.parametrize("parallel", MESHES, ids=["copies", "fsdp", "all"])
def test_new_ids_begin_as_the_mean_of_the_known_ones(tmp_path, parallel):
    """16 rows in the folder, of which 13 are ids; the run has 18 ids in 24 rows."""
    values = drawn(LLAMA)
    oracle.save_file(published(LLAMA, values), tmp_path / "model.safetensors")
    loaded = weights.load(tmp_path, entries(LLAMA), like(LLAMA, parallel, rows=24), ids=(13, 18))
    for name in ("embed", "head"):
        table, known = np.asarray(loaded[name]["kernel"]), values[f"{name}/kernel"]
        np.testing.assert_array_equal(table[:13], known[:13])
        mean = known[:13].astype(np.float64).mean(0)
        np.testing.assert_allclose(table[13:18], np.tile(mean, (5, 1)), rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(table[18:], 0)


def test_rows_without_an_id_stay_as_the_folder_has_them(tmp_path):
    values = drawn(LLAMA)
    oracle.save_file(published(LLAMA, values), tmp_path / "model.safetensors")
    loaded = weights.load(tmp_path, entries(LLAMA), like(LLAMA, MESHES[0], rows=20), ids=(13, 13))
    table = np.asarray(loaded["embed"]["kernel"])
    np.testing.assert_array_equal(table[:16], values["embed/kernel"])
    np.testing.assert_array_equal(table[16:], 0)


# --- a base that is kept otherwise ------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", MESHES, ids=["copies", "fsdp", "all"])
def test_a_kernel_can_be_kept_as_something_made_of_each_layer(tmp_path, parallel):
    values = drawn(LLAMA)
    oracle.save_file(published(LLAMA, values), tmp_path / "model.safetensors")
    whole = like(LLAMA, parallel)
    kernel = tree.flatten(whole)["layers/attn/q/kernel"]
    mesh = kernel.sharding.mesh
    below = {
        "layers/attn/q/kernel/codes": jax.ShapeDtypeStruct(kernel.shape, jnp.int8, sharding=kernel.sharding),
        "layers/attn/q/kernel/scales": jax.ShapeDtypeStruct((L, N, H), jnp.float32, sharding=NamedSharding(mesh, P())),
    }
    others = {path: leaf for path, leaf in tree.flatten(whole).items() if path != "layers/attn/q/kernel"}

    def convert(path, kernel_DNH):
        assert path == "layers/attn/q/kernel"
        scales_NH = jnp.abs(kernel_DNH).max(0) / 127
        return {"codes": jnp.round(kernel_DNH / scales_NH[None]).astype(jnp.int8), "scales": scales_NH}

    kept = tree.unflatten({**others, **below})
    loaded = tree.flatten(weights.load(tmp_path, entries(LLAMA), whole, convert=convert, kept=kept))
    assert loaded.keys() == tree.flatten(kept).keys()
    scales = np.abs(values["layers/attn/q/kernel"]).max(1) / np.float32(127)
    np.testing.assert_allclose(loaded["layers/attn/q/kernel/scales"], scales, rtol=1e-6)
    again = np.asarray(loaded["layers/attn/q/kernel/codes"]) * scales[:, None]
    np.testing.assert_allclose(again, values["layers/attn/q/kernel"], atol=float(scales.max()) * 0.51)
    for path, leaf in below.items():
        assert loaded[path].sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
        assert loaded[path].dtype == leaf.dtype


@pytest.mark.parametrize("parallel", MESHES, ids=["copies", "fsdp", "all"])
def test_four_bits_are_unpacked_wherever_devices_cut_them(tmp_path, parallel):
    """Rows of 64 inputs are two groups of 32 with a scale each; eight devices keep 8 inputs each."""
    width, axes = 64, ("layers", "experts", "embed", "ffn")
    packed = {"contract": 1, "experts": True, "packed": True}
    table = [
        leaf("embed/kernel", (V, width), ("vocab", "embed"), "wte"),
        leaf("layers/mlp/gate/kernel", (L, E, width, F), axes, "h.{layer}.gate_up", part=slice(0, None, 2), **packed),
        leaf("layers/mlp/up/kernel", (L, E, width, F), axes, "h.{layer}.gate_up", part=slice(1, None, 2), **packed),
    ]
    rng = np.random.default_rng(0)
    found, wanted = {"wte": rng.normal(size=(V, width)).astype(np.float32)}, np.zeros((L, E, 2 * F, width), np.float32)
    for layer in range(L):
        blocks = rng.integers(0, 256, (E, 2 * F, width // 32, 16), np.uint8)
        scales = rng.integers(120, 130, (E, 2 * F, width // 32), np.uint8)
        found |= {f"h.{layer}.gate_up_blocks": blocks, f"h.{layer}.gate_up_scales": scales}
        wanted[layer] = mxfp4(blocks, scales)
    oracle.save_file(found, tmp_path / "model.safetensors")
    like_ = tree.flatten(like(table, parallel))
    like_["embed/kernel"] = jax.ShapeDtypeStruct((V, width), jnp.float32, sharding=like_["embed/kernel"].sharding)
    loaded = tree.flatten(weights.load(tmp_path, entries(table), tree.unflatten(like_)))
    np.testing.assert_array_equal(loaded["layers/mlp/gate/kernel"], wanted[:, :, 0::2].swapaxes(2, 3))
    np.testing.assert_array_equal(loaded["layers/mlp/up/kernel"], wanted[:, :, 1::2].swapaxes(2, 3))


def test_leaves_without_a_sharding_lie_on_one_device(tmp_path):
    values = drawn(TIED)
    oracle.save_file(published(TIED, values), tmp_path / "model.safetensors")
    plain = tree.unflatten({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape, *_ in TIED})
    loaded = tree.flatten(weights.load(tmp_path, entries(TIED), plain))
    assert all(len(array.devices()) == 1 for array in loaded.values())
    np.testing.assert_array_equal(loaded["layers/attn/o/kernel"], values["layers/attn/o/kernel"])


def test_a_mesh_of_any_axes_will_do(tmp_path):
    values = drawn(TIED)
    oracle.save_file(published(TIED, values), tmp_path / "model.safetensors")
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("stages", "x"))
    wanted = {}
    for path, shape, *_ in TIED:
        place = NamedSharding(mesh, P("stages") if path.startswith("layers/") else P(("stages", "x")))
        wanted[path] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
    loaded = tree.flatten(weights.load(tmp_path, entries(TIED), tree.unflatten(wanted)))
    for path, array in loaded.items():
        np.testing.assert_array_equal(array, values[path])
        assert array.sharding.is_equivalent_to(wanted[path].sharding, array.ndim)
