"""What a gated feed-forward does between its two products: one of them, activated, multiplies the other."""

import jax
import jax.numpy as jnp

CLAMP, SLOPE = 7.0, 1.702  # of swiglu_clamped


def gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    """activation(gate) · up, by one of `config.ACTIVATIONS`."""
    match activation:
        case "silu":
            return jax.nn.silu(gate) * up
        case "gelu_tanh":
            return jax.nn.gelu(gate, approximate=True) * up
        case "swiglu_clamped":  # GPT-OSS
            gate, up = jnp.minimum(gate, CLAMP), jnp.clip(up, -CLAMP, CLAMP)
            return gate * jax.nn.sigmoid(SLOPE * gate) * (up + 1)
    raise AssertionError(activation)
