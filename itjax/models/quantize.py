"""Kernels that are not trained, in 8 or 4 bits: codes and the scales that make numbers of them.

A quantised kernel is two arrays with as many dimensions as the kernel, so that it stacks and shards as the kernel does:

    kernel  (4096, 32, 128)  inputs, heads, head_size   float32  4 bytes a parameter
    int8    codes (4096, 32, 128) int8    scales (1, 32, 128) float32     a scale for each output         1.00
    nf4     codes (2048, 32, 128) uint8   scales (64, 32, 128) bfloat16   a scale for 64 inputs of one    0.53

Two codes of nf4 share a byte here, because what an array of 4-bit numbers takes depends on the backend: one byte each on
CPU with jax 0.10, half of one with 0.12. Scales of nf4 in bfloat16 (a quarter of a bit per parameter) are in place of the
paper's double quantisation of float32 ones (0.13): simpler, and their rounding (2^-9) is far below that of the codes.

NF4: Dettmers et al. 2023, QLoRA, https://arxiv.org/abs/2305.14314, appendix E.
"""

import functools
import itertools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

KINDS = ("int8", "nf4")
BLOCK = 64  # inputs that share a scale of nf4
SMALLEST_BLOCK = 8  # below it scales would take more than the codes save

# Quantiles of the normal distribution, scaled to [-1, 1], with an exact zero.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

Leaves = Mapping[str, jax.Array]


def quantize(kernel: jax.Array, kind: str, *, contract: int, lead: int = 0) -> dict[str, jax.Array]:
    """A kernel (lead..., inputs..., outputs...) as `codes` and `scales`; the first dimensions may be layers and experts."""
    assert kind in KINDS, kind
    inputs = tuple(range(lead, lead + contract))
    return _int8(kernel, inputs) if kind == "int8" else _nf4(kernel, inputs)


def dequantize(leaves: Leaves, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The kernel that codes and scales stand for."""
    codes, scales = leaves["codes"], leaves["scales"].astype(jnp.float32)
    if codes.dtype == jnp.int8:
        return (codes.astype(jnp.float32) * scales).astype(dtype)
    (axis,) = (i for i, (a, b) in enumerate(zip(codes.shape, scales.shape, strict=True)) if a != b)
    pairs = jnp.stack([_number(codes & 15), _number(codes >> 4)], axis=axis + 1)
    blocks = pairs.reshape(*scales.shape[: axis + 1], -1, *scales.shape[axis + 1 :])
    shape = (*codes.shape[:axis], 2 * codes.shape[axis], *codes.shape[axis + 1 :])
    return (blocks * jnp.expand_dims(scales, axis + 1)).reshape(shape).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x_RI: jax.Array, leaves: Leaves, contract: int) -> jax.Array:
    """x · kernel as two matrices. The backward pass makes the kernel again from its codes: nothing of its size is kept."""
    return x_RI @ _matrix(leaves, contract, x_RI.dtype)


def _forward(x_RI: jax.Array, leaves: Leaves, contract: int) -> tuple[jax.Array, Leaves]:
    return matmul(x_RI, leaves, contract), leaves


def _backward(contract: int, leaves: Leaves, dy_RO: jax.Array) -> tuple[jax.Array, None]:
    return dy_RO @ _matrix(leaves, contract, dy_RO.dtype).T, None  # codes have no gradient


matmul.defvjp(_forward, _backward)


def _matrix(leaves: Leaves, contract: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    kernel = dequantize(leaves, dtype)
    return kernel.reshape(math.prod(kernel.shape[:contract]), -1)


def _int8(kernel: jax.Array, inputs: tuple[int, ...]) -> dict[str, jax.Array]:
    """Steps of 1/127 of the largest number that goes to an output."""
    wide = kernel.astype(jnp.float32)
    scales = _nonzero(jnp.abs(wide).max(axis=inputs, keepdims=True) / 127)
    return {"codes": jnp.round(wide / scales).astype(jnp.int8), "scales": scales}


def _nf4(kernel: jax.Array, inputs: tuple[int, ...]) -> dict[str, jax.Array]:
    """The nearest of sixteen numbers, times the largest of a block. Neighbours share a byte, the first has the low bits."""
    axis = max(inputs, key=lambda i: (math.gcd(kernel.shape[i], BLOCK), i))
    block = math.gcd(kernel.shape[axis], BLOCK)
    if block < SMALLEST_BLOCK:
        extents = tuple(kernel.shape[i] for i in inputs)
        raise ValueError(
            f"lora.base: nf4 takes kernels whose inputs are a multiple of {SMALLEST_BLOCK}, not {extents}; "
            "take lora.base=int8"
        )
    before, after = kernel.shape[:axis], kernel.shape[axis + 1 :]
    blocks = kernel.astype(jnp.float32).reshape(*before, -1, block, *after)
    scales = _nonzero(jnp.abs(blocks).max(axis=axis + 1, keepdims=True)).astype(jnp.bfloat16)
    codes = _nearest(blocks / scales.astype(jnp.float32)).reshape(*before, -1, 2, *after)
    low, high = (jax.lax.index_in_dim(codes, half, axis + 1, keepdims=False) for half in (0, 1))
    return {"codes": low | high << 4, "scales": scales.squeeze(axis + 1)}


def _nonzero(scales: jax.Array) -> jax.Array:
    """Zeros are zeros at any scale."""
    return jnp.where(scales == 0, 1.0, scales)


def _nearest(x: jax.Array) -> jax.Array:
    """The code of the nearest number: how many of the fifteen borders lie below."""
    borders = [(low + high) / 2 for low, high in itertools.pairwise(NF4)]
    return sum(((x > border).astype(jnp.uint8) for border in borders), jnp.zeros(x.shape, jnp.uint8))


def _number(code: jax.Array) -> jax.Array:
    """What a code stands for. Choices by bit would need sixteen constants as large as the kernel, outside the scan's loop."""
    return jnp.asarray(NF4, jnp.float32).at[code].get(mode="promise_in_bounds")
