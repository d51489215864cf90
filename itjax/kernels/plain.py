"""Attention in plain XLA: the definition, and blocks of queries as CPUs like them.

B rows, T positions, Q of them with a query, N query heads, K key/value heads, G = N / K queries per key/value head,
H head size, S keys that a block of queries may see.
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from itjax.kernels.case import ATTENDED, HIDDEN, Case, Scores, Segments, Stripes, sees_BQT

BLOCK = 64  # fewest queries in a block: 64 to 128 is fastest on CPUs
MOST_BLOCKS = 16  # longer rows get longer blocks, so that programs stay small


def refuses(case: Case) -> str:
    """Why this cannot be done; it always can."""
    del case
    return ""


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
    q_BQNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments: Segments,
    scores: Scores,
    sinks_N: jax.Array | None = None,
    stripes: Stripes = Stripes(),  # noqa: B008 (a tuple of numbers)
    *,
    platform: str = "cpu",
) -> jax.Array:
    """The definition, plainly: all scores, softmax in float32. Others are tested against it."""
    del platform  # the same everywhere
    B, Q, N, _ = q_BQNH.shape
    T, num_queries_per_key = k_BTKH.shape[1], N // k_BTKH.shape[2]
    q_BQNH, k_BTNH, v_BTNH = (
        x.astype(jnp.float32)
        for x in (
            q_BQNH,
            jnp.repeat(k_BTKH, num_queries_per_key, axis=2),
            jnp.repeat(v_BTKH, num_queries_per_key, axis=2),
        )
    )
    scores_BNQT = capped(jnp.einsum("BQNH,BTNH->BNQT", q_BQNH, k_BTNH) * scores.scale, scores.softcap)
    scores_BNQT = jnp.where(sees_BQT(segments, stripes.places_Q(Q), window=scores.window)[:, None], scores_BNQT, HIDDEN)
    if sinks_N is not None:
        sinks_BNQ1 = jnp.broadcast_to(sinks_N.astype(jnp.float32)[None, :, None, None], (B, N, Q, 1))
        scores_BNQT = jnp.concatenate([scores_BNQT, sinks_BNQ1], axis=-1)
    probabilities_BNQT = jax.nn.softmax(scores_BNQT, axis=-1)[..., :T]
    o_BQNH = jnp.einsum("BNQT,BTNH->BQNH", probabilities_BNQT, v_BTNH).astype(v_BTKH.dtype)
    return checkpoint_name(o_BQNH, ATTENDED)


def blockwise(
    q_BQNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments: Segments,
    scores: Scores,
    sinks_N: jax.Array | None = None,
    stripes: Stripes = Stripes(),  # noqa: B008 (a tuple of numbers)
    *,
    platform: str = "cpu",
) -> jax.Array:
    """Blocks of queries against the keys that some query of the block may see: half the scores, fewer with a window.

    The matrices are as CPUs like them. Whatever part of the stripes is given, a block is given the same keys.
    """
    del platform  # possible everywhere
    count, T = q_BQNH.shape[1], k_BTKH.shape[1]
    block = max(BLOCK, -(-count // (MOST_BLOCKS * BLOCK)) * BLOCK)
    q_BKGQH = _to_heads(q_BQNH, k_BTKH.shape[2])
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    places_Q = stripes.places_Q(count)
    parts = []
    for start in range(0, count, block):
        stop = min(start + block, count)
        first, last = _reach(start, stop, stripes, scores.window)
        last = min(last, T)
        here = Segments(segments.queries_BQ[:, start:stop], segments.keys_BT[:, first:last])
        sees_BQS = sees_BQT(here, places_Q[start:stop], first=first, window=scores.window)
        q_part, k_part, v_part = q_BKGQH[:, :, :, start:stop], k_BKTH[:, :, first:last], v_BKTH[:, :, first:last]
        parts.append(_read(q_part, k_part, v_part, sees_BQS, scores, sinks_N))
    return checkpoint_name(_to_positions(jnp.concatenate(parts, axis=3)), ATTENDED)


def _reach(start: int, stop: int, stripes: Stripes, window: int) -> tuple[int, int]:
    """The keys that queries from `start` to before `stop` may see, whichever part of the stripes they are."""
    size = stripes.size if stripes.parts > 1 else 1
    lowest = start // size * stripes.parts * size + (start % size if stripes.parts == 1 else 0)
    highest = (stop - 1) // size * stripes.parts * size + (stripes.parts - 1) * size + (stop - 1) % size
    return (max(0, lowest - window + 1) if window else 0), highest + 1


def capped(scores: jax.Array, cap: float) -> jax.Array:
    return cap * jnp.tanh(scores / cap) if cap else scores


def scales_queries(dtype: jnp.dtype, scale: float) -> bool:
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
    early, late = (scores.scale, 1.0) if scales_queries(q_BKGTH.dtype, scores.scale) else (1.0, scores.scale)
    q_BKQH = q_BKGTH.reshape(B, K, G * T, H) * early
    scores_BKQS = jnp.einsum("BKQH,BKSH->BKQS", q_BKQH, k_BKSH, preferred_element_type=jnp.float32)
    scores_BKGTS = capped(scores_BKQS.reshape(B, K, G, T, S) * late, scores.softcap)
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
