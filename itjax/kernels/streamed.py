"""Attention in plain XLA that never has the scores of a whole row: blocks of queries against blocks of keys.

A block of queries keeps a running maximum, sum and result over the blocks of keys that it meets
(https://arxiv.org/abs/2307.08691), and begins and ends with the first and last block of keys that one of its queries may
see: what is behind the window or in other documents is never computed, however long the row is. Which blocks those are is
known when the numbers of the segments are, so the loop is of a length that is found at run time, and the program is small.
The backward pass computes probabilities again, from what they were divided by.

B rows, T positions, Q of them with a query, N query heads, K key/value heads, G = N / K queries per key/value head, H head
size. Rows are taken R at a time, in P passes; a row has C blocks of I queries and M blocks of J keys, X = G·I.
U = P·C are the blocks of queries of all passes, V = P·M the blocks of keys.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from itjax.kernels.case import HIDDEN, Case, Scores, Segments, Stripes
from itjax.kernels.plain import capped, scales_queries

NAME = "attended"  # of what the forward pass leaves for the backward pass, for policies of rematerialisation
UNSEEN = HIDDEN / 2  # where maxima start: above what is hidden, so that hidden scores have probability 0 at any time
LAST = jnp.iinfo(jnp.int32).max


class Blocks(NamedTuple):
    """How much is computed at a time."""

    queries: int
    keys: int
    by_row: (
        bool  # one row after the other, each with the blocks that it needs; else all rows, with those that any needs
    )


# A processor is busy with the heads of one row. An accelerator would be idle: it takes all rows at a time, and wants blocks
# that are worth the start of a program for each step of a loop. Where rows are packed, blocks of queries end at the same
# block of keys in all of them, and begin where the longest document needs it.
BLOCKS = {"cpu": Blocks(128, 128, True), "gpu": Blocks(512, 512, False), "tpu": Blocks(512, 512, False)}


def refuses(case: Case) -> str:
    """Why this cannot be done; it always can."""
    del case
    return ""


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
    """What each head reads. Time is that of the blocks which documents and the window touch, memory grows with T."""
    return in_blocks(q_BQNH, k_BTKH, v_BTKH, segments, scores, sinks_N, stripes, BLOCKS[platform])


def in_blocks(
    q_BQNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments: Segments,
    scores: Scores,
    sinks_N: jax.Array | None,
    stripes: Stripes,
    blocks: Blocks,
) -> jax.Array:
    """`attend`, with blocks of any size."""
    (B, Q, N, _), T, K = q_BQNH.shape, k_BTKH.shape[1], k_BTKH.shape[2]
    blocks = blocks._replace(queries=min(blocks.queries, Q), keys=min(blocks.keys, T))
    R = 1 if blocks.by_row else B
    early, late = (scores.scale, 1.0) if scales_queries(q_BQNH.dtype, scores.scale) else (1.0, scores.scale)
    places_Q = stripes.places_Q(Q)
    places_CI = _cut(places_Q[None], 1, blocks.queries)[:, 0]
    first_PC, stop_PC = reach(segments, places_Q, blocks, window=scores.window)
    k_VRKJH, v_VRKJH = (_cut(x, R, blocks.keys).swapaxes(2, 3) for x in (k_BTKH, v_BTKH))
    passes, num_keys = B // R, -(-T // blocks.keys)
    queries = _Queries(
        _by_heads(_cut(q_BQNH * early, R, blocks.queries), K),
        _cut(segments.queries_BQ, R, blocks.queries),
        jnp.tile(places_CI, (passes, 1)),
        *((num_keys * jnp.arange(passes)[:, None] + number_PC).reshape(-1) for number_PC in (first_PC, stop_PC)),
    )
    places_VJ = jnp.tile(jnp.arange(num_keys * blocks.keys).reshape(num_keys, -1), (passes, 1))
    keys = _Keys(k_VRKJH, v_VRKJH, _cut(segments.keys_BT, R, blocks.keys), places_VJ)
    o_URKXH = _read(*_alike((queries, keys, sinks_N)), _Settings(late, scores.softcap, scores.window))
    return _together(o_URKXH, (B, Q, N))


def reach(segments: Segments, places_Q: jax.Array, blocks: Blocks, *, window: int) -> tuple[jax.Array, jax.Array]:
    """(first, stop), (P, C) each: blocks of keys from the first to before the last are all that a block of queries may see.

    segments  1 1 1 2 | 2 2 2 2 | 2 3 0 0      blocks of 4      first  0 0 0      stop  1 2 3     the last begins with 2

    They meet where their ranges of places and of segments do. Padding is taken for the last segment of all, as it is in
    rows that are packed; segments in any other order have wider ranges, and are as exact.
    """
    low_BC, high_BC = _range(_order(segments.queries_BQ), blocks.queries)
    low_BM, high_BM = _range(_order(segments.keys_BT), blocks.keys)
    meets_BCM = (low_BC[:, :, None] <= high_BM[:, None]) & (low_BM[:, None] <= high_BC[:, :, None])
    early_1C, late_1C = _range(places_Q[None], blocks.queries)
    start_M = blocks.keys * jnp.arange(low_BM.shape[1])
    near_CM = start_M[None] <= late_1C[0, :, None]
    if window:
        near_CM &= start_M[None] + blocks.keys > early_1C[0, :, None] - window + 1
    meets_BCM &= near_CM[None]
    meets_PCM = meets_BCM if blocks.by_row else meets_BCM.any(axis=0, keepdims=True)
    M, some_PC = meets_PCM.shape[2], meets_PCM.any(axis=2)
    first_PC = jnp.where(some_PC, meets_PCM.argmax(axis=2), 0)
    stop_PC = jnp.where(some_PC, M - meets_PCM[:, :, ::-1].argmax(axis=2), 0)
    return first_PC.astype(jnp.int32), stop_PC.astype(jnp.int32)


def _order(segments_BT: jax.Array) -> jax.Array:
    return jnp.where(segments_BT == 0, LAST, segments_BT)


def _range(x_BT: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """The lowest and the highest number of each block, (B, blocks)."""
    x_BCI = _padded(x_BT, block).reshape(x_BT.shape[0], -1, block)
    return x_BCI.min(axis=2), x_BCI.max(axis=2)


def _padded(x_BT_: jax.Array, block: int) -> jax.Array:
    """More of the last position, up to a multiple of the block: as queries they are cut off again, as keys they come too late."""
    return jnp.pad(x_BT_, [(0, 0), (0, -x_BT_.shape[1] % block), *[(0, 0)] * (x_BT_.ndim - 2)], mode="edge")


def _cut(x_BT_: jax.Array, rows: int, block: int) -> jax.Array:
    """(B, T, ...) -> (blocks of all passes, R, positions of a block, ...)."""
    padded = _padded(x_BT_, block)
    x_PRCI_ = padded.reshape(-1, rows, padded.shape[1] // block, block, *x_BT_.shape[2:])
    return x_PRCI_.swapaxes(1, 2).reshape(-1, rows, block, *x_BT_.shape[2:])


def _by_heads(q_URINH: jax.Array, kv_heads: int) -> jax.Array:
    """Queries of the heads that read the same keys are rows of one matrix: (U, R, K, X, H)."""
    U, R, I, N, H = q_URINH.shape
    q_URIKGH = q_URINH.reshape(U, R, I, kv_heads, N // kv_heads, H)
    return q_URIKGH.transpose(0, 1, 3, 4, 2, 5).reshape(U, R, kv_heads, -1, H)


def _together(o_URKXH: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """The inverse of `_cut` and `_by_heads`: (B, Q, N, H)."""
    (B, Q, N), (_, R, K, X, H) = shape, o_URKXH.shape
    o_PCRKGIH = o_URKXH.reshape(B // R, -1, R, K, N // K, X * K // N, H)
    return o_PCRKGIH.transpose(0, 2, 1, 5, 3, 4, 6).reshape(B, -1, N, H)[:, :Q]


class _Queries(NamedTuple):
    """All blocks of queries, or one: where they are, and which blocks of keys they meet."""

    q: jax.Array  # URKXH
    segments: jax.Array  # URI
    places: jax.Array  # UI
    first: jax.Array  # U
    stop: jax.Array  # U


class _Keys(NamedTuple):
    """All blocks of keys, or one."""

    k: jax.Array  # VRKJH
    v: jax.Array  # VRKJH
    segments: jax.Array  # VRJ
    places: jax.Array  # VJ

    def block(self, number: jax.Array) -> "_Keys":
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), self)


class _Settings(NamedTuple):
    late: float  # what scores are multiplied with: the scale, where queries are not
    softcap: float
    window: int


class _State(NamedTuple):
    """Of a block of queries, after some blocks of keys."""

    highest_RKX1: jax.Array
    total_RKX1: jax.Array
    o_RKXH: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _read(queries: _Queries, keys: _Keys, sinks_N: jax.Array | None, settings: _Settings) -> jax.Array:
    return _forward(queries, keys, sinks_N, settings)[0]


def _forward(queries, keys, sinks_N, settings):
    def read(_, these: _Queries):
        def meet(number, state: _State) -> _State:
            those = keys.block(number)
            scores_RKXJ = _hidden(_scores(these, those, settings), these, those, settings)
            highest_RKX1 = jnp.maximum(state.highest_RKX1, scores_RKXJ.max(axis=-1, keepdims=True))
            exp_RKXJ = jnp.exp(scores_RKXJ - highest_RKX1)
            less_RKX1 = jnp.exp(state.highest_RKX1 - highest_RKX1)
            more_RKXH = _product("RKXJ,RKJH->RKXH", exp_RKXJ.astype(those.v.dtype), those.v)
            total_RKX1 = state.total_RKX1 * less_RKX1 + exp_RKXJ.sum(axis=-1, keepdims=True)
            return _State(highest_RKX1, total_RKX1, state.o_RKXH * less_RKX1 + more_RKXH)

        end = jax.lax.fori_loop(these.first, these.stop, meet, _start(these, sinks_N))
        total_RKX1 = jnp.where(end.total_RKX1 == 0, 1.0, end.total_RKX1)  # 0 where a block is longer than the row
        return None, ((end.o_RKXH / total_RKX1).astype(keys.v.dtype), end.highest_RKX1 + jnp.log(total_RKX1))

    _, left = jax.lax.scan(read, None, queries)
    o_URKXH, log_z_URKX1 = (checkpoint_name(x, NAME) for x in left)
    return o_URKXH, (queries, keys, sinks_N, o_URKXH, log_z_URKX1)


def _start(these: _Queries, sinks_N: jax.Array | None) -> _State:
    """Before any key: nothing, or the sink, which is in the sum and gives no value."""
    zero_RKXH = _zeros(these.q.shape, these.q)
    highest_RKX1 = zero_RKXH[..., :1] + UNSEEN
    if sinks_N is None:
        return _State(highest_RKX1, zero_RKXH[..., :1], zero_RKXH)
    sinks_RKX1 = zero_RKXH[..., :1] + _of_queries(sinks_N, these.q.shape)
    highest_RKX1 = jnp.maximum(highest_RKX1, sinks_RKX1)
    return _State(highest_RKX1, jnp.exp(sinks_RKX1 - highest_RKX1), zero_RKXH)


def _backward(settings, left, o_grad_URKXH):
    """With p = exp(score - log z) and a = Σ p·(o_grad·v) = o_grad·o, the gradient of a score is p·(o_grad·v - a)."""
    queries, keys, sinks_N, o_URKXH, log_z_URKX1 = left
    average_URKX1 = (o_grad_URKXH.astype(jnp.float32) * o_URKXH.astype(jnp.float32)).sum(axis=-1, keepdims=True)

    def read(grads, this):
        these, o_grad_RKXH, log_z_RKX1, average_RKX1 = this

        def meet(number, grads):
            q_grad_RKXH, k_grad_VRKJH, v_grad_VRKJH = grads
            those = keys.block(number)
            scores_RKXJ = _scores(these, those, settings)
            p_RKXJ = jnp.exp(_hidden(scores_RKXJ, these, those, settings) - log_z_RKX1)
            p_grad_RKXJ = _product("RKXH,RKJH->RKXJ", o_grad_RKXH, those.v)
            grad_RKXJ = p_RKXJ * (p_grad_RKXJ - average_RKX1)
            if settings.softcap:
                grad_RKXJ *= 1.0 - jnp.square(scores_RKXJ / settings.softcap)
            grad_RKXJ = grad_RKXJ.astype(these.q.dtype)
            return (
                q_grad_RKXH + _product("RKXJ,RKJH->RKXH", grad_RKXJ, those.k),
                _added(k_grad_VRKJH, number, _product("RKXJ,RKXH->RKJH", grad_RKXJ, these.q)),
                _added(
                    v_grad_VRKJH, number, _product("RKXJ,RKXH->RKJH", p_RKXJ.astype(o_grad_RKXH.dtype), o_grad_RKXH)
                ),
            )

        q_grad_RKXH, *grads = jax.lax.fori_loop(these.first, these.stop, meet, (_zeros(these.q.shape, these.q), *grads))
        return tuple(grads), (settings.late * q_grad_RKXH).astype(these.q.dtype)

    nothing = _zeros(keys.k.shape, keys.k), _zeros(keys.v.shape, keys.v)
    (k_grad_VRKJH, v_grad_VRKJH), q_grad_URKXH = jax.lax.scan(
        read, nothing, (queries, o_grad_URKXH, log_z_URKX1, average_URKX1)
    )
    k_grad_VRKJH = (settings.late * k_grad_VRKJH).astype(keys.k.dtype)
    return (
        _Queries(q_grad_URKXH, None, None, None, None),
        _Keys(k_grad_VRKJH, v_grad_VRKJH.astype(keys.v.dtype), None, None),
        None if sinks_N is None else _sinks_grad(sinks_N, log_z_URKX1, average_URKX1),
    )


_read.defvjp(_forward, _backward)


def _sinks_grad(sinks_N: jax.Array, log_z_URKX1: jax.Array, average_URKX1: jax.Array) -> jax.Array:
    """A sink is a score whose value is 0."""
    grad_URKX1 = -jnp.exp(_of_queries(sinks_N, log_z_URKX1.shape[1:])[None] - log_z_URKX1) * average_URKX1
    U, R, K, X, _ = grad_URKX1.shape
    group = len(sinks_N) // K
    return grad_URKX1.reshape(U, R, K, group, X // group).sum(axis=(0, 1, 4)).reshape(-1).astype(sinks_N.dtype)


def _of_queries(sinks_N: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The sink of the head of each query of a block: (1, K, X, 1)."""
    _, K, X, _ = shape
    return jnp.repeat(sinks_N.astype(jnp.float32).reshape(K, -1), X * K // len(sinks_N), axis=1)[None, :, :, None]


def _scores(these: _Queries, those: _Keys, settings: _Settings) -> jax.Array:
    return capped(_product("RKXH,RKJH->RKXJ", these.q, those.k) * settings.late, settings.softcap)


def _hidden(scores_RKXJ: jax.Array, these: _Queries, those: _Keys, settings: _Settings) -> jax.Array:
    """Scores of a block of queries and a block of keys, those hidden that a query does not see."""
    R, K, X, J = scores_RKXJ.shape
    back_IJ = these.places[:, None] - those.places[None, :]
    near_IJ = (back_IJ >= 0) & (back_IJ < settings.window) if settings.window else back_IJ >= 0
    sees_RIJ = (these.segments[:, :, None] == those.segments[:, None, :]) & near_IJ[None]
    scores_RKGIJ = scores_RKXJ.reshape(R, K, -1, sees_RIJ.shape[1], J)
    return (scores_RKGIJ + jnp.where(sees_RIJ, 0.0, HIDDEN)[:, None, None]).reshape(R, K, X, J)


def _product(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(form, a, b, preferred_element_type=jnp.float32)


def _added(sums: jax.Array, number: jax.Array, more: jax.Array) -> jax.Array:
    """In place: one block of the sums, and no copy of the others."""
    now = jax.lax.dynamic_index_in_dim(sums, number, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(sums, now + more, number, axis=0)


def _varying(*arrays: jax.Array) -> frozenset[str]:
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def _varied(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - _varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _zeros(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """Sums to add to in a loop: in float32, varying over the axes of the mesh that `like` varies over."""
    return _varied(jnp.zeros(shape, jnp.float32), _varying(like))


def _alike(arrays):
    """All varying over the axes of the mesh that any varies over, as what is carried from step to step of a loop has to."""
    axes = _varying(*jax.tree.leaves(arrays))
    return jax.tree.map(lambda x: _varied(x, axes), arrays)
