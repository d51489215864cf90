"""Rotary positions: each pair of a head's numbers is turned by an angle that grows with the position.

B rows, T positions, N heads, H head size, P pairs that are turned (H / 2, or fewer). How fast each pair turns is worked
out here in float64 on the host: it depends on the config and the row's length alone, so it is a constant of the program.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from itjax.base.freeze import nearest
from itjax.models.config import ROPE_SCALINGS, Rope


class Turns(NamedTuple):
    """Cosine and sine of each position's angles, float32, times the factor that stretched contexts are given."""

    cos_BTP: jax.Array
    sin_BTP: jax.Array


def angles(positions_BT: jax.Array, rope: Rope, *, head_size: int, length: int) -> Turns:
    """How far each position turns each pair. `length` is that of the whole row, or of the cache.

    Angles are float32 products, as in the code that published models were trained and are compared with
    (transformers: `position_ids.float() * inv_freq.float()`). At position p they are off by up to p·6e-8 radians, 0.008
    at 131072, and theirs by p·7e-8: speeds are rounded once here and computed in float32 there.
    """
    frequencies_P, factor = frequencies(rope, head_size=head_size, length=length)
    angles_BTP = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(frequencies_P, jnp.float32)[None, None]
    return Turns(jnp.cos(angles_BTP) * factor, jnp.sin(angles_BTP) * factor)


def turn(x_BTNH: jax.Array, turns: Turns) -> jax.Array:
    """Heads turned by their position, computed in float32; numbers after the first 2·P of a head stay as they are.

    A pair is one number of the first half of the turned part and its sibling in the second:

    head       a0 a1 b0 b1 | c0 c1
    turned     a0·cos0 - b0·sin0, a1·cos1 - b1·sin1, b0·cos0 + a0·sin0, b1·cos1 + a1·sin1 | c0, c1
    """
    P = turns.cos_BTP.shape[-1]
    cos_BT1P, sin_BT1P = turns.cos_BTP[:, :, None], turns.sin_BTP[:, :, None]
    a_BTNP, b_BTNP = x_BTNH[..., :P].astype(jnp.float32), x_BTNH[..., P : 2 * P].astype(jnp.float32)
    turned = (a_BTNP * cos_BT1P - b_BTNP * sin_BT1P, b_BTNP * cos_BT1P + a_BTNP * sin_BT1P)
    return jnp.concatenate([*(part.astype(x_BTNH.dtype) for part in turned), x_BTNH[..., 2 * P :]], axis=-1)


def frequencies(rope: Rope, *, head_size: int, length: int) -> tuple[np.ndarray, float]:
    """Radians per position of each turned pair, (P,) float64, and the factor of cosine and sine.

    Pair p turns by theta^(-p / P) (RoFormer, https://arxiv.org/abs/2104.09864), then as `rope.scaling` changes it.
    """
    size = int(head_size * rope.share)
    if size < 2 or size % 2:
        raise ValueError(f"rope.share: {rope.share} of {head_size} are {size} numbers; they must make pairs")
    if rope.scaling not in ROPE_SCALINGS:
        known = ", ".join(ROPE_SCALINGS)
        raise ValueError(
            f"rope.scaling: {rope.scaling!r} is unknown;{nearest(rope.scaling, ROPE_SCALINGS)} Known: {known}"
        )
    if rope.scaling in NEED_ORIGINAL and rope.original_length < 1:
        raise ValueError(f"rope.original_length: {rope.original_length}; {rope.scaling} needs the context it stretches")
    return SCALINGS[rope.scaling](rope, rope.theta ** -(np.arange(0, size, 2) / size), length)


def _none(rope: Rope, plain_P: np.ndarray, length: int) -> tuple[np.ndarray, float]:
    return plain_P, 1.0


def _linear(rope: Rope, plain_P: np.ndarray, length: int) -> tuple[np.ndarray, float]:
    """Every pair is slowed: positions are squeezed into the context that was trained (arXiv 2306.15595)."""
    return plain_P / rope.factor, 1.0


def _llama3(rope: Rope, plain_P: np.ndarray, length: int) -> tuple[np.ndarray, float]:
    """Slow pairs are slowed, fast ones left alone, those between mixed (`apply_scaling` in Meta's llama-models).

    https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py
    """
    turns_P = rope.original_length * plain_P / (2 * math.pi)
    left_alone_P = np.clip((turns_P - rope.low) / (rope.high - rope.low), 0.0, 1.0)
    return _mix(plain_P / rope.factor, plain_P, left_alone_P), 1.0


def _yarn(rope: Rope, plain_P: np.ndarray, length: int) -> tuple[np.ndarray, float]:
    """The same with a ramp over the numbers of pairs, and larger scores (YaRN, https://arxiv.org/abs/2309.00071)."""
    num_pairs = len(plain_P)

    def pair_that_turns(times: float) -> float:
        """The pair, as a fraction, that turns so many times within the original context."""
        return num_pairs * math.log(rope.original_length / (times * 2 * math.pi)) / math.log(rope.theta)

    first, last = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * num_pairs - 1)
    slowed_P = np.clip((np.arange(num_pairs) - first) / ((last - first) or 1e-3), 0.0, 1.0)
    return _mix(plain_P, plain_P / rope.factor, slowed_P), _yarn_factor(rope)


def _yarn_factor(rope: Rope) -> float:
    """0.1·ln(factor) + 1, or the ratio of two such numbers where a model gives both weights (DeepSeek-V2)."""

    def larger(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return larger(rope.mscale) / larger(rope.mscale_all_dim)
    return larger(1.0)


def _longrope(rope: Rope, plain_P: np.ndarray, length: int) -> tuple[np.ndarray, float]:
    """Each pair has its own divisor, one for short and one for long rows (LongRoPE, https://arxiv.org/abs/2402.13753).

    The factor of cosine and sine is that of Phi-3, and is the same for both. A cache may have to be long for a short row
    to be continued: what was turned with one set of divisors cannot be read with the other.
    """
    name, divisors = ("long", rope.long) if length > rope.original_length else ("short", rope.short)
    if len(divisors) != len(plain_P):
        raise ValueError(f"rope.{name}: {len(divisors)} divisors for {len(plain_P)} pairs of a head; give one for each")
    factor = rope.attention_factor
    if factor is None:
        factor = math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_length)) if rope.factor > 1 else 1.0
    return plain_P / np.asarray(divisors), factor


def _mix(a_P: np.ndarray, b_P: np.ndarray, share_of_b_P: np.ndarray) -> np.ndarray:
    return a_P * (1 - share_of_b_P) + b_P * share_of_b_P


SCALINGS: dict[str, Callable[[Rope, np.ndarray, int], tuple[np.ndarray, float]]] = {
    "none": _none,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
NEED_ORIGINAL = ("llama3", "yarn", "longrope")
