"""Chunked cross-entropy, against softmax written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itjax.kernels.cross_entropy import CrossEntropy, linear_cross_entropy, reference

ROWS, LENGTH, DIM, VOCAB = 3, 17, 12, 29


def inputs(*, seed: int = 0, padded: int = 0):
    rng = np.random.default_rng(seed)
    x, head = rng.normal(size=(ROWS, LENGTH, DIM)), rng.normal(size=(VOCAB + padded, DIM))
    targets = rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    weights = rng.random((ROWS, LENGTH)) * (rng.random((ROWS, LENGTH)) < 0.6)
    return x.astype(np.float32), head.astype(np.float32), targets, weights.astype(np.float32)


def chunked(x, head, targets, weights, *, chunk=8, z_loss=0.0, vocab=VOCAB, shards=1) -> CrossEntropy:
    return linear_cross_entropy(
        x, head, targets, weights, vocab=vocab, z_loss=z_loss, chunk=chunk, shards=(shards, 1), pin=lambda x, *names: x
    )


def written_out(x, head, targets, weights, *, z_loss, vocab=VOCAB):
    """(sum, gradient by x, gradient by head) in float64."""
    x, head = np.float64(x).reshape(-1, DIM), np.float64(head)
    weights = np.float64(weights).reshape(-1)
    logits = x @ head[:vocab].T
    log_z = np.log(np.exp(logits).sum(-1))
    picked = logits[np.arange(len(x)), targets.reshape(-1)]
    by_logits = np.exp(logits - log_z[:, None]) * (weights * (1 + 2 * z_loss * log_z))[:, None]
    by_logits[np.arange(len(x)), targets.reshape(-1)] -= weights
    by_head = np.zeros_like(head)
    by_head[:vocab] = by_logits.T @ x
    loss = (weights * (log_z - picked + z_loss * log_z**2)).sum()
    return loss, (by_logits @ head[:vocab]).reshape(ROWS, LENGTH, DIM), by_head


@pytest.mark.parametrize(
    "chunk, z_loss, shards", [(1, 1e-2, 1), (8, 0.0, 1), (8, 1e-2, 1), (1000, 1e-2, 1), (5, 1e-2, 3)]
)
def test_value_and_gradients_are_those_of_softmax_written_out(chunk, z_loss, shards):
    x, head, targets, weights = inputs()
    loss, grads = jax.value_and_grad(
        lambda x, head: chunked(x, head, targets, weights, chunk=chunk, z_loss=z_loss, shards=shards).loss,
        argnums=(0, 1),
    )(x, head)
    wanted, by_x, by_head = written_out(x, head, targets, weights, z_loss=z_loss)
    assert float(loss) == pytest.approx(wanted, rel=1e-6)
    np.testing.assert_allclose(grads[0], by_x, atol=2e-6)
    np.testing.assert_allclose(grads[1], by_head, atol=5e-6)


def test_facts_of_each_position_are_those_of_the_plain_definition():
    x, head, targets, weights = inputs()
    ours = chunked(x, head, targets, weights, z_loss=1e-3)
    plain = reference(x, head, targets, weights, vocab=VOCAB, z_loss=1e-3)
    for name in CrossEntropy._fields:
        np.testing.assert_allclose(getattr(ours, name), getattr(plain, name), atol=1e-5, err_msg=name)
    assert (np.asarray(ours.nll_BT)[weights == 0] == 0).all()


def test_hits_count_targets_that_no_logit_beats():
    head = np.eye(4, DIM, dtype=np.float32)
    x = np.stack([head[[2, 3, 1]]])  # the best ids are 2, 3, 1
    out = chunked(x, head, np.array([[2, 0, 1]], np.int32), np.ones((1, 3), np.float32), vocab=4)
    assert np.asarray(out.hits_BT).tolist() == [[1, 0, 1]]


def test_rows_of_the_head_beyond_the_vocabulary_change_nothing():
    x, head, targets, weights = inputs(padded=3)
    loss, grad = jax.value_and_grad(lambda head: chunked(x, head, targets, weights).loss)(head)
    wanted, _, by_head = written_out(x, head, targets, weights, z_loss=0.0)
    assert float(loss) == pytest.approx(wanted, rel=1e-6)
    np.testing.assert_allclose(grad, by_head, atol=5e-6)
    assert (np.asarray(grad)[VOCAB:] == 0).all()


def test_positions_without_weight_do_not_matter_whatever_they_hold():
    x, head, targets, weights = inputs()
    x_nan = np.where(weights[..., None] == 0, np.nan, x)
    loss, grad = jax.value_and_grad(lambda x: chunked(x, head, targets, weights).loss)(x_nan)
    assert float(loss) == float(chunked(x, head, targets, weights).loss)
    assert (np.asarray(grad)[weights == 0] == 0).all()


def test_nothing_to_learn_gives_zeros():
    x, head, targets, weights = inputs()
    loss, grads = jax.value_and_grad(lambda x, head: chunked(x, head, targets, 0 * weights).loss, argnums=(0, 1))(
        x, head
    )
    assert float(loss) == 0
    assert all((np.asarray(grad) == 0).all() for grad in grads)


def test_the_cotangent_scales_the_gradient():
    x, head, targets, weights = inputs()
    once, thrice = (jax.grad(lambda x, n=n: n * chunked(x, head, targets, weights).loss)(x) for n in (1.0, 3.0))
    np.testing.assert_allclose(thrice, 3 * np.asarray(once), rtol=1e-6)


def test_many_chunks_in_bfloat16_add_up_the_heads_gradient_in_float32():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 4096, DIM)), jnp.bfloat16)
    head = (0.1 * rng.normal(size=(VOCAB, DIM))).astype(np.float32)
    targets = rng.integers(0, VOCAB, (1, 4096)).astype(np.int32)
    weights = np.ones((1, 4096), np.float32)

    def by_head(x, chunk):
        return np.asarray(jax.grad(lambda head: chunked(x, head, targets, weights, chunk=chunk).loss)(head))

    exact, few, many = by_head(x.astype(jnp.float32), 4096), by_head(x, 4096), by_head(x, 32)
    error_few, error_many = (np.linalg.norm(ours - exact) / np.linalg.norm(exact) for ours in (few, many))
    assert few.dtype == np.float32
    assert error_few < 3e-3
    assert error_many < 1.1 * error_few  # a bfloat16 sum over 128 chunks is off by several times as much


def test_a_frozen_head_costs_no_gradient():
    """Under adapters the head does not move; its gradient is not computed."""
    x, head, targets, weights = inputs()
    both = jax.jit(jax.grad(lambda x, head: chunked(x, head, targets, weights).loss, argnums=(0, 1)))
    only = jax.jit(jax.grad(lambda x, head: chunked(x, head, targets, weights).loss))
    flops = [f.lower(x, head).compile().cost_analysis()["flops"] for f in (both, only)]
    assert flops[1] < 0.8 * flops[0]
