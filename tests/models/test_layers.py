"""A linear layer with its adapter: what it computes, what moves, and that shards do not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from itjax.base import tree
from itjax.base.schema import Lora
from itjax.models.layers import Draws, Options, Projection
from itjax.parallel import layout

D, N, H = 16, 4, 8
RANK = 3


def projection(lora=Lora(), base="float32", bias=False, place="layers/attn/q", seed=0):  # noqa: B008
    return Projection(
        (D, N, H), ("embed", "heads", "head_size"), contract=1, gain=1.0, key=jax.random.key(seed), place=place,
        options=Options(lora, base), bias=bias,
    )  # fmt: skip


def with_b(layer, seed=5):
    """Adapters as they are after some steps: B is not zero any more."""
    layer.lora_b[...] = jax.random.normal(jax.random.key(seed), layer.lora_b[...].shape)
    return layer


X = jax.random.normal(jax.random.key(9), (2, 5, D))


def test_an_adapter_adds_scaled_x_a_b():
    layer = with_b(projection(Lora(rank=RANK, alpha=6.0), bias=True))
    layer.bias[...] = jnp.full((N, H), 0.5)
    x, w, a, b = (np.asarray(v, np.float64) for v in (X, layer.kernel[...], layer.lora_a[...], layer.lora_b[...]))
    expected = np.einsum("btd,dnh->btnh", x, w) + 6.0 / RANK * np.einsum("btd,dr,rnh->btnh", x, a, b) + 0.5
    np.testing.assert_allclose(layer(X, Draws()), expected, rtol=1e-4, atol=1e-5)


def test_several_dimensions_of_inputs():
    layer = with_b(
        Projection(
            (N, H, D), ("heads", "head_size", "embed"), contract=2, gain=1.0, key=jax.random.key(0),
            place="layers/attn/o", options=Options(Lora(rank=RANK, alpha=3.0)),
        )
    )  # fmt: skip
    x = jax.random.normal(jax.random.key(9), (2, 5, N, H))
    assert layer.lora_a[...].shape == (N, H, RANK)
    whole = layer.kernel[...] + jnp.tensordot(layer.lora_a[...], layer.lora_b[...], 1)
    np.testing.assert_allclose(layer(x, Draws()), jnp.tensordot(x, whole, 2), rtol=1e-4, atol=1e-5)


def test_rank_stabilised_scale_is_alpha_over_the_root():
    plain, stable = (with_b(projection(Lora(rank=4, alpha=8.0, rank_stabilized=s))) for s in (False, True))
    base = projection()(X, Draws())
    np.testing.assert_allclose(stable(X, Draws()) - base, 2 * (plain(X, Draws()) - base), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("base", ["float32", "bfloat16", "int8", "nf4"])
def test_before_the_first_step_the_output_is_that_of_the_base_to_the_last_bit(base):
    np.testing.assert_array_equal(projection(Lora(rank=RANK), base)(X, Draws()), projection(base=base)(X, Draws()))


def test_a_has_no_gradient_at_first_and_b_has():
    layer = projection(Lora(rank=RANK))
    graph, state = nnx.split(layer)
    gradient = jax.grad(lambda state: jnp.sin(nnx.merge(graph, state)(X, Draws())).sum())(state)
    np.testing.assert_array_equal(gradient["lora_a"][...], 0.0)
    assert np.abs(gradient["lora_b"][...]).max() > 0.1


def test_a_is_uniform_within_one_over_the_root_of_the_inputs():
    a = projection(Lora(rank=512)).lora_a[...]
    assert np.abs(a).max() <= D**-0.5
    assert np.std(a) == pytest.approx(D**-0.5 / 3**0.5, rel=0.05)


@pytest.mark.parametrize("place, adapted", [("layers/attn/q", True), ("layers/mlp/router", False), ("head", False)])
def test_all_linear_layers_but_the_head_and_the_router_by_default(place, adapted):
    assert (projection(Lora(rank=2), place=place).lora_a is not None) == adapted


def test_targets_are_patterns_of_places():
    lora = Lora(rank=2, targets=("layers/attn/[qv]",))
    adapted = [n for n in "qkvo" if projection(lora, place=f"layers/attn/{n}").lora_a is not None]
    assert adapted == ["q", "v"]


def test_dora_scales_each_column_to_its_length():
    layer = with_b(projection(Lora(rank=RANK, alpha=6.0, dora=True)))
    layer.lora_m[...] = jnp.arange(1.0, N * H + 1).reshape(N, H)
    w, a, b = (np.asarray(v, np.float64) for v in (layer.kernel[...], layer.lora_a[...], layer.lora_b[...]))
    whole = w + 2.0 * np.einsum("dr,rnh->dnh", a, b)
    whole *= np.asarray(layer.lora_m[...]) / np.linalg.norm(whole, axis=0)
    np.testing.assert_allclose(layer(X, Draws()), np.einsum("btd,dnh->btnh", X, whole), rtol=1e-4, atol=1e-4)


def test_dropout_is_of_what_a_reads_and_only_where_a_key_is_given():
    layer = with_b(projection(Lora(rank=RANK, dropout=0.5)))
    base, whole = projection()(X, Draws()), layer(X, Draws())
    drawn = jnp.stack([layer(X, Draws(key)) for key in jax.random.split(jax.random.key(1), 400)])
    assert np.abs(drawn[0] - drawn[1]).max() > 0.1
    np.testing.assert_allclose(drawn.mean(0) - base, whole - base, atol=0.25 * np.abs(whole - base).max())


@pytest.mark.parametrize("base", ["bfloat16", "int8", "nf4"])
def test_small_bases_stay_near_the_kernel_and_adapters_stay_float32(base):
    layer = projection(Lora(rank=RANK), base)
    assert layer.lora_a[...].dtype == layer.lora_b[...].dtype == jnp.float32
    exact = projection()(X, Draws())
    tolerance = {"bfloat16": 0.01, "int8": 0.02, "nf4": 0.2}[base]
    assert np.linalg.norm(layer(X, Draws()) - exact) / np.linalg.norm(exact) < tolerance


def test_products_run_in_the_dtype_of_activations():
    layer = with_b(projection(Lora(rank=RANK, dora=True), "nf4"))
    assert layer(X.astype(jnp.bfloat16), Draws()).dtype == jnp.bfloat16


@pytest.mark.parametrize("base", ["float32", "nf4"])
@pytest.mark.parametrize("dora", [False, True])
def test_shards_give_the_same_numbers(base, dora):
    """Eight devices: batch and inputs over fsdp, heads over tensor."""
    layer = with_b(projection(Lora(rank=RANK, alpha=1.0, dora=dora, dropout=0.5), base))
    graph, state = nnx.split(layer)
    mesh = jax.make_mesh((1, 2, 4), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    axes = {
        tree.SEPARATOR.join(path): jax.sharding.PartitionSpec(*variable.get_metadata()["axes"])
        for path, variable in nnx.to_flat_state(state)
    }
    x = jax.random.normal(jax.random.key(3), (8, 5, D))

    def loss(adapters, values, x):
        live = nnx.merge(graph, tree.unflatten({**values, **adapters}))
        return jnp.tanh(live(x, Draws(jax.random.key(4)))).sum()

    values = tree.flatten(nnx.to_pure_dict(state))
    adapters = {path: value for path, value in values.items() if path.startswith("lora_")}
    alone = jax.jit(jax.value_and_grad(loss))(adapters, values, x)
    shardings = layout.shardings(axes, mesh, values)
    spread = jax.device_put(values, shardings)
    assert not spread["lora_b"].sharding.is_fully_replicated
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, layout.batch_sharding(mesh, 8, 1))
        together = jax.jit(jax.value_and_grad(loss))({path: spread[path] for path in adapters}, spread, placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), alone, together)
