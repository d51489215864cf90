"""Attention within packed examples: a position sees itself and what came before it in its own segment.

B rows, T queries, S keys, N query heads, K key/value heads, G = N / K queries per key/value head, H head size.
Segment 0 is padding: it sees only padding, so its numbers stay finite and nobody else's depend on them.

A head may have a sink (https://arxiv.org/abs/2309.17453, learned as in GPT-OSS): one more score in the sum that
probabilities are divided by. It gives no value, so a head can read less than one whole position.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from itjax.base.freeze import nearest

HIDDEN = -1e30  # a score that is not seen; finite, so that a query which sees nothing gives numbers and not NaN
BLOCK = 64  # fewest queries in a block: 64 to 128 is fastest on CPUs
MOST_BLOCKS = 16  # longer rows get longer blocks, so that programs stay small


class Scores(NamedTuple):
    """How a query scores the keys it sees, and how far back it sees."""

    scale: float  # what products of queries and keys are multiplied with
    softcap: float = 0.0  # c: the scaled score s becomes c·tanh(s / c); 0: it stays
    window: int = 0  # a position sees itself and this many less one before it; 0: everything before it


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    implementation: str,
    scores: Scores,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """Causal attention within equal segments: what each head reads, (B, T, N, H) in the type of the values.

    segments   1 1 1 2 0        sees   x . . . .        with a window of 2   x . . . .
                                       x x . . .                             x x . . .
                                       x x x . .                             . x x . .
                                       . . . x .                             . . . x .
                                       . . . . x                             . . . . x
    """
    return IMPLEMENTATIONS[implementation](q_BTNH, k_BTKH, v_BTKH, segments_BT, scores, sinks_N)


def read(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    sees_BTS: jax.Array,
    *,
    scores: Scores,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention of any queries over any keys, with heads before positions as in a cache of keys and values.

    `sees_BTS` is all that decides what is seen: a window is already in it.
    """
    return _to_positions(_read(_to_heads(q_BTNH, k_BKSH.shape[1]), k_BKSH, v_BKSH, sees_BTS, scores, sinks_N))


def reference(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    scores: Scores,
    sinks_N: jax.Array | None,
) -> jax.Array:
    """The definition, plainly: all scores, softmax in float32. Others are tested against it."""
    B, T, N, _ = q_BTNH.shape
    num_queries_per_key = N // k_BTKH.shape[2]
    q_BTNH, k_BTNH, v_BTNH = (
        x.astype(jnp.float32)
        for x in (
            q_BTNH,
            jnp.repeat(k_BTKH, num_queries_per_key, axis=2),
            jnp.repeat(v_BTKH, num_queries_per_key, axis=2),
        )
    )
    scores_BNTS = _capped(jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH) * scores.scale, scores.softcap)
    scores_BNTS = jnp.where(_sees(segments_BT, range(T), range(T), scores.window)[:, None], scores_BNTS, HIDDEN)
    if sinks_N is not None:
        sinks_BNT1 = jnp.broadcast_to(sinks_N.astype(jnp.float32)[None, :, None, None], (B, N, T, 1))
        scores_BNTS = jnp.concatenate([scores_BNTS, sinks_BNT1], axis=-1)
    probabilities_BNTS = jax.nn.softmax(scores_BNTS, axis=-1)[..., :T]
    return jnp.einsum("BNTS,BSNH->BTNH", probabilities_BNTS, v_BTNH).astype(v_BTKH.dtype)


def blockwise(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    scores: Scores,
    sinks_N: jax.Array | None,
) -> jax.Array:
    """Blocks of queries against the keys that some query of the block may see: half the scores, fewer with a window.

    The matrices are as CPUs like them.
    """
    length = q_BTNH.shape[1]
    block = max(BLOCK, -(-length // (MOST_BLOCKS * BLOCK)) * BLOCK)
    q_BKGTH = _to_heads(q_BTNH, k_BTKH.shape[2])
    k_BKSH, v_BKSH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    parts = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first = max(0, start - scores.window + 1) if scores.window else 0
        sees_BTS = _sees(segments_BT, range(start, stop), range(first, stop), scores.window)
        q_part, k_part, v_part = q_BKGTH[:, :, :, start:stop], k_BKSH[:, :, first:stop], v_BKSH[:, :, first:stop]
        parts.append(_read(q_part, k_part, v_part, sees_BTS, scores, sinks_N))
    return _to_positions(jnp.concatenate(parts, axis=3))


IMPLEMENTATIONS: dict[
    str, Callable[[jax.Array, jax.Array, jax.Array, jax.Array, Scores, jax.Array | None], jax.Array]
] = {
    "reference": reference,
    "blockwise": blockwise,
}


def available(platform: str) -> tuple[str, ...]:
    """Names of the implementations that run on a platform ("cpu", "gpu", "tpu"), best first."""
    del platform  # both are plain XLA
    return ("blockwise", "reference")


def choose(name: str, *, platform: str) -> str:
    """The implementation behind a name from a config; "auto" is the best one of the platform."""
    names = available(platform)
    if name == "auto":
        return names[0]
    if name not in names:
        known = ("auto", *names)
        raise ValueError(
            f"attention: {name!r} is unknown on {platform};{nearest(name, known)} Known: {', '.join(known)}"
        )
    return name


def _sees(segments_BT: jax.Array, queries: range, keys: range, window: int) -> jax.Array:
    """Which of the keys' positions each of the queries' positions sees: (B, queries, keys)."""
    same_BTS = segments_BT[:, queries.start : queries.stop, None] == segments_BT[:, None, keys.start : keys.stop]
    back_TS = jnp.arange(queries.start, queries.stop)[:, None] - jnp.arange(keys.start, keys.stop)[None, :]
    near_TS = (back_TS >= 0) & (back_TS < window) if window else back_TS >= 0
    return same_BTS & near_TS[None]


def _capped(scores: jax.Array, cap: float) -> jax.Array:
    return cap * jnp.tanh(scores / cap) if cap else scores


def _scales_queries(dtype: jnp.dtype, scale: float) -> bool:
    """Whether queries are scaled, which takes CPUs a third less time than scaling scores, or is rounding them too dear.

    In bfloat16 it doubles the error of what heads of 128 read, unless the scale is a power of 2.
    """
    return jnp.finfo(dtype).bits >= 32 or math.frexp(scale)[0] == 0.5


def _to_heads(q_BTNH: jax.Array, kv_heads: int) -> jax.Array:
    """Queries grouped by the key/value head they read: (B, K, G, T, H)."""
    B, T, N, H = q_BTNH.shape
    return q_BTNH.reshape(B, T, kv_heads, N // kv_heads, H).transpose(0, 2, 3, 1, 4)


def _to_positions(o_BKGTH: jax.Array) -> jax.Array:
    B, K, G, T, H = o_BKGTH.shape
    return o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _read(
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    sees_BTS: jax.Array,
    scores: Scores,
    sinks_N: jax.Array | None,
) -> jax.Array:
    """Grouped heads share one product with their keys; the division comes after the values, where rows are short."""
    B, K, G, T, H = q_BKGTH.shape
    S = k_BKSH.shape[2]
    early, late = (scores.scale, 1.0) if _scales_queries(q_BKGTH.dtype, scores.scale) else (1.0, scores.scale)
    q_BKQH = q_BKGTH.reshape(B, K, G * T, H) * early
    scores_BKQS = jnp.einsum("BKQH,BKSH->BKQS", q_BKQH, k_BKSH, preferred_element_type=jnp.float32)
    scores_BKGTS = _capped(scores_BKQS.reshape(B, K, G, T, S) * late, scores.softcap)
    # Added and not selected: the backward pass needs no second selection, hidden scores have probability 0 there anyway.
    scores_BKGTS += jnp.where(sees_BTS, 0.0, HIDDEN)[:, None, None]
    highest_BKGT1 = jax.lax.stop_gradient(scores_BKGTS.max(axis=-1, keepdims=True))
    if sinks_N is not None:
        sinks_1KG11 = sinks_N.astype(jnp.float32).reshape(1, K, G, 1, 1)
        highest_BKGT1 = jnp.maximum(highest_BKGT1, jax.lax.stop_gradient(sinks_1KG11))
    exp_BKGTS = jnp.exp(scores_BKGTS - highest_BKGT1)
    total_BKGT1 = exp_BKGTS.sum(axis=-1, keepdims=True)
    if sinks_N is not None:
        total_BKGT1 += jnp.exp(sinks_1KG11 - highest_BKGT1)
    exp_BKQS = exp_BKGTS.reshape(B, K, G * T, S).astype(v_BKSH.dtype)
    o_BKQH = jnp.einsum("BKQS,BKSH->BKQH", exp_BKQS, v_BKSH, preferred_element_type=jnp.float32)
    return (o_BKQH.reshape(B, K, G, T, H) / total_BKGT1).astype(v_BKSH.dtype)
