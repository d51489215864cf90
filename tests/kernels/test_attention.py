"""Attention within packed examples, against sums written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itjax.kernels import attention

IMPLEMENTATIONS = sorted(attention.IMPLEMENTATIONS)


def inputs(*, rows: int, length: int, heads: int, kv_heads: int, head_size: int = 8, seed: int = 0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(rows, length, n, head_size)) for n in (heads, kv_heads, kv_heads))
    segments = np.sort(rng.integers(1, 4, (rows, length)), axis=1)
    segments[:, length - length // 4 :] = 0  # padding
    return q, k, v, segments.astype(np.int32)


def written_out(q_BTNH, k_BTKH, v_BTKH, segments_BT):
    """Every query by itself, float64."""
    out = np.zeros_like(q_BTNH)
    for b, t, n in np.ndindex(q_BTNH.shape[:3]):
        seen = [s for s in range(t + 1) if segments_BT[b, s] == segments_BT[b, t]]
        head = n * k_BTKH.shape[2] // q_BTNH.shape[2]
        scores = k_BTKH[b, seen, head] @ q_BTNH[b, t, n] / q_BTNH.shape[3] ** 0.5
        probabilities = np.exp(scores - scores.max())
        out[b, t, n] = probabilities @ v_BTKH[b, seen, head] / probabilities.sum()
    return out


def run(name, q, k, v, segments):
    return attention.attend(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), segments, implementation=name)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("length, heads, kv_heads", [(1, 4, 2), (150, 4, 2), (7, 4, 4), (7, 3, 1)])
def test_values_are_those_of_the_sums_written_out(name, length, heads, kv_heads):
    q, k, v, segments = inputs(rows=2, length=length, heads=heads, kv_heads=kv_heads)
    np.testing.assert_allclose(run(name, q, k, v, segments), written_out(q, k, v, segments), atol=3e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_gradients_are_slopes_of_the_sums_written_out(name):
    q, k, v, segments = inputs(rows=1, length=70, heads=2, kv_heads=1)
    rng = np.random.default_rng(1)
    mix = rng.normal(size=q.shape)
    grads = jax.grad(lambda *qkv: (run(name, *qkv, segments) * mix).sum(), argnums=(0, 1, 2))(
        *(jnp.asarray(x, jnp.float32) for x in (q, k, v))
    )
    for changed, grad in enumerate(grads):
        way = rng.normal(size=grad.shape)
        ends = []
        for sign in (1, -1):
            qkv = [x + sign * 1e-4 * way * (number == changed) for number, x in enumerate((q, k, v))]
            ends.append((written_out(*qkv, segments) * mix).sum())
        slope = (ends[0] - ends[1]) / 2e-4
        assert float((np.asarray(grad, np.float64) * way).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_other_segments_and_padding_have_exactly_no_influence(name):
    q, k, v, segments = inputs(rows=1, length=140, heads=2, kv_heads=2)
    before = np.asarray(run(name, q, k, v, segments))
    changed = segments != 2
    k, v = (np.where(changed[..., None, None], 1e3 * x + 7, x) for x in (k, v))
    after = np.asarray(run(name, q, k, v, segments))
    assert (segments == 2).any()
    np.testing.assert_array_equal(after[segments == 2], before[segments == 2])
    assert np.isfinite(after).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bfloat16_stays_bfloat16_and_close(name):
    q, k, v, segments = inputs(rows=1, length=130, heads=4, kv_heads=2)
    out = attention.attend(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), segments, implementation=name)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), written_out(q, k, v, segments), atol=0.05)


def test_auto_is_the_best_one_of_a_platform():
    for platform in ("cpu", "gpu", "tpu"):
        assert attention.choose("auto", platform=platform) == attention.available(platform)[0]


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"attention: 'blockwize' is unknown on cpu.*'blockwise'"):
        attention.choose("blockwize", platform="cpu")
