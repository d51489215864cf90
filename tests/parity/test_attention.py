"""Attention reads what it reads in torch and in the transformers library."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itjax.kernels import attention
from itjax.kernels.attention import Scores, Segments

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers.masking_utils import sliding_window_causal_mask_function  # noqa: E402
from transformers.models.gemma2 import modeling_gemma2  # noqa: E402
from transformers.models.gpt_oss import modeling_gpt_oss  # noqa: E402

B, T, N, K, H = 2, 90, 4, 2, 16
each_implementation = pytest.mark.parametrize("name", ["blockwise", "streamed", "reference"])


@pytest.fixture(scope="module")
def qkv():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(B, T, n, H)).astype(np.float32) * 2 for n in (N, K, K)]


SEGMENTS = np.sort(np.random.default_rng(1).integers(1, 4, (B, T)), axis=1).astype(np.int32)


def their_mask(window):
    """(B, 1, T, T), by their function of what a window is."""
    near = sliding_window_causal_mask_function(window or T)
    t, s = torch.arange(T)[:, None], torch.arange(T)[None]
    segments = torch.tensor(SEGMENTS)
    return (near(0, 0, t, s) & (segments[:, :, None] == segments[:, None]))[:, None]


def added(window):
    return torch.where(their_mask(window), 0.0, float("-inf")).double()


def to_torch(*arrays):
    """float64, with heads before positions as they have them."""
    return [torch.tensor(x).double().transpose(1, 2) for x in arrays]


def ours(name, arrays, scores, sinks=None):
    return attention.attend(
        *map(jnp.asarray, arrays), Segments(SEGMENTS, SEGMENTS), implementation=name, scores=scores, sinks_N=sinks
    )


@each_implementation
@pytest.mark.parametrize("window", [0, 7])
def test_values_and_gradients_are_those_of_torch(name, qkv, window):
    mix = np.random.default_rng(2).normal(size=(B, T, N, H)).astype(np.float32)
    theirs = [x.requires_grad_() for x in to_torch(*qkv)]
    read = torch.nn.functional.scaled_dot_product_attention(
        *theirs, attn_mask=their_mask(window), scale=0.3, enable_gqa=True
    )
    (read * to_torch(mix)[0]).sum().backward()

    @jax.jit
    def value_and_grads(arrays):
        read, pull = jax.vjp(lambda *arrays: ours(name, arrays, Scores(0.3, window=window)), *arrays)
        return read, pull(jnp.asarray(mix))

    values, grads = value_and_grads(qkv)
    np.testing.assert_allclose(values, read.detach().transpose(1, 2), atol=5e-6)
    for grad, x in zip(grads, theirs, strict=True):
        np.testing.assert_allclose(grad, x.grad.transpose(1, 2), atol=3e-5)


@each_implementation
@pytest.mark.parametrize("window", [0, 7])
def test_sinks_are_those_of_gpt_oss(name, qkv, window):
    sinks = np.array([0.5, -2.0, 6.0, 1.0], np.float32)
    module = SimpleNamespace(num_key_value_groups=N // K, sinks=torch.tensor(sinks).double(), training=False)
    read, _ = modeling_gpt_oss.eager_attention_forward(module, *to_torch(*qkv), added(window), scaling=0.3)
    np.testing.assert_allclose(ours(name, qkv, Scores(0.3, window=window), jnp.asarray(sinks)), read, atol=5e-6)


@each_implementation
@pytest.mark.parametrize("window", [0, 7])
def test_softcaps_are_those_of_gemma_2(name, qkv, window):
    module = SimpleNamespace(num_key_value_groups=N // K, head_dim=H, training=False)
    read, _ = modeling_gemma2.eager_attention_forward(module, *to_torch(*qkv), added(window), scaling=0.3, softcap=3.0)
    np.testing.assert_allclose(ours(name, qkv, Scores(0.3, softcap=3.0, window=window)), read, atol=5e-6)
