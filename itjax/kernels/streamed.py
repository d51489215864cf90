"""Attention in plain XLA that never has the scores of a whole row: blocks of queries against blocks of keys.

A block of queries keeps a running maximum, sum and result over the blocks of keys that it meets
(https://arxiv.org/abs/2307.08691). It begins and ends with the first and last block of keys that one of its queries may
see: what is behind the window or in other documents is never computed, however long the row is. Which blocks those are is
known as soon as segments are, so the loop is as long as they say, and one program serves all. The backward pass computes
probabilities again, from what they were divided by.

B rows, T positions, Q of them with a query, N query heads, K key/value heads, G = N / K queries per key/value head, H head
size. Rows are taken R at a time, in P passes. Of a row there are C blocks of I queries and M blocks of J keys; over all
passes U = P·C blocks of queries and V = P·M blocks of keys. X = G·I.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from itjax.kernels.case import ATTENDED, HIDDEN, Case, Scores, Segments, Stripes
from itjax.kernels.plain import capped, scales_queries

UNSEEN = HIDDEN / 2  # where maxima begin: above what is hidden, so that hidden scores have probability 0 at any time
LONG = 1024  # positions in a row
LAST = jnp.iinfo(jnp.int32).max


class Blocks(NamedTuple):
    """How much is computed at a time."""

    queries: int
    keys: int
    by_row: (
        bool  # one row after the other, each with the blocks that it needs; else all rows, with those that any needs
    )


# The heads of one row keep a CPU busy. An accelerator takes all rows at a time, in blocks that are worth the start of some
# programs. Little is lost by that: in packed rows a block of queries ends with the same block of keys in all of them, and
# begins with the one that the longest document needs.
BLOCKS = {"cpu": Blocks(64, 128, True), "gpu": Blocks(512, 512, False), "tpu": Blocks(512, 512, False)}


def refuses(case: Case) -> str:
    """Why this cannot be done; it always can."""
    del case
    return ""


def suits(case: Case) -> bool:
    """Where it is faster than `plain.blockwise`, or small where that is large.

    That one computes half of all pairs of a row and fewer with a window, as a program of up to 16 blocks that keeps all
    probabilities; here documents decide. On a CPU both take as long for rows of 512 positions; for 1024 this takes less even
    if a row is one document, because the block in work stays in its cache (`python -m benchmarks.run --suite attention`).
    Accelerators have it for its program and its memory.
    """
    return case.platform != "cpu" or case.length >= LONG


def attend(
    q_BQNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments: Segments,
    scores: Scores,
    sinks_N: jax.Array | None = None,
    stripes: Stripes = Stripes(),  # noqa: B008 (a tuple of numbers)
    *,
    platform: str,
) -> jax.Array:
    """What each head reads. Time is that of the blocks which documents and windows touch, memory grows with T."""
    return in_blocks(q_BQNH, k_BTKH, v_BTKH, segments, scores, sinks_N, stripes, blocks=BLOCKS[platform])


def in_blocks(
    q_BQNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments: Segments,
    scores: Scores,
    sinks_N: jax.Array | None = None,
    stripes: Stripes = Stripes(),  # noqa: B008 (a tuple of numbers)
    *,
    blocks: Blocks,
) -> jax.Array:
    """`attend`, in blocks of any size."""
    (B, Q, N, _), T, K = q_BQNH.shape, k_BTKH.shape[1], k_BTKH.shape[2]
    blocks = blocks._replace(queries=min(blocks.queries, Q), keys=min(blocks.keys, T))
    R = 1 if blocks.by_row else B
    early, late = (scores.scale, 1.0) if scales_queries(q_BQNH.dtype, scores.scale) else (1.0, scores.scale)
    arrays = (
        _by_heads(_cut(q_BQNH * early, R, blocks.queries), K),
        _cut(k_BTKH, R, blocks.keys).swapaxes(2, 3),
        _cut(v_BTKH, R, blocks.keys).swapaxes(2, 3),
        sinks_N,
        _sights(segments, stripes.places_Q(Q), R, blocks, scores.window),
        _keys(segments.keys_BT, R, blocks),
    )
    o_URKXH = _read(*_alike(arrays), _Settings(late, scores.softcap, scores.window))
    return _together(o_URKXH, (B, Q, N))


def reach(segments: Segments, places_Q: jax.Array, blocks: Blocks, *, window: int) -> tuple[jax.Array, jax.Array]:
    """(first, stop), (P, C) each: which blocks of keys a block of queries meets. It sees nothing of any other.

    segments   1 1 1 2 | 2 2 2 2 | 2 3 0 0      blocks of 4      first   0 0 0      stop   1 2 3

    A block of queries and one of keys meet where their ranges of places and of segments do. Padding is taken for the last
    segment, which it is in packed rows: with segments in any other order ranges are wider, and nothing is missed.
    """
    low_BC, high_BC = _range(_in_order(segments.queries_BQ), blocks.queries)
    low_BM, high_BM = _range(_in_order(segments.keys_BT), blocks.keys)
    earliest_1C, latest_1C = _range(places_Q[None], blocks.queries)
    start_1M = blocks.keys * jnp.arange(low_BM.shape[1])[None]
    near_CM = start_1M <= latest_1C.T
    if window:
        near_CM &= start_1M + blocks.keys > earliest_1C.T - window + 1
    meets_BCM = (low_BC[:, :, None] <= high_BM[:, None]) & (low_BM[:, None] <= high_BC[:, :, None]) & near_CM[None]
    meets_PCM = meets_BCM if blocks.by_row else meets_BCM.any(axis=0, keepdims=True)
    first_PC = meets_PCM.argmax(axis=2)
    stop_PC = meets_PCM.shape[2] - meets_PCM[:, :, ::-1].argmax(axis=2)
    return first_PC, jnp.where(meets_PCM.any(axis=2), stop_PC, first_PC)


def _in_order(segments_BT: jax.Array) -> jax.Array:
    return jnp.where(segments_BT == 0, LAST, segments_BT)


def _range(x_BT: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """The lowest and the highest number of each block, (B, blocks)."""
    x_BCI = _whole_blocks(x_BT, block).reshape(x_BT.shape[0], -1, block)
    return x_BCI.min(axis=2), x_BCI.max(axis=2)


def _whole_blocks(x_BT_: jax.Array, block: int) -> jax.Array:
    """More of the last position, up to a multiple of the block: queries are cut off again, keys come after all queries."""
    return jnp.pad(x_BT_, [(0, 0), (0, -x_BT_.shape[1] % block), *[(0, 0)] * (x_BT_.ndim - 2)], mode="edge")


def _cut(x_BT_: jax.Array, rows: int, block: int) -> jax.Array:
    """(B, T, ...) -> (blocks of all passes, R, positions of a block, ...)."""
    x_BT_ = _whole_blocks(x_BT_, block)
    x_PRCI_ = x_BT_.reshape(-1, rows, x_BT_.shape[1] // block, block, *x_BT_.shape[2:])
    return x_PRCI_.swapaxes(1, 2).reshape(-1, rows, block, *x_BT_.shape[2:])


def _by_heads(q_URINH: jax.Array, kv_heads: int) -> jax.Array:
    """Queries whose heads read the same keys are rows of one matrix: (U, R, K, X, H)."""
    U, R, length, N, H = q_URINH.shape
    q_URIKGH = q_URINH.reshape(U, R, length, kv_heads, N // kv_heads, H)
    return q_URIKGH.transpose(0, 1, 3, 4, 2, 5).reshape(U, R, kv_heads, -1, H)


def _together(o_URKXH: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """The inverse of `_cut` and `_by_heads`: (B, Q, N, H)."""
    (B, Q, N), (_, R, K, X, H) = shape, o_URKXH.shape
    o_PCRKGIH = o_URKXH.reshape(B // R, -1, R, K, N // K, X * K // N, H)
    return o_PCRKGIH.transpose(0, 2, 1, 5, 3, 4, 6).reshape(B, -1, N, H)[:, :Q]


class _Sights(NamedTuple):
    """Where blocks of queries are, and which blocks of keys they meet."""

    segments_URI: jax.Array
    places_UI: jax.Array
    first_U: jax.Array
    stop_U: jax.Array


def _sights(segments: Segments, places_Q: jax.Array, rows: int, blocks: Blocks, window: int) -> _Sights:
    first_PC, stop_PC = reach(segments, places_Q, blocks, window=window)
    P, M = len(first_PC), -(-segments.keys_BT.shape[1] // blocks.keys)
    before_P1 = M * jnp.arange(P)[:, None]
    return _Sights(
        _cut(segments.queries_BQ, rows, blocks.queries),
        jnp.tile(_whole_blocks(places_Q[None], blocks.queries).reshape(-1, blocks.queries), (P, 1)),
        (before_P1 + first_PC).reshape(-1),
        (before_P1 + stop_PC).reshape(-1),
    )


class _Keys(NamedTuple):
    """Where blocks of keys are."""

    segments_VRJ: jax.Array
    places_VJ: jax.Array


def _keys(segments_BT: jax.Array, rows: int, blocks: Blocks) -> _Keys:
    segments_VRJ = _cut(segments_BT, rows, blocks.keys)
    P = segments_BT.shape[0] // rows
    return _Keys(segments_VRJ, jnp.tile(jnp.arange(segments_VRJ[:, 0].size // P).reshape(-1, blocks.keys), (P, 1)))


class _Settings(NamedTuple):
    late: float  # what scores are multiplied with: the scale, where queries are not
    softcap: float
    window: int


class _State(NamedTuple):
    """Of a block of queries, after some blocks of keys."""

    highest_RKX1: jax.Array
    total_RKX1: jax.Array
    o_RKXH: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _read(
    q_URKXH: jax.Array,
    k_VRKJH: jax.Array,
    v_VRKJH: jax.Array,
    sinks_N: jax.Array | None,
    sights: _Sights,
    keys: _Keys,
    settings: _Settings,
) -> jax.Array:
    return _forward(q_URKXH, k_VRKJH, v_VRKJH, sinks_N, sights, keys, settings)[0]


def _forward(q_URKXH, k_VRKJH, v_VRKJH, sinks_N, sights, keys, settings):
    def read(_, block):
        q_RKXH, sight = block

        def meet(number, state: _State) -> _State:
            k_RKJH, v_RKJH, those = _block((k_VRKJH, v_VRKJH, keys), number)
            scores_RKXJ = _hide(_scores(q_RKXH, k_RKJH, settings), sight, those, settings.window)
            highest_RKX1 = jnp.maximum(state.highest_RKX1, scores_RKXJ.max(axis=-1, keepdims=True))
            exp_RKXJ = jnp.exp(scores_RKXJ - highest_RKX1)
            less_RKX1 = jnp.exp(state.highest_RKX1 - highest_RKX1)
            more_RKXH = _product("RKXJ,RKJH->RKXH", exp_RKXJ.astype(v_RKJH.dtype), v_RKJH)
            total_RKX1 = state.total_RKX1 * less_RKX1 + exp_RKXJ.sum(axis=-1, keepdims=True)
            return _State(highest_RKX1, total_RKX1, state.o_RKXH * less_RKX1 + more_RKXH)

        end = jax.lax.fori_loop(sight.first_U, sight.stop_U, meet, _start(q_RKXH, sinks_N))
        total_RKX1 = jnp.where(end.total_RKX1 == 0, 1.0, end.total_RKX1)  # of a query that sees nothing
        return None, ((end.o_RKXH / total_RKX1).astype(v_VRKJH.dtype), end.highest_RKX1 + jnp.log(total_RKX1))

    _, left = jax.lax.scan(read, None, (q_URKXH, sights))
    o_URKXH, log_z_URKX1 = (checkpoint_name(x, ATTENDED) for x in left)
    return o_URKXH, (q_URKXH, k_VRKJH, v_VRKJH, sinks_N, sights, keys, o_URKXH, log_z_URKX1)


def _start(q_RKXH: jax.Array, sinks_N: jax.Array | None) -> _State:
    """Before any key: nothing, or the sink, which is in the sum and gives no value."""
    o_RKXH = _zeros(q_RKXH)
    zero_RKX1 = o_RKXH[..., :1]
    if sinks_N is None:
        return _State(zero_RKX1 + UNSEEN, zero_RKX1, o_RKXH)
    sinks_RKX1 = zero_RKX1 + _of_queries(sinks_N, q_RKXH.shape)
    highest_RKX1 = jnp.maximum(UNSEEN, sinks_RKX1)
    return _State(highest_RKX1, jnp.exp(sinks_RKX1 - highest_RKX1), o_RKXH)


def _backward(settings, left, o_grad_URKXH):
    """With p = exp(score - log z) and a = Σ p·(o_grad·v) = o_grad·o, the gradient of a score is p·(o_grad·v - a)."""
    q_URKXH, k_VRKJH, v_VRKJH, sinks_N, sights, keys, o_URKXH, log_z_URKX1 = left
    average_URKX1 = (o_grad_URKXH.astype(jnp.float32) * o_URKXH.astype(jnp.float32)).sum(axis=-1, keepdims=True)

    def read(kv_grads, block):
        q_RKXH, sight, o_grad_RKXH, log_z_RKX1, average_RKX1 = block

        def meet(number, grads):
            q_grad_RKXH, k_grad_VRKJH, v_grad_VRKJH = grads
            k_RKJH, v_RKJH, those = _block((k_VRKJH, v_VRKJH, keys), number)
            scores_RKXJ = _scores(q_RKXH, k_RKJH, settings)
            p_RKXJ = jnp.exp(_hide(scores_RKXJ, sight, those, settings.window) - log_z_RKX1)
            p_grad_RKXJ = _product("RKXH,RKJH->RKXJ", o_grad_RKXH, v_RKJH)
            grad_RKXJ = p_RKXJ * (p_grad_RKXJ - average_RKX1)
            if settings.softcap:
                grad_RKXJ *= 1.0 - jnp.square(scores_RKXJ / settings.softcap)
            grad_RKXJ, p_RKXJ = grad_RKXJ.astype(q_RKXH.dtype), p_RKXJ.astype(o_grad_RKXH.dtype)
            return (
                q_grad_RKXH + _product("RKXJ,RKJH->RKXH", grad_RKXJ, k_RKJH),
                _add(k_grad_VRKJH, number, _product("RKXJ,RKXH->RKJH", grad_RKXJ, q_RKXH)),
                _add(v_grad_VRKJH, number, _product("RKXJ,RKXH->RKJH", p_RKXJ, o_grad_RKXH)),
            )

        q_grad_RKXH, *kv_grads = jax.lax.fori_loop(sight.first_U, sight.stop_U, meet, (_zeros(q_RKXH), *kv_grads))
        return tuple(kv_grads), (settings.late * q_grad_RKXH).astype(q_RKXH.dtype)

    blocks = (q_URKXH, sights, o_grad_URKXH, log_z_URKX1, average_URKX1)
    (k_grad_VRKJH, v_grad_VRKJH), q_grad_URKXH = jax.lax.scan(read, (_zeros(k_VRKJH), _zeros(v_VRKJH)), blocks)
    k_grad_VRKJH = (settings.late * k_grad_VRKJH).astype(k_VRKJH.dtype)
    sinks_grad_N = None if sinks_N is None else _sinks_grad(sinks_N, log_z_URKX1, average_URKX1)
    return q_grad_URKXH, k_grad_VRKJH, v_grad_VRKJH.astype(v_VRKJH.dtype), sinks_grad_N, None, None


_read.defvjp(_forward, _backward)


def _sinks_grad(sinks_N: jax.Array, log_z_URKX1: jax.Array, average_URKX1: jax.Array) -> jax.Array:
    """As of any score, with a value of 0."""
    (U, R, K, X, _), N = log_z_URKX1.shape, len(sinks_N)
    grad_URKX1 = -jnp.exp(_of_queries(sinks_N, (R, K, X))[None] - log_z_URKX1) * average_URKX1
    return grad_URKX1.reshape(U, R, N, X * K // N).sum(axis=(0, 1, 3)).astype(sinks_N.dtype)


def _of_queries(sinks_N: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The sink of each query of a block, (1, K, X, 1)."""
    _, K, X, *_ = shape
    return jnp.repeat(sinks_N.astype(jnp.float32), X * K // len(sinks_N)).reshape(1, K, X, 1)


def _scores(q_RKXH: jax.Array, k_RKJH: jax.Array, settings: _Settings) -> jax.Array:
    return capped(_product("RKXH,RKJH->RKXJ", q_RKXH, k_RKJH) * settings.late, settings.softcap)


def _hide(scores_RKXJ: jax.Array, queries: _Sights, keys: _Keys, window: int) -> jax.Array:
    """Of one block each: the scores, hidden where a query does not see a key (the same as `case.sees_BQT` says)."""
    R, K, X, J = scores_RKXJ.shape
    back_IJ = queries.places_UI[:, None] - keys.places_VJ[None, :]
    near_IJ = (back_IJ >= 0) & (back_IJ < window) if window else back_IJ >= 0
    sees_RIJ = (queries.segments_URI[:, :, None] == keys.segments_VRJ[:, None, :]) & near_IJ[None]
    scores_RKGIJ = scores_RKXJ.reshape(R, K, -1, *sees_RIJ.shape[1:])
    return (scores_RKGIJ + jnp.where(sees_RIJ, 0.0, HIDDEN)[:, None, None]).reshape(R, K, X, J)


def _product(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(form, a, b, preferred_element_type=jnp.float32)


def _block(arrays: Any, number: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), arrays)


def _add(sums: jax.Array, number: jax.Array, more: jax.Array) -> jax.Array:
    """One block of the sums is written, and the others are not copied."""
    return jax.lax.dynamic_update_index_in_dim(sums, _block(sums, number) + more, number, axis=0)


def _zeros(like: jax.Array) -> jax.Array:
    """Sums to begin a loop with: in float32, and varying over the mesh as what is added to them."""
    return _varied(jnp.zeros(like.shape, jnp.float32), _varying(like))


def _alike(arrays: Any) -> Any:
    """All varying over the axes of the mesh that any of them varies over, as what a loop carries has to."""
    axes = _varying(*jax.tree.leaves(arrays))
    return jax.tree.map(lambda x: _varied(x, axes), arrays)


def _varied(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - _varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _varying(*arrays: jax.Array) -> frozenset[str]:
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))
