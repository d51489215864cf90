"""Attention within packed examples: a position sees itself and what came before it in its own segment.

B rows, T queries, S keys, N query heads, K key/value heads, G = N / K queries per key/value head, H head size.
Segment 0 is padding: it sees only padding, so its numbers stay finite and nobody else's depend on them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from itjax.base.freeze import nearest

HIDDEN = -1e30  # a score that is not seen; finite, so that a query which sees nothing gives numbers and not NaN
BLOCK = 64  # fewest queries in a block: 64 to 128 is fastest on CPUs
MOST_BLOCKS = 16  # longer rows get longer blocks, so that programs stay small


def attend(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, *, implementation: str
) -> jax.Array:
    """Causal attention within equal segments: what each head reads, (B, T, N, H) in the type of the queries.

    segments   1 1 2 0        sees   x . . .
                                     x x . .
                                     . . x .
                                     . . . x
    """
    return IMPLEMENTATIONS[implementation](q_BTNH, k_BTKH, v_BTKH, segments_BT)


def read(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, sees_BTS: jax.Array) -> jax.Array:
    """Softmax attention of any queries over any keys, with heads before positions as in a cache of keys and values."""
    return _to_positions(_read(_to_heads(q_BTNH, k_BKSH.shape[1]), k_BKSH, v_BKSH, sees_BTS))


def reference(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """The definition, plainly: all scores, softmax in float32. Others are tested against it."""
    num_queries_per_key = q_BTNH.shape[2] // k_BTKH.shape[2]
    q_BTNH, k_BTNH, v_BTNH = (
        x.astype(jnp.float32)
        for x in (
            q_BTNH,
            jnp.repeat(k_BTKH, num_queries_per_key, axis=2),
            jnp.repeat(v_BTKH, num_queries_per_key, axis=2),
        )
    )
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH) / q_BTNH.shape[-1] ** 0.5
    sees_BTS = _sees(segments_BT, 0, segments_BT.shape[1])
    probabilities_BNTS = jax.nn.softmax(jnp.where(sees_BTS[:, None], scores_BNTS, HIDDEN), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", probabilities_BNTS, v_BTNH).astype(v_BTKH.dtype)


def blockwise(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Blocks of queries against their causal prefix only: half the scores, and matrices as CPUs like them."""
    length = q_BTNH.shape[1]
    block = max(BLOCK, -(-length // (MOST_BLOCKS * BLOCK)) * BLOCK)
    q_BKGTH = _to_heads(q_BTNH, k_BTKH.shape[2])
    k_BKSH, v_BKSH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    parts = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        sees_BTS = _sees(segments_BT, start, stop)
        parts.append(_read(q_BKGTH[:, :, :, start:stop], k_BKSH[:, :, :stop], v_BKSH[:, :, :stop], sees_BTS))
    return _to_positions(jnp.concatenate(parts, axis=3))


IMPLEMENTATIONS: dict[str, Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]] = {
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


def _sees(segments_BT: jax.Array, start: int, stop: int) -> jax.Array:
    """Which of the first `stop` positions each query in start:stop sees: (B, stop - start, stop)."""
    same_BTS = segments_BT[:, start:stop, None] == segments_BT[:, None, :stop]
    causal_TS = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :]
    return same_BTS & causal_TS[None]


def _to_heads(q_BTNH: jax.Array, kv_heads: int) -> jax.Array:
    """Queries grouped by the key/value head they read, scaled: (B, K, G, T, H)."""
    B, T, N, H = q_BTNH.shape
    return (q_BTNH * H**-0.5).reshape(B, T, kv_heads, N // kv_heads, H).transpose(0, 2, 3, 1, 4)


def _to_positions(o_BKGTH: jax.Array) -> jax.Array:
    B, K, G, T, H = o_BKGTH.shape
    return o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _read(q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, sees_BTS: jax.Array) -> jax.Array:
    """Grouped heads share one product with their keys; the division comes after the values, where rows are short."""
    B, K, G, T, H = q_BKGTH.shape
    S = k_BKSH.shape[2]
    q_BKQH = q_BKGTH.reshape(B, K, G * T, H)
    scores_BKQS = jnp.einsum("BKQH,BKSH->BKQS", q_BKQH, k_BKSH, preferred_element_type=jnp.float32)
    # Added and not selected: the backward pass needs no second selection, hidden scores have probability 0 there anyway.
    hidden_B11TS = jnp.where(sees_BTS, 0.0, HIDDEN)[:, None, None]
    scores_BKGTS = scores_BKQS.reshape(B, K, G, T, S) + hidden_B11TS
    highest_BKGT1 = jax.lax.stop_gradient(scores_BKGTS.max(axis=-1, keepdims=True))
    exp_BKGTS = jnp.exp(scores_BKGTS - highest_BKGT1)
    total_BKGT1 = exp_BKGTS.sum(axis=-1, keepdims=True)
    exp_BKQS = exp_BKGTS.reshape(B, K, G * T, S).astype(v_BKSH.dtype)
    o_BKQH = jnp.einsum("BKQS,BKSH->BKQH", exp_BKQS, v_BKSH, preferred_element_type=jnp.float32)
    return (o_BKQH.reshape(B, K, G, T, H) / total_BKGT1).astype(v_BKSH.dtype)
