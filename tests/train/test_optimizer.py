"""The rate at the steps where it matters, every kind's update against somebody else's, one rule for every parameter."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from itjax.base import schema, tree
from itjax.train import optimizer
from itjax.train.optimizer import Reading

# --- the learning rate ------------------------------------------------------------------------------------------------


def rates(schedule: str, *, warmup: float, final: float, num_steps: int = 10, **settings) -> list[float]:
    config = schema.Optimizer(learning_rate=1.0, schedule=schedule, warmup=warmup, final=final, **settings)
    rate = optimizer.learning_rate(config, num_steps=num_steps)
    return [round(float(rate(jnp.int32(step))), 6) for step in range(num_steps)]


def test_warm_up_reaches_the_peak_and_the_first_step_moves():
    assert rates("constant", warmup=0.4, final=1.0) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]


def test_linear_goes_straight_to_the_final_share():
    assert rates("linear", warmup=0.0, final=0.5, num_steps=4) == [1.0, 0.875, 0.75, 0.625]


def test_cosine_is_the_closed_form():
    progress = np.arange(8) / 8
    expected = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * progress))
    np.testing.assert_allclose(rates("cosine", warmup=0.2, final=0.1)[2:], expected, atol=1e-6)


def test_wsd_warms_up_stays_and_falls_at_the_end():
    assert rates("wsd", warmup=0.2, final=0.2, decay=0.4) == [0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4]


def test_wsd_that_only_decays_is_linear():
    assert rates("wsd", warmup=0.2, final=0.1, decay=1.0) == rates("linear", warmup=0.2, final=0.1)


def test_inverse_sqrt_halves_when_the_steps_are_four_times_the_warm_up():
    curve = rates("inverse_sqrt", warmup=0.1, final=0.0, num_steps=100)
    assert (curve[0], curve[9], curve[10], curve[40]) == (0.1, 1, 1, 0.5)


def test_adapters_learn_at_a_multiple():
    config = schema.Optimizer(learning_rate=2e-5, schedule="cosine", final=0.1)
    for step in (0, 5, 99):
        one, ten = (optimizer.learning_rate(config, num_steps=100, multiplier=m)(jnp.int32(step)) for m in (1, 10))
        np.testing.assert_allclose(ten, 10 * one, rtol=1e-6)


# --- updates ----------------------------------------------------------------------------------------------------------


def noise(shape, seed=0, size=1.0):
    return jnp.asarray(size * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def follow(tx, params, *, steps=4, rate=0.01):
    """Parameters after a few steps along gradients that do not depend on them, as the step of training moves them."""
    update = jax.jit(optax.with_extra_args_support(tx).update)
    state = tx.init(params)
    for step in range(steps):
        directions, state = update(gradients(params, step), state, params, learning_rate=jnp.float32(rate))
        params = jax.tree.map(lambda p, d: p - rate * d, params, directions)
    return params, state


def follow_optax(tx, params, *, steps=4):
    """The same with an optimizer that has the rate inside."""
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def gradients(params, step):
    flat = tree.flatten(params)
    return tree.unflatten({path: noise(flat[path].shape, seed=100 * step + n) for n, path in enumerate(flat)})


def close(ours, theirs, rtol=2e-5):
    for path, x in tree.flatten(ours).items():
        np.testing.assert_allclose(x, tree.flatten(theirs)[path], rtol=rtol, atol=1e-6, err_msg=path)


def settings(kind="adamw", **others) -> schema.Optimizer:
    return schema.Optimizer(kind=kind, **{"clip_norm": 0.0, "no_decay": (), "weight_decay": 0.1, **others})


@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
def test_adamw_is_optax_adamw(clip_norm):
    oracle = optax.adamw(0.01, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    if clip_norm:
        oracle = optax.chain(optax.clip_by_global_norm(clip_norm), oracle)
    params = {"a": jnp.arange(4.0) + 1}
    close(follow(optimizer.make(settings(clip_norm=clip_norm)), params)[0], follow_optax(oracle, params)[0], rtol=1e-6)


def test_lion_is_the_closed_form():
    config = settings("lion", b1=0.9, b2=0.99)
    params = {"a": noise((5,))}
    p, m = np.asarray(params["a"], np.float64), np.zeros(5)
    for step in range(4):
        g = np.asarray(gradients(params, step)["a"], np.float64)
        p = p - 0.01 * (np.sign(0.9 * m + 0.1 * g) + 0.1 * p)
        m = 0.99 * m + 0.01 * g
    close(follow(optimizer.make(config), params)[0], {"a": p})


def stacked(*shape, matrices):
    """A stack of matrices and the same ones, each alone as (inputs, outputs)."""
    x = noise(shape)
    return x, list(x.reshape(math.prod(shape) // math.prod(matrices), *matrices))


SHAPES = {  # place -> shape, and that of its matrices
    "layers/attn/q/kernel": ((2, 160, 8, 16), (160, 128)),
    "layers/attn/o/kernel": ((2, 8, 16, 160), (128, 160)),
    "layers/mlp/up/kernel": ((2, 3, 160, 128), (160, 128)),
    "layers/mlp/gate/lora_b": ((2, 16, 160), (16, 160)),
}


@pytest.mark.parametrize("path", SHAPES)
def test_adafactor_of_a_stack_is_optax_adafactor_of_every_matrix(path):
    shape, matrices = SHAPES[path]
    whole, each = stacked(*shape, matrices=matrices)
    grads, grads_each = stacked(*shape, matrices=matrices)
    tx, oracle = optimizer.make(settings("adafactor", weight_decay=0.0)), optax.adafactor(0.01)
    params, alone = tree.unflatten({path: whole}), each
    state, states = tx.init(params), [oracle.init(p) for p in each]
    move, move_one = jax.jit(tx.update), jax.jit(oracle.update)
    for step in range(3):
        scale = 1 + step  # another gradient every step, the same in both
        directions, state = move(tree.unflatten({path: grads * scale}), state, params)
        params = jax.tree.map(lambda p, d: p - 0.01 * d, params, directions)
        for n, g in enumerate(grads_each):
            update, states[n] = move_one(g * scale, states[n], alone[n])
            alone[n] = alone[n] + update
    close(params, tree.unflatten({path: jnp.stack(alone).reshape(shape)}))


@pytest.mark.parametrize("path", [path for path in SHAPES if "lora" not in path])
def test_muon_of_a_stack_is_optax_muon_of_every_matrix(path):
    shape, matrices = SHAPES[path]
    whole, each = stacked(*shape, matrices=matrices)
    tx = optimizer.make(settings("muon"))
    oracle = optax.contrib.muon(0.01, consistent_rms=0.2, weight_decay=0.1)
    params, state = tree.unflatten({path: whole}), tx.init(tree.unflatten({path: whole}))
    directions, _ = jax.jit(tx.update)(params, state, params)
    moved = jax.tree.map(lambda p, d: p - 0.01 * d, params, directions)
    move = jax.jit(oracle.update)
    alone = [p + move(p, oracle.init(p), p)[0] for p in each]
    close(moved, tree.unflatten({path: jnp.stack(alone).reshape(shape)}))


def test_muon_makes_singular_values_equal():
    """Newton and Schulz's five steps leave them between about 0.7 and 1.2."""
    params = {"layers": {"mlp": {"up": {"kernel": noise((2, 24, 40))}}}}
    tx = optimizer.make(settings("muon", weight_decay=0.0))
    direction = tx.update(params, tx.init(params), params)[0]["layers"]["mlp"]["up"]["kernel"]
    sizes = np.linalg.svd(np.asarray(direction) / (0.2 * math.sqrt(40)), compute_uv=False)
    assert 0.6 < sizes.min() < sizes.max() < 1.3


def test_muon_moves_kernels_of_layers_and_adamw_the_rest_at_its_own_rate():
    params = {
        "embed": {"kernel": noise((64, 32))},
        "layers": {"attn_norm": {"scale": noise((2, 32))}, "mlp": {"up": {"kernel": noise((2, 32, 48))}}},
        "head": {"kernel": noise((64, 32))},
    }
    tx = optimizer.make(settings("muon", rest=0.5, weight_decay=0.0))
    directions = tree.flatten(tx.update(params, tx.init(params), params)[0])
    for path in ("embed/kernel", "layers/attn_norm/scale", "head/kernel"):
        np.testing.assert_allclose(jnp.abs(directions[path]), 0.5, rtol=1e-4)  # Adam's first direction is a sign
    assert jnp.abs(directions["layers/mlp/up/kernel"]).std() > 0.05  # and this is none


def test_schedule_free_is_optax_with_the_rate_of_each_step():
    oracle = optax.contrib.schedule_free_adamw(0.01, b1=0.9, b2=0.95, weight_decay=0.1)
    params = {"a": noise((4, 3)), "b": noise((3,))}
    close(
        follow(optimizer.make(settings("schedule_free_adamw")), params, steps=6)[0],
        follow_optax(oracle, params, steps=6)[0],
    )


def test_schedule_free_is_the_paper():
    """y between z that moves and x that averages z by squared rates; on one number, with a rate that changes."""
    config = settings("schedule_free_adamw", b1=0.8, b2=0.5, weight_decay=0.0)
    tx, params = optimizer.make(config), {"a": jnp.ones(1)}
    state, z, x, v, total = tx.init(params), 1.0, 1.0, 0.0, 0.0
    for step, rate in enumerate([0.1, 0.2, 0.3, 0.3], start=1):
        g = 0.5 + step
        directions, state = tx.update({"a": jnp.full(1, g)}, state, params, learning_rate=jnp.float32(rate))
        params = {"a": params["a"] - rate * directions["a"]}
        v = 0.5 * v + 0.5 * g**2
        z -= rate * g / math.sqrt(v / (1 - 0.5**step))
        total += rate**2
        x += rate**2 / total * (z - x)
        np.testing.assert_allclose(params["a"], 0.2 * z + 0.8 * x, rtol=1e-5)


# --- rules ------------------------------------------------------------------------------------------------------------

PARAMS = {
    "embed": {"kernel": jnp.ones((8, 4))},
    "layers": {
        "attn_norm": {"scale": jnp.ones((3, 4))},
        "attn": {"q": {"kernel": jnp.ones((3, 4, 2, 2)), "bias": jnp.ones((3, 2, 2))}},
    },
    "final_norm": {"scale": jnp.ones(4)},
    "head": {"kernel": jnp.ones((8, 4))},
}


def test_norms_biases_and_embeddings_do_not_decay():
    decays = optimizer.weight_decays(PARAMS, schema.Optimizer(weight_decay=0.1))
    assert {path for path, decay in decays.items() if decay} == {"layers/attn/q/kernel", "head/kernel"}


def test_a_pattern_has_a_weight_decay_of_its_own_even_where_none_is_the_default():
    decays = optimizer.weight_decays(PARAMS, schema.Optimizer(weight_decay=0.1, decays={"embed/*": 0.3, "head/*": 0}))
    assert (decays["embed/kernel"], decays["head/kernel"], decays["layers/attn/q/kernel"]) == (0.3, 0, 0.1)


def test_rates_multiply_the_direction_and_its_weight_decay():
    plain, halved = (optimizer.make(settings(rates=rates)) for rates in ({}, {"layers/attn/*": 0.5}))
    one, two = (tree.flatten(tx.update(PARAMS, tx.init(PARAMS), PARAMS)[0]) for tx in (plain, halved))
    for path in one:
        np.testing.assert_allclose(two[path], one[path] * (0.5 if "layers/attn/" in path else 1), rtol=1e-6)


def test_layers_move_less_the_further_down_they_are():
    multipliers = optimizer.multipliers(PARAMS, schema.Optimizer(layer_decay=0.5, rates={"*attn_norm*": 10}))
    np.testing.assert_allclose(multipliers["layers/attn/q/bias"].reshape(-1), [0.25, 0.5, 1])
    np.testing.assert_allclose(multipliers["layers/attn_norm/scale"].reshape(-1), [2.5, 5, 10])
    assert multipliers["layers/attn/q/kernel"].shape == (3, 1, 1, 1)
    assert (multipliers["embed/kernel"], multipliers["final_norm/scale"], multipliers["head/kernel"]) == (0.125, 1, 1)


def test_layer_decay_reaches_the_update():
    tx = optimizer.make(settings(layer_decay=0.5, weight_decay=0.0))
    q = tx.update(PARAMS, tx.init(PARAMS), PARAMS)[0]["layers"]["attn"]["q"]["kernel"]
    np.testing.assert_allclose(q[:, 0, 0, 0], [0.25, 0.5, 1], rtol=1e-6)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"rates": {"embd/*": 0.1}}, r"optimizer.rates: 'embd/\*' fits no parameter .* Did you mean 'embed/kernel'"),
        ({"rates": {"head/*": 0.1, "*kernel": 2}}, r"rates: 'head/\*' and '\*kernel' both fit head/kernel"),
        ({"decays": {"*nrm*": 0.1}}, r"optimizer.decays: '\*nrm\*' fits no parameter"),
        ({"no_decay": ("*nrm*",), "weight_decay": 0.1}, r"optimizer.no_decay: '\*nrm\*' fits no parameter"),
        ({"rates": {"head/*": -1.0}}, r"rates\['head/\*'\]: -1 is out of range"),
        ({"kind": "lion", "moments": "int8"}, r"moments: 'int8' has no effect with kind='lion'"),
        ({"kind": "schedule_free_adamw", "average": 0.9}, r"optimizer.average: 0.9, but schedule_free_adamw"),
        ({"kind": "schedule_free_adamw", "b1": 0.0}, r"optimizer.b1: 0"),
    ],
)
def test_what_fits_nothing_or_does_not_go_together_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        optimizer.make(schema.Optimizer(**wrong)).init(PARAMS)


def test_layer_decay_without_layers_is_refused():
    with pytest.raises(ValueError, match=r"layer_decay: no parameter of a layer is trained"):
        optimizer.make(schema.Optimizer(layer_decay=0.9)).init({"embed": {"kernel": jnp.ones((2, 2))}})


# --- parameters as matrices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, ndim, expected",
    [
        ("embed/kernel", 2, Reading(0, 1)),
        ("final_norm/scale", 1, Reading(0, 0)),
        ("layers/attn/q/kernel", 4, Reading(1, 1)),
        ("layers/attn/q/bias", 3, Reading(1, 0)),
        ("layers/attn/q_norm/scale", 3, Reading(1, 0)),
        ("layers/attn/o/kernel", 4, Reading(1, 2)),
        ("layers/attn/o/lora_a", 4, Reading(1, 2)),
        ("layers/attn/o/lora_b", 3, Reading(1, 1)),
        ("layers/attn/q/lora_b", 4, Reading(1, 1)),
        ("layers/mlp/up/kernel", 3, Reading(1, 1)),
        ("layers/mlp/up/kernel", 4, Reading(2, 1)),
        ("layers/mlp/up/bias", 3, Reading(2, 0)),
        ("layers/mlp/up/bias", 2, Reading(1, 0)),
        ("layers/mlp/up/lora_a", 4, Reading(2, 1)),
        ("layers/mlp/router/kernel", 3, Reading(1, 1)),
        ("layers/mlp/router/bias", 2, Reading(1, 0)),
    ],
)
def test_what_the_dimensions_of_a_parameter_are(path, ndim, expected):
    assert optimizer.reading(path, ndim) == expected
