"""The parts of a decoder layer: projection, norm, rotary positions, each parameter with its logical axes beside it.

B rows, T positions, D width, N heads, H head size.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx


class Projection(nnx.Module):
    """y = x · kernel. The kernel's first `contract` dimensions meet the last ones of x; both may have several."""

    def __init__(
        self, shape: tuple[int, ...], axes: tuple[str, ...], *, contract: int, gain: float, key: jax.Array
    ) -> None:
        self.contract = contract
        self.kernel = nnx.Param(draw(key, shape, fan_in=math.prod(shape[:contract])) * gain, axes=axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype)
        rows, outputs = x.shape[: x.ndim - self.contract], kernel.shape[self.contract :]
        # One product of two matrices: XLA runs it twice as fast on CPUs as the same sums with three or four dimensions.
        y = x.reshape(math.prod(rows), -1) @ kernel.reshape(-1, math.prod(outputs))
        return y.reshape(*rows, *outputs)


class Norm(nnx.Module):
    """x over its root mean square, times a learned scale."""

    def __init__(self, dim: int, *, eps: float) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,)), axes=("embed",))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        wide_BTD = x_BTD.astype(jnp.float32)  # squares overflow what bfloat16 resolves
        wide_BTD *= jax.lax.rsqrt(jnp.square(wide_BTD).mean(axis=-1, keepdims=True) + self.eps)
        return (wide_BTD * self.scale[...][None, None]).astype(x_BTD.dtype)


def draw(key: jax.Array, shape: tuple[int, ...], *, fan_in: int) -> jax.Array:
    """Normal numbers that keep the size of what they are multiplied with."""
    return jax.random.normal(key, shape) * fan_in**-0.5


def angles(positions_BT: jax.Array, *, head_size: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, (B, T, H/2), of the angles by which a position turns the pairs of a head."""
    frequencies_P = theta ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    angles_BTP = positions_BT[..., None].astype(jnp.float32) * frequencies_P[None, None]
    return jnp.cos(angles_BTP), jnp.sin(angles_BTP)


def rope(x_BTNH: jax.Array, turns: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Heads turned by their position; a pair is one number of the first half and its sibling in the second."""
    cos_BT1P, sin_BT1P = (part_BTP[:, :, None] for part_BTP in turns)
    a_BTNP, b_BTNP = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = (a_BTNP * cos_BT1P - b_BTNP * sin_BT1P, b_BTNP * cos_BT1P + a_BTNP * sin_BT1P)
    return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)
