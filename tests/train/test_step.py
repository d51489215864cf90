"""One optimizer step: sums divided once, whatever the micro-batches; a bad gradient changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from itjax.base.records import PackedBatch
from itjax.objectives.sums import LossSums
from itjax.train.state import fresh
from itjax.train.step import grad_sums, make_train_step

RAGGED = [32, 1, 2, 30, 3, 1, 4, 28]  # trained tokens of each row


def batch(lengths=RAGGED, length=32) -> PackedBatch:
    rng = np.random.default_rng(0)
    weights = (np.arange(length)[None] < np.array(lengths)[:, None]).astype(np.float32)
    ones = np.ones_like(weights, np.int32)
    tokens, targets = rng.integers(0, 9, (2, *weights.shape)).astype(np.int32)
    return PackedBatch(tokens, targets, ones, np.cumsum(ones, 1, dtype=np.int32) - 1, weights, 0 * ones)


def squares(params, frozen, batch) -> LossSums:
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


def one_step(data, accumulate, tx=SGD, rate=1.0, loss=squares):
    step = make_train_step(loss, tx, learning_rate=lambda step: jnp.float32(rate), accumulate=accumulate)
    return jax.jit(step)(fresh(PARAMS, {}, tx), data)


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
    def broken(params, frozen, batch):
        sums = squares(params, frozen, batch)
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
