"""What each kind of optimizer keeps lies where its parameter lies, and gives the same parameters on every mesh."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from itjax.base import schema, tree
from itjax.base.records import DataPosition
from itjax.parallel import layout
from itjax.parallel.mesh import mesh_for
from itjax.train import optimizer
from itjax.train.checkpoint import Checkpoints
from itjax.train.state import abstract, evaluated, fresh, state_axes

SHAPES = {
    "embed/kernel": ((256, 128), ("vocab", "embed")),
    "layers/attn_norm/scale": ((2, 128), ("layers", "embed")),
    "layers/attn/q/kernel": ((2, 128, 8, 16), ("layers", "embed", "heads", "head_size")),
    "layers/attn/o/kernel": ((2, 8, 16, 160), ("layers", "heads", "head_size", "embed")),
    "layers/mlp/up/kernel": ((2, 4, 128, 256), ("layers", "experts", "embed", "ffn")),
}
AXES = tree.unflatten({path: P(*names) for path, (_, names) in SHAPES.items()})
EVERY = [(kind, "float32") for kind in schema.OPTIMIZERS] + [("adamw", "bfloat16"), ("adamw", "int8")]
MESH = schema.Parallel(data=1, fsdp=2, expert=2, tensor=2)


def numbers(seed: int):
    rng = np.random.default_rng(seed)
    flat = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, (shape, _) in SHAPES.items()}
    return tree.unflatten(flat)


def settings(kind: str, moments: str) -> schema.Optimizer:
    return schema.Optimizer(kind=kind, moments=moments, weight_decay=0.1, layer_decay=0.9, rates={"embed/*": 0.5})


def axes_of(kind: str, moments: str = "float32") -> dict[str, tuple]:
    """Field and path -> logical axes, of the optimizer's state."""
    tx = optimizer.make(settings(kind, moments))
    axes = state_axes(AXES, numbers(0), tx, {}).opt_state
    flat, _ = jax.tree_util.tree_flatten_with_path(axes, is_leaf=lambda x: isinstance(x, P))
    return {jax.tree_util.keystr(keys): tuple(spec) for keys, spec in flat}


def test_factors_of_adafactor_lie_with_the_side_they_are_of():
    """Rows are the shorter side: of 128 inputs and 8 x 16 outputs the inputs, of 128 = 8 x 16 inputs and 160 outputs these."""
    axes = axes_of("adafactor")
    q, o, up = ("".join(f"['{name}']" for name in path.split("/")) for path in list(SHAPES)[2:])
    found = {
        (name, side): spec
        for name, place in (("q", q), ("o", o), ("up", up))
        for side in ("row", "col")
        for key, spec in axes.items()
        if place in key and key.endswith(f".v_{side}")
    }
    assert found == {
        ("q", "row"): ("layers", "embed"),
        ("q", "col"): ("layers", "heads"),
        ("o", "row"): ("layers", "heads"),
        ("o", "col"): ("layers", "embed"),
        ("up", "row"): ("layers", "experts", "embed"),
        ("up", "col"): ("layers", "experts", "ffn"),
    }


def test_codes_and_their_exponents_lie_as_the_parameter():
    axes = axes_of("adamw", "int8")
    assert {spec for key, spec in axes.items() if "['up']" in key} == {SHAPES["layers/mlp/up/kernel"][1]}
    assert sum("['up']" in key for key in axes) == 4  # codes and exponents of two moments


@pytest.mark.parametrize("kind", ["adamw", "lion", "muon", "schedule_free_adamw"])
def test_what_is_kept_in_full_lies_as_the_parameter(kind):
    whole = [spec for key, spec in axes_of(kind).items() if key.endswith("['kernel']")]
    assert whole
    assert set(whole) <= {names for _, names in SHAPES.values()}


def moved(kind: str, moments: str, parallel: schema.Parallel | None, *, steps: int = 2):
    """Parameters after a few updates, on one device or on a mesh with everything where the rules put it."""
    tx = optax.with_extra_args_support(optimizer.make(settings(kind, moments)))
    state = jax.jit(lambda params: fresh(params, {}, tx))(numbers(0))

    def step(state, grads):
        directions, opt_state = tx.update(grads, state.opt_state, state.params, learning_rate=jnp.float32(0.01))
        params = jax.tree.map(lambda p, d: p - 0.01 * d, state.params, directions)
        return fresh_like(state, params, opt_state)

    where = None
    if parallel is not None:
        mesh = mesh_for(parallel)
        where = layout.shardings(state_axes(AXES, state.params, tx, {}), mesh, state)
        state = jax.device_put(state, where)
    advance = jax.jit(step, out_shardings=where)
    for number in range(steps):
        grads = numbers(1 + number)
        state = advance(state, grads if where is None else jax.device_put(grads, where.params))
    return state


def fresh_like(state, params, opt_state):
    return type(state)(state.step + 1, params, state.frozen, opt_state, state.average)


@pytest.mark.parametrize("kind, moments", EVERY)
def test_eight_devices_move_parameters_as_one_does(kind, moments, capfd):
    one, eight = moved(kind, moments, None), moved(kind, moments, MESH)
    for path, x in tree.flatten(one.params).items():
        np.testing.assert_allclose(tree.flatten(eight.params)[path], x, atol=1e-5, err_msg=path)
    assert "rematerialization" not in capfd.readouterr().err
    split = [not x.sharding.is_fully_replicated for x in jax.tree.leaves(eight.opt_state) if x.size > 1000]
    assert all(split)


@pytest.mark.parametrize(
    "kind, moments", [("adamw", "int8"), ("schedule_free_adamw", "float32"), ("adafactor", "float32")]
)
def test_a_state_is_restored_to_the_bit(kind, moments, tmp_path):
    tx = optimizer.make(settings(kind, moments))
    state, mesh = moved(kind, moments, None, steps=1), mesh_for(schema.Parallel())
    where = layout.shardings(state_axes(AXES, state.params, tx, {}), mesh, state)
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)
    with contextlib.closing(Checkpoints(tmp_path, schema.Checkpoint(asynchronous=False))) as saved:
        saved.save(jax.device_put(state, where), DataPosition(1, "plan"), {}, {})
        restored, _ = saved.restore(1, like)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)


def test_a_state_of_what_moves_and_what_does_not():
    tx = optimizer.make(schema.Optimizer(average=0.9))
    moving, still = {"lora_a": jnp.ones((4, 2))}, {"kernel": jnp.ones((4, 4))}
    state = fresh(moving, still, tx, average=0.9)
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * 8 + 1  # two moments and a count
    like = abstract(moving, still, tx, average=0.9)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), like)
    axes = state_axes({"lora_a": P("embed", "rank")}, moving, tx, {"kernel": P("embed", "heads")}, average=0.9)
    assert jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, P)) == jax.tree.structure(state)
    assert (axes.average, axes.frozen) == ({"lora_a": P("embed", "rank")}, {"kernel": P("embed", "heads")})


def test_evaluations_see_the_average_where_one_is_kept():
    config = schema.Optimizer(average=0.5)
    state = fresh({"a": jnp.zeros(2)}, {}, optimizer.make(config), average=0.5)
    later = type(state)(1, {"a": jnp.ones(2)}, {}, state.opt_state, state.average)
    assert (evaluated(later, config)["a"] == 0).all()
    assert (evaluated(later, schema.Optimizer())["a"] == 1).all()


def test_evaluations_of_schedule_free_see_the_mean_of_where_it_was():
    config = schema.Optimizer(kind="schedule_free_adamw", b1=0.9, clip_norm=1.0)
    tx = optimizer.make(config)
    state, places = fresh({"a": jnp.zeros(3)}, {}, tx), []
    for _ in range(4):
        directions, opt_state = tx.update({"a": jnp.ones(3)}, state.opt_state, state.params, learning_rate=0.1)
        params = jax.tree.map(lambda p, d: p - 0.1 * d, state.params, directions)
        state = type(state)(state.step + 1, params, {}, opt_state)
        places.append(-0.1 * len(places) - 0.1)  # Adam's steps along a gradient that stays
    np.testing.assert_allclose(evaluated(state, config)["a"], np.mean(places), rtol=1e-4)
