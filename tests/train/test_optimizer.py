"""The learning rate at the steps where it matters, and which parameters decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from itjax.base import schema
from itjax.train import optimizer


def rates(schedule: str, *, warmup: float, final: float, num_steps: int = 10) -> list[float]:
    config = schema.Optimizer(learning_rate=1.0, schedule=schedule, warmup=warmup, final=final)
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


def test_norms_and_embeddings_do_not_decay():
    params = {"embed": {"kernel": 0}, "layers": {"attn_norm": {"scale": 0}, "attn": {"q": {"kernel": 0}}}}
    assert optimizer.decays(params, schema.Optimizer()) == {
        "embed": {"kernel": False},
        "layers": {"attn_norm": {"scale": False}, "attn": {"q": {"kernel": True}}},
    }


@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
def test_direction_times_rate_is_optax_adamw(clip_norm):
    config = schema.Optimizer(learning_rate=0.01, weight_decay=0.1, clip_norm=clip_norm, no_decay=())
    params = {"a": jnp.arange(4.0) + 1}
    oracle = optax.adamw(0.01, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=0.1)
    if clip_norm:
        oracle = optax.chain(optax.clip_by_global_norm(clip_norm), oracle)
    ours, theirs = (tx.init(params) for tx in (optimizer.adamw(config), oracle))
    p, q = params, params
    for seed in range(3):
        grads = {"a": jax.random.normal(jax.random.key(seed), (4,))}
        directions, ours = optimizer.adamw(config).update(grads, ours, p)
        p = jax.tree.map(lambda x, d: x - 0.01 * d, p, directions)
        updates, theirs = oracle.update(grads, theirs, q)
        q = optax.apply_updates(q, updates)
    np.testing.assert_allclose(p["a"], q["a"], rtol=1e-6)
