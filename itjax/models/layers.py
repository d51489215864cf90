"""The parts of a decoder layer: projection and norm, each parameter with its logical axes beside it.

B rows, T positions, D width, N heads, H head size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from itjax.base.schema import Lora


@dataclass(frozen=True)
class Options:
    """How linear layers keep their kernels, and what is added to them."""

    lora: Lora = Lora()  # rank 0: nothing is added
    base: str = "float32"  # "float32", "bfloat16", "int8" or "nf4"


class Draws:
    """Keys for one pass through a layer, each given once; None where nothing is to be drawn."""

    def __init__(self, key: jax.Array | None = None) -> None:
        self._key, self._given = key, 0

    def next(self) -> jax.Array | None:
        self._given += 1
        return None if self._key is None else jax.random.fold_in(self._key, self._given)


class Projection(nnx.Module):
    """y = x · kernel + bias. The kernel's first `contract` dimensions meet the last ones of x; both may have several.

    `place` is where it stands in the tree of parameters ("layers/attn/q"): patterns of adapters are about that.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        *,
        contract: int,
        gain: float,
        key: jax.Array,
        place: str,
        options: Options,
        bias: bool = False,
    ) -> None:
        self.contract = contract
        self.kernel = nnx.Param(draw(key, shape, fan_in=math.prod(shape[:contract])) * gain, axes=axes)
        self.bias = nnx.Param(jnp.zeros(shape[contract:]), axes=axes[contract:]) if bias else None

    def __call__(self, x: jax.Array, draws: Draws) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype)
        rows, outputs = x.shape[: x.ndim - self.contract], kernel.shape[self.contract :]
        # One product of two matrices: XLA runs it twice as fast on CPUs as the same sums with three or four dimensions.
        y = x.reshape(math.prod(rows), -1) @ kernel.reshape(-1, math.prod(outputs))
        if self.bias is not None:
            y += self.bias[...].astype(x.dtype).reshape(1, -1)
        return y.reshape(*rows, *outputs)


class Norm(nnx.Module):
    """x over the root mean square of its last dimensions, times (offset + scale): as many dimensions as the scale has."""

    def __init__(self, shape: Sequence[int], axes: tuple[str, ...], *, eps: float, offset: float) -> None:
        self.eps, self.offset = eps, offset
        self.scale = nnx.Param(jnp.full(shape, 1.0 - offset), axes=axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.scale[...]
        normed = tuple(range(x.ndim - scale.ndim, x.ndim))
        wide = x.astype(jnp.float32)  # squares overflow what bfloat16 resolves
        wide *= jax.lax.rsqrt(jnp.square(wide).mean(axis=normed, keepdims=True) + self.eps)
        scale = (self.offset + scale.astype(jnp.float32)).reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
        return (wide * scale).astype(x.dtype)


def draw(key: jax.Array, shape: tuple[int, ...], *, fan_in: int) -> jax.Array:
    """Normal numbers that keep the size of what they are multiplied with."""
    return jax.random.normal(key, shape) * fan_in**-0.5
