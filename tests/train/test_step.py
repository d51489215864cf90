"""One optimizer step: sums divided once, whatever the micro-batches; a bad gradient changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from itjax.base.records import PackedBatch
from itjax.objectives.sums import LossSums
from itjax.train.state import fresh
from itjax.train.step import expert_load, grad_sums, make_train_step

RAGGED = [32, 1, 2, 30, 3, 1, 4, 28]  # trained tokens of each row


def batch(lengths=RAGGED, length=32) -> PackedBatch:
    rng = np.random.default_rng(0)
    weights = (np.arange(length)[None] < np.array(lengths)[:, None]).astype(np.float32)
    ones = np.ones_like(weights, np.int32)
    tokens, targets = rng.integers(0, 9, (2, *weights.shape)).astype(np.int32)
    return PackedBatch(tokens, targets, ones, np.cumsum(ones, 1, dtype=np.int32) - 1, weights, 0 * ones)


def squares(params, frozen, batch, key) -> LossSums:
    """A regression small enough to differentiate by hand: loss w (a[token] - target)^2 per position."""
    error = params["a"][batch.tokens_BT] - batch.targets_BT
    return LossSums((batch.weights_BT * error**2).sum(), batch.weights_BT.sum(), {})


def by_hand(params, batch) -> tuple[float, np.ndarray]:
    a, weights = np.asarray(params["a"], np.float64), np.asarray(batch.weights_BT, np.float64)
    error = a[batch.tokens_BT] - batch.targets_BT
    gradient = np.zeros_like(a)
    np.add.at(gradient, batch.tokens_BT, 2 * weights * error)
    return (weights * error**2).sum() / weights.sum(), gradient / weights.sum()


SGD = optax.identity()
PARAMS = {"a": jnp.linspace(-1, 1, 9)}


def one_step(data, accumulate, tx=SGD, rate=1.0, loss=squares, average=0.0, **settings):
    step = jax.jit(stepper(accumulate, tx, rate, loss, average=average, **settings))
    return step(fresh(PARAMS, {}, tx, average=average), data)


def stepper(accumulate, tx=SGD, rate=1.0, loss=squares, **settings):
    return make_train_step(loss, tx, learning_rate=lambda step: jnp.float32(rate), accumulate=accumulate, **settings)


def test_loss_and_gradient_are_the_global_mean_for_any_micro_batches():
    loss, gradient = by_hand(PARAMS, batch())
    for accumulate in (1, 2, 4, 8):
        state, metrics = one_step(batch(), accumulate)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
        np.testing.assert_allclose(PARAMS["a"] - state.params["a"], gradient, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-5)


def test_mean_of_micro_batch_means_would_be_another_gradient():
    """The claim above can fail: on this batch the tempting mistake is far off."""
    micros = [jax.tree.map(lambda x, i=i: x[i::4], batch()) for i in range(4)]
    wrong = np.mean([by_hand(PARAMS, micro)[1] for micro in micros], axis=0)
    right = by_hand(PARAMS, batch())[1]
    assert np.linalg.norm(wrong - right) > 0.1 * np.linalg.norm(right)


def test_a_masked_micro_batch_adds_exactly_nothing():
    grads, sums = grad_sums(squares, fresh(PARAMS, {}, SGD), batch([4, 0, 4, 0]), 2)
    alone, alone_sums = grad_sums(
        squares, fresh(PARAMS, {}, SGD), jax.tree.map(lambda x: x[::2], batch([4, 0, 4, 0])), 1
    )
    np.testing.assert_array_equal(grads["a"], alone["a"])
    assert sums.weight == alone_sums.weight == 8


def test_a_step_without_weight_is_skipped_and_stays_finite():
    state, metrics = one_step(batch([0, 0]), 1, tx=optax.scale_by_adam())
    assert metrics["skipped"]
    assert np.isfinite(metrics["loss"])
    np.testing.assert_array_equal(state.params["a"], PARAMS["a"])
    assert state.step == 1


def test_a_gradient_that_is_not_finite_leaves_parameters_and_moments():
    def broken(params, frozen, batch, key):
        sums = squares(params, frozen, batch, key)
        return LossSums(sums.loss * jnp.inf, sums.weight, {})

    state, metrics = one_step(batch(), 1, tx=optax.scale_by_adam(), loss=broken)
    assert metrics["skipped"]
    np.testing.assert_array_equal(state.params["a"], PARAMS["a"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.opt_state))


def test_metrics_count_real_and_trained_tokens():
    data = batch([3, 1], length=4)
    data = data._replace(segments_BT=np.array([[1, 1, 1, 2], [1, 1, 0, 0]], np.int32))
    _, metrics = one_step(data, 1)
    assert (metrics["tokens"], metrics["trained_tokens"], metrics["weight"]) == (6, 4, 4)


def drawing(params, frozen, batch, key) -> LossSums:
    """A loss that draws: its gradient by `a` is one random number in every entry."""
    assert key is not None
    return LossSums(params["a"].sum() * jax.random.normal(key), batch.weights_BT.sum(), {})


@pytest.mark.parametrize("accumulate", [1, 4])
def test_every_micro_batch_of_every_step_draws_from_its_own_address(accumulate):
    step = jax.jit(stepper(accumulate, loss=drawing, seed=7))
    state, weight = fresh(PARAMS, {}, SGD), batch().weights_BT.sum()
    for number in range(2):
        after, _ = step(state, batch())
        addresses = [jax.random.fold_in(jax.random.fold_in(jax.random.key(7), number), a) for a in range(accumulate)]
        drawn = sum(float(jax.random.normal(address)) for address in addresses)
        np.testing.assert_allclose(state.params["a"] - after.params["a"], drawn / weight, rtol=1e-3)
        state = after


def test_without_a_seed_the_program_has_no_random_numbers():
    program = str(jax.make_jaxpr(stepper(4))(fresh(PARAMS, {}, SGD), batch()))
    assert "random" not in program
    assert "random" in str(jax.make_jaxpr(stepper(4, seed=7))(fresh(PARAMS, {}, SGD), batch()))


def test_what_an_objective_sums_besides_is_in_the_metrics():
    def routed(params, frozen, batch, key):
        sums, weight = squares(params, frozen, batch, key), batch.weights_BT.sum()
        aux = {"router_balance": 2 * weight, "router_z": 3 * weight, "dropped": jnp.float32(5), "mine": 7 * weight}
        return dataclasses.replace(sums, aux={**aux, "expert_tokens": jnp.array([6.0, 1, 1, 0])})

    for accumulate in (1, 2):  # `dropped` and the tokens of experts count up, means stay
        _, metrics = one_step(batch(), accumulate, loss=routed)
        assert (metrics["router_balance"], metrics["router_z"], metrics["mine"]) == (2, 3, 7)
        assert metrics["dropped"] == 5 * accumulate
        assert metrics["expert_load"] == 3  # 6 of a mean of 2
        assert "expert_tokens" not in metrics


def test_the_metric_loss_is_without_what_coefficients_add():
    def weighed(params, frozen, batch, key):
        sums = squares(params, frozen, batch, key)
        return dataclasses.replace(sums, loss=3 * sums.loss, aux={"nll": sums.loss})

    (state, metrics), (plain, expected) = one_step(batch(), 2, loss=weighed), one_step(batch(), 2)
    assert metrics["loss"] == expected["loss"]
    np.testing.assert_allclose(state.params["a"] - PARAMS["a"], 3 * (plain.params["a"] - PARAMS["a"]), rtol=1e-5)


def test_the_load_of_several_layers_is_that_of_the_least_even_one():
    assert expert_load(jnp.array([[2.0, 2, 2, 2], [4, 4, 0, 0], [0, 0, 0, 0]])) == 2


def test_the_average_begins_at_the_first_parameters_and_follows_sound_steps_only():
    first = PARAMS["a"]
    state, _ = one_step(batch(), 1, average=0.75)
    np.testing.assert_allclose(state.average["a"], 0.75 * first + 0.25 * state.params["a"], rtol=1e-6)
    after, metrics = jax.jit(stepper(1, average=0.75))(state, batch([0]))
    assert metrics["skipped"]
    np.testing.assert_array_equal(after.average["a"], state.average["a"])


def test_no_average_costs_nothing():
    assert one_step(batch(), 1)[0].average == {}
