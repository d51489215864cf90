"""Adam with moments of two bytes or one: rounded at random, so that changes smaller than a step of the scale are not lost.

With b2 = 0.999 a second moment moves by a thousandth per step, and bfloat16 knows numbers four thousandths apart: rounded
to the nearest it would never fall. Rounded up or down with the right probability it is right on average. Sources:
Gupta et al. 2015, https://arxiv.org/abs/1502.02551; Zamirai et al. 2020, https://arxiv.org/abs/2010.06192

One byte is a code on a geometric scale, six to the octave, below a power of two that a block of numbers shares; blocks
as in Dettmers et al. 2021, https://arxiv.org/abs/2110.02861. Geometric, because a block holds numbers of all sizes, and
an m that is rounded as coarsely as the largest of its block moves its parameter by many times the learning rate. A power
of two, because a block whose largest number changes then keeps every other number as it is.

K blocks of S numbers.
"""

import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from itjax.base import tree
from itjax.models.model import Params

BLOCK = 256  # numbers that share a power of two, at most
SMALLEST_BLOCK = 32  # where the last dimension has no divisor between the two, all of it is one block
PER_OCTAVE = 6
STACKED = "layers/"  # begins paths of parameters that lead with a dimension of layers
STEP = 2 ** (1 / PER_OCTAVE)  # from one number of the scale to the next
EXPONENTS = (-125, 125)  # both powers of two, and their inverses, are normal float32 numbers


class Octets(NamedTuple):
    """Numbers in a byte each. Code c of a block with exponent e is 2^e x STEP^(|c| - top), with the sign of c; 0 is 0."""

    codes: (
        jax.Array
    )  # as the parameter: int8 (top 127) of signed numbers, uint8 (top 255) of those that are never negative
    exponents: jax.Array  # int8, one per block of the last dimension


class SmallMoments(NamedTuple):
    """What Adam knows of each parameter, in few bytes."""

    updates: jax.Array  # () int32: so far
    mu: Any
    nu: Any


def scale_by_adam(b1: float, b2: float, eps: float, *, kind: str, seed: int) -> optax.GradientTransformation:
    """Adam's direction from moments kept as "bfloat16" or "int8". The direction itself reads them before they are rounded.

    The draws of update n for a parameter are a function of `fold_in(key(seed), n)` and its path: no state.
    """

    def init(params: Params) -> SmallMoments:
        def nothing(signed: bool) -> Params:
            flat = tree.flatten(params)
            return tree.unflatten({path: zeros(p.shape, kind, signed=signed) for path, p in flat.items()})

        return SmallMoments(jnp.zeros((), jnp.int32), nothing(True), nothing(False))

    def update(grads: Params, state: SmallMoments, params: Params | None = None) -> tuple[Params, SmallMoments]:
        updates = optax.safe_increment(state.updates)
        words = jax.random.bits(jax.random.fold_in(jax.random.key(seed), state.updates), (2,), jnp.uint32)
        corrections = 1 - b1**updates, 1 - b2**updates
        mus, nus = tree.flatten(state.mu), tree.flatten(state.nu)
        directions = {}

        def one(path: str, g: jax.Array, mu: Any, nu: Any, start: jax.Array | int) -> tuple[jax.Array, Any, Any]:
            m = b1 * load(mu) + (1 - b1) * g
            v = b2 * load(nu) + (1 - b2) * g**2
            direction = (m / corrections[0]) / (jnp.sqrt(v / corrections[1]) + eps)
            bits = draw(words, path, g.shape, start=start)
            return direction, store(m, bits >> 16, kind, signed=True), store(v, bits & 0xFFFF, kind, signed=False)

        for path, g in tree.flatten(grads).items():
            if path.startswith(STACKED) and g.ndim > 1:
                starts = jnp.arange(len(g), dtype=jnp.uint32) * jnp.uint32(math.prod(g.shape[1:]) % 2**32)
                parts = (g, mus[path], nus[path], starts)
                # Layer by layer: float32 copies of a whole leaf's moments would be larger than what small ones save.
                directions[path], mus[path], nus[path] = jax.lax.map(lambda part, path=path: one(path, *part), parts)
            else:
                directions[path], mus[path], nus[path] = one(path, g, mus[path], nus[path], 0)
        return tree.unflatten(directions), SmallMoments(updates, tree.unflatten(mus), tree.unflatten(nus))

    return optax.GradientTransformation(init, update)


def draw(words: jax.Array, path: str, shape: tuple[int, ...], *, start: jax.Array | int = 0) -> jax.Array:
    """32 bits per number of a parameter: its place in the array, mixed with two random words and the parameter's path.

    `start` is the place of the first one, where the array is one layer of the parameter.

    Rounding asks for less than what jax.random gives, at a fifth of its work; and every device makes its own shard's.
    """
    place = jnp.full(shape, start, jnp.uint32)
    for dimension in range(len(shape)):
        stride = math.prod(shape[dimension + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, dimension) * jnp.uint32(stride)
    own = _mix(words[0] ^ jnp.uint32(zlib.crc32(path.encode())))
    return _mix(_mix(place + own) ^ words[1])


def _mix(x: jax.Array) -> jax.Array:
    """Every bit of the result depends on every bit of x: the last step of MurmurHash3 (A. Appleby, public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


# --- a number in two bytes, or in one ---------------------------------------------------------------------------------


def store(x: jax.Array, bits: jax.Array | int, kind: str, *, signed: bool) -> Any:
    """The numbers as "bfloat16" or "int8" (Octets), rounded by 16 random bits each; 0 rounds towards zero."""
    bits = jnp.broadcast_to(jnp.asarray(bits, jnp.uint32), x.shape)
    return to_bfloat16(x, bits) if kind == "bfloat16" else to_octets(x, bits, signed=signed)


def zeros(shape: tuple[int, ...], kind: str, *, signed: bool) -> Any:
    """What `store` makes of zeros; written out, as XLA would otherwise compute it, slowly, while it compiles."""
    if kind == "bfloat16":
        return jnp.zeros(shape, jnp.bfloat16)
    blocks = (*shape[:-1], (shape[-1] // block(shape[-1])) if shape else 1)
    return Octets(jnp.zeros(shape, jnp.int8 if signed else jnp.uint8), jnp.zeros(blocks, jnp.int8))


def load(kept: Any) -> jax.Array:
    """What `store` kept, as float32."""
    return from_octets(kept) if isinstance(kept, Octets) else kept.astype(jnp.float32)


def to_bfloat16(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Float32 to one of the two bfloat16 around it, the nearer the likelier: 16 random bits carry into those that stay."""
    pattern = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) + bits
    return jax.lax.bitcast_convert_type(pattern & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def to_octets(x: jax.Array, bits: jax.Array, *, signed: bool) -> Octets:
    """Float32 to one of the two codes around it, the nearer the likelier; unbiased but at the lower end of the scale.

    A number below the smallest code becomes that or 0 where it has a sign; where it has none, it becomes the smallest
    code: a second moment of 0 beside a first moment that is not would be a leap.
    """
    top = 127 if signed else 255
    x_KS, share_KS = _blocks(x.astype(jnp.float32)), _blocks(bits.astype(jnp.float32) / 2**16)
    exponents_K = _exponent(jnp.abs(x_KS).max(-1, keepdims=True))
    size_KS = jnp.abs(x_KS) * _power(-exponents_K)
    below_KS = jnp.floor(top + PER_OCTAVE * jnp.log2(jnp.maximum(size_KS, 2.0**-100))).clip(1, top - 1)
    codes_KS = below_KS + (share_KS < (size_KS / _size(below_KS, top) - 1) / (STEP - 1))
    if signed:
        smallest = STEP ** (1 - top)
        codes_KS = jnp.where(size_KS < smallest, share_KS < size_KS / smallest, codes_KS) * jnp.sign(x_KS)
    else:
        codes_KS = jnp.where(size_KS > 0, codes_KS, 0)
    codes = codes_KS.reshape(x.shape).astype(jnp.int8 if signed else jnp.uint8)
    return Octets(codes, exponents_K.reshape(*x.shape[:-1], -1).astype(jnp.int8))


def from_octets(kept: Octets) -> jax.Array:
    """The float32 numbers that the codes stand for."""
    top = 127 if kept.codes.dtype == jnp.int8 else 255
    codes_KS = _blocks(kept.codes.astype(jnp.float32))
    size_KS = jnp.where(codes_KS == 0, 0.0, jnp.sign(codes_KS) * _size(jnp.abs(codes_KS), top))
    return (size_KS * _power(kept.exponents.astype(jnp.int32)[..., None])).reshape(kept.codes.shape)


def _size(codes: jax.Array, top: int) -> jax.Array:
    return jnp.exp2((codes - top) / PER_OCTAVE)


def _exponent(x: jax.Array) -> jax.Array:
    """The smallest e with x < 2^e, read from the bits of the float32."""
    biased = jax.lax.bitcast_convert_type(x, jnp.int32) >> 23  # no sign: x is never negative
    return (biased - 126).clip(*EXPONENTS)


def _power(exponent: jax.Array) -> jax.Array:
    """2^exponent, exactly."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _blocks(x: jax.Array) -> jax.Array:
    """(..., n) -> (..., K, S): blocks lie in the last dimension, so that a shard of a parameter has its own."""
    size = block(x.shape[-1] if x.ndim else 1)
    return x.reshape(*x.shape[:-1], -1, size)


def block(length: int) -> int:
    """Numbers per block of a dimension of this length: the largest divisor up to BLOCK, if it is worth a byte."""
    largest = max(size for size in range(1, min(length, BLOCK) + 1) if length % size == 0)
    return largest if largest >= min(SMALLEST_BLOCK, length) else length
