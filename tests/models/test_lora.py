"""Adapters in a tree of parameters: what moves, how the rest is kept, and the two made one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from itjax.base import tree
from itjax.base.schema import Lora
from itjax.models import lora as adapters
from itjax.models.layers import Draws, Norm, Options, Projection

L, D, N, H, RANK = 3, 16, 4, 8, 2
PLAIN = Lora(rank=RANK, alpha=6.0)


class Block(nnx.Module):
    def __init__(self, options, key):
        keys = jax.random.split(key, 2)
        self.norm = Norm((D,), ("embed",), eps=1e-6, offset=0.0)
        self.q = Projection(
            (D, N, H), ("embed", "heads", "head_size"), contract=1, gain=1.0, key=keys[0], place="layers/q",
            options=options,
        )  # fmt: skip
        self.o = Projection(
            (N, H, D), ("heads", "head_size", "embed"), contract=2, gain=1.0, key=keys[1], place="layers/o",
            options=options, bias=True,
        )  # fmt: skip

    def __call__(self, x):
        return x + self.o(jnp.tanh(self.q(self.norm(x), Draws())), Draws())


class Net(nnx.Module):
    """Three layers through a scan, as in the decoder."""

    def __init__(self, options):
        self.layers = jax.vmap(lambda key: Block(options, key))(jax.random.split(jax.random.key(0), L))

    def __call__(self, x):
        return jax.lax.scan(lambda x, block: (block(x), None), x, self.layers)[0]


X = jax.random.normal(jax.random.key(9), (5, D))


def parts(lora, base="float32"):
    net = Net(Options(lora, base))
    graph, state = nnx.split(net)
    return graph, adapters.keep(nnx.to_pure_dict(state), lora, base=base)


def trained(lora, base="float32"):
    """(network, parameters): adapters as they are after some steps, DoRA's lengths included."""
    graph, params = parts(lora, base)
    flat = tree.flatten(adapters.begin(params, lora))
    for number, path in enumerate(sorted(flat)):
        if "lora_b" in path or "lora_m" in path:
            flat[path] += 0.3 * jax.random.normal(jax.random.key(number), flat[path].shape)
    return graph, tree.unflatten(flat)


def run(graph, params):
    return nnx.merge(graph, params)(X)


def test_without_adapters_everything_moves():
    _, params = parts(Lora())
    assert all(tree.flatten(adapters.moving(params, Lora())).values())


def test_with_adapters_only_they_move_and_what_is_named_beside():
    lora = dataclasses.replace(PLAIN, also=("*norm*",), targets=("layers/q",))
    _, params = parts(lora)
    moves = tree.flatten(adapters.moving(params, lora))
    assert sorted(path for path, moving in moves.items() if moving) == [
        "layers/norm/scale",
        "layers/q/lora_a",
        "layers/q/lora_b",
    ]


def test_splitting_loses_nothing():
    _, params = parts(PLAIN)
    moved, frozen = adapters.split(params, adapters.moving(params, PLAIN))
    assert {**tree.flatten(moved), **tree.flatten(frozen)}.keys() == tree.flatten(params).keys()
    assert not tree.flatten(moved).keys() & tree.flatten(frozen).keys()


def test_a_layer_has_rank_times_inputs_and_outputs_parameters_more():
    _, params = parts(PLAIN)
    moved, frozen = adapters.split(params, adapters.moving(params, PLAIN))
    assert adapters.num_parameters(moved) == L * 2 * RANK * (D + N * H)
    assert adapters.num_parameters(frozen) == L * (2 * D * N * H + 2 * D)


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_quantised_parameters_are_counted_as_parameters(base):
    _, params = parts(PLAIN, base)
    _, frozen = adapters.split(params, adapters.moving(params, PLAIN))
    assert adapters.num_parameters(frozen) == L * (2 * D * N * H + 2 * D)


@pytest.mark.parametrize(
    "setting, value", [("targets", ("layers/z",)), ("also", ("*nrom*",)), ("targets", ("layers/norm",))]
)
def test_patterns_that_fit_nothing_are_refused(setting, value):
    lora = dataclasses.replace(PLAIN, **{setting: value})
    _, params = parts(lora)
    with pytest.raises(ValueError, match=rf"lora.{setting}: '.*' fits nothing.*layers/"):
        adapters.moving(params, lora)


@pytest.mark.parametrize("base", ["bfloat16", "int8", "nf4"])
def test_a_small_base_is_not_trained(base):
    _, params = parts(Lora(), base)
    with pytest.raises(ValueError, match=r"set lora.rank, or lora.base=float32"):
        adapters.moving(params, Lora())


def test_with_a_small_base_all_that_is_frozen_is_bfloat16_and_what_moves_float32():
    lora = dataclasses.replace(PLAIN, also=("*norm*", "layers/o/kernel"))
    _, params = parts(lora, "nf4")
    assert {path: str(leaf.dtype) for path, leaf in tree.flatten(params).items()} == {
        "layers/norm/scale": "float32",
        "layers/o/bias": "bfloat16",
        "layers/o/kernel": "float32",
        "layers/o/lora_a": "float32",
        "layers/o/lora_b": "float32",
        "layers/q/kernel/codes": "uint8",
        "layers/q/kernel/scales": "bfloat16",
        "layers/q/lora_a": "float32",
        "layers/q/lora_b": "float32",
    }
    assert all(tree.flatten(adapters.moving(params, lora))[path] for path in ("layers/norm/scale", "layers/o/kernel"))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", ["float32", "nf4", "int8"])
def test_merged_equals_unmerged(base, dora):
    lora = dataclasses.replace(PLAIN, dora=dora)
    graph, params = trained(lora, base)
    unmerged = run(graph, params)
    assert np.abs(unmerged - run(*parts(lora, base))).max() > 0.1
    merged = adapters.merge(params, lora, dtype="float32")
    assert tree.flatten(merged).keys() == {
        "layers/norm/scale", "layers/q/kernel", "layers/o/kernel", "layers/o/bias"
    }  # fmt: skip
    np.testing.assert_allclose(run(nnx.split(Net(Options()))[0], merged), unmerged, atol=2e-6, rtol=1e-6)


def test_experts_are_merged_one_by_one():
    """Layers, experts, inputs, outputs; by einsum."""
    keys = jax.random.split(jax.random.key(0), 3)
    kernel, a, b = (
        jax.random.normal(k, s) for k, s in zip(keys, [(2, 3, 8, 5), (2, 3, 8, 4), (2, 3, 4, 5)], strict=True)
    )
    expected = np.asarray(kernel) + 1.5 * np.einsum("leir,lero->leio", a, b)
    params = {"layers": {"mlp": {"up": {"kernel": kernel, "lora_a": a, "lora_b": b}}}}
    merged = adapters.merge(params, Lora(rank=4, alpha=6.0), dtype="float32")
    np.testing.assert_allclose(merged["layers"]["mlp"]["up"]["kernel"], expected, rtol=1e-5, atol=1e-5)


def test_merging_keeps_the_dtype_of_kernels_and_rounds_once():
    _, params = trained(PLAIN, "bfloat16")
    q = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["layers"]["q"])
    whole = q["kernel"] + 3.0 * np.einsum("ldr,lrnh->ldnh", q["lora_a"], q["lora_b"])
    merged = adapters.merge(params, PLAIN, dtype="float32")["layers"]["q"]["kernel"]
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(merged, np.float64), whole, rtol=2**-8)


def test_merging_is_in_place_and_where_the_kernel_lies():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    kernel = jax.device_put(
        jnp.ones((2, D, 4)), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    )
    params = {"layers": {"up": {"kernel": kernel, "lora_a": jnp.ones((2, D, 1)), "lora_b": jnp.ones((2, 1, 4))}}}
    merged = adapters.merge(params, Lora(rank=1, alpha=2.0), dtype="float32")["layers"]["up"]["kernel"]
    assert kernel.is_deleted()
    assert merged.sharding.is_equivalent_to(
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp")), 3
    )
    np.testing.assert_array_equal(merged, 3.0)


@pytest.mark.parametrize("base", ["float32", "int8"])
def test_dora_begins_with_the_lengths_of_the_base(base):
    lora = dataclasses.replace(PLAIN, dora=True)
    graph, params = parts(lora, base)
    plain_graph, plain = parts(PLAIN, base)
    started = adapters.begin(params, lora)
    np.testing.assert_allclose(run(graph, started), run(plain_graph, plain), rtol=1e-5, atol=1e-5)
    if base == "float32":
        norms = np.linalg.norm(np.asarray(params["layers"]["q"]["kernel"]), axis=1)
        np.testing.assert_allclose(started["layers"]["q"]["lora_m"], norms, rtol=1e-6)
