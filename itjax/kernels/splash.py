"""Attention on TPUs: the splash kernels that come with jax, given only the tiles that packed documents need.

The kernels go through tiles of queries and keys, and are told beforehand which of them a mask hides; segments they apply
within tiles, and skip nothing for. Here the list of tiles is made of the segments of the batch at hand, for each row: a tile
of queries is given the keys from where its first document begins to its last query.

    a row of 8 tiles with documents of 3, 1, 2 and 2: queries down, keys across

    causal    x . . . . . . .    given    x . . . . . . .
              x x . . . . . .             x x . . . . . .
              x x x . . . . .             x x x . . . . .
              x x x x . . . .             . . . x . . . .
              x x x x x . . .             . . . . x . . .
              x x x x x x . .             . . . . x x . .
              x x x x x x x .             . . . . . . x .
              x x x x x x x x             . . . . . . x x      13 of 36

All rows are one long row for the kernels, so that each row has tiles of its own in one call. A tile that is not given is still
a step of the kernels' loop, one that loads nothing and computes nothing.

B rows, T positions, Q of them with a query, N query heads, K key/value heads, H head size; P parts of stripes; I tiles of
queries in a row and J of keys, X of those that are gone through and Y of the other kind, S steps through these.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    DEFAULT_MASK_VALUE,
    BlockSizes,
    SegmentIds,
    SplashAttentionKernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from itjax.kernels.case import ATTENDED, Case, Scores, Segments, Stripes

SMALLEST, LARGEST = 128, 512  # positions in a tile, see `tiles`


class Tiles(NamedTuple):
    """Positions in a tile."""

    queries: int
    keys: int


class Near(NamedTuple):
    """What a query sees by its place: itself and what came before it, a window back at most. Equal ones compile once."""

    window: int

    def __call__(self, query: jax.Array, key: jax.Array) -> jax.Array:
        return (query >= key) & (query - key < self.window) if self.window else query >= key


class Steps(NamedTuple):
    """For each tile that is gone through: whether a step does something, and the tile of the other kind it is about.

    A step that does nothing is about the tile that is needed next, which is loaded in the meantime.
    """

    runs_BXS: jax.Array
    tile_BXS: jax.Array  # of all rows


def refuses(case: Case) -> str:
    """Why this cannot be done, and the way out; "" if it can."""
    if case.platform not in ("tpu", "cpu"):
        return f"its kernels are not for {case.platform} but for tpu, and are interpreted on cpu"
    step = SMALLEST * case.parts
    if case.length % step:
        tiles = f"{SMALLEST} positions" + (f" on each of {case.parts} devices" if case.parts > 1 else "")
        return f"config.length: {case.length} are no whole tiles of {tiles}; the next that are: {-(-case.length // step) * step}"
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
    platform: str = "cpu",
) -> jax.Array:
    """What each head reads, (B, Q, N, H). On a CPU the kernels are interpreted: right, and slow.

    The kernels take no scale, so queries are scaled before: in float32, as the scale itself has no exact bfloat16.
    """
    B, Q = q_BQNH.shape[:2]
    size = tiles(Q, k_BTKH.shape[1], stripes)
    by_queries, by_keys = masks(segments, stripes, window=scores.window, size=size)
    kernel = SplashAttentionKernel(
        by_queries,
        by_queries,
        by_keys,
        block_sizes=_block_sizes(size),
        is_mqa=False,
        save_residuals=False,
        mask_value=DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=scores.softcap or None,
        residual_checkpoint_name=ATTENDED,
        mask_function=Near(scores.window),
        interpret=platform == "cpu",
    )
    q_BQNH = (q_BQNH.astype(jnp.float32) * scores.scale).astype(q_BQNH.dtype)
    ids = SegmentIds(segments.queries_BQ.reshape(-1), segments.keys_BT.reshape(-1))
    o_NRH = kernel(_one_row(q_BQNH), _one_row(k_BTKH), _one_row(v_BTKH), ids, sinks_N)
    assert isinstance(o_NRH, jax.Array)
    return o_NRH.reshape(-1, B, Q, o_NRH.shape[-1]).transpose(1, 2, 0, 3)


def tiles(num_queries: int, length: int, stripes: Stripes) -> Tiles:
    """The longest tiles of at most 512 positions that divide what a device has of a row.

    Public configs of these kernels begin at 512 and go on to 2,048 where a row is one document
    (https://github.com/AI-Hypercomputer/maxtext, `sa_block_q` and so on). A tile is computed whole for the sake of the few
    positions that short documents have in it, so that longer ones cost more than the loop saves. With 512 all kernels fit the
    vector memory of v5e, v5p and v6e with heads of up to 256 numbers, in float32 too. A tile of queries that is longer than
    a stripe would reach over the stripes of the other parts.
    """
    return Tiles(_longest(num_queries, stripes.size if stripes.parts > 1 else LARGEST), _longest(length, LARGEST))


def masks(segments: Segments, stripes: Stripes, *, window: int, size: Tiles) -> tuple[MaskInfo, MaskInfo]:
    """What the kernels are told: of each tile of queries the tiles of keys it needs, and the other way round."""
    B, Q = segments.queries_BQ.shape
    T = segments.keys_BT.shape[1]
    reach_PIJ = in_reach(Q, T, stripes, window=window, size=size)
    needs_BIJ = jnp.asarray(reach_PIJ)[stripes.part][None] & share_segments(segments, size)
    places_BQ = stripes.places_Q(Q)[None] + T * jnp.arange(B)[:, None]  # in the long row

    small = jnp.int16 if B * max(needs_BIJ.shape) < 2**15 else jnp.int32  # the memory of scalars is small

    def mask(steps: Steps, swap: bool) -> MaskInfo:
        runs_1XS = steps.runs_BXS.astype(jnp.int8).reshape(1, -1, steps.runs_BXS.shape[2])
        tile_1XS = steps.tile_BXS.astype(small).reshape(runs_1XS.shape)
        if swap:
            runs_1XS, tile_1XS = runs_1XS.swapaxes(1, 2), tile_1XS.swapaxes(1, 2)
        # No mask is stored: the kernels compute it from these places and `Near`.
        return MaskInfo(tile_1XS, None, runs_1XS, None, q_sequence=places_BQ.reshape(-1))  # type: ignore[arg-type]

    most_keys, most_queries = (int(reach_PIJ.sum(axis=axis).max()) for axis in (2, 1))
    return mask(steps(needs_BIJ, most_keys), False), mask(steps(needs_BIJ.swapaxes(1, 2), most_queries), True)


def in_reach(num_queries: int, length: int, stripes: Stripes, *, window: int, size: Tiles) -> np.ndarray:
    """(P, I, J): whether some query of a tile may see some key of another by their places, for each part of the stripes."""
    places_PIq = stripes.all_places_PQ(length).reshape(stripes.parts, num_queries // size.queries, size.queries)
    lowest_PI1, highest_PI1 = places_PIq.min(axis=-1, keepdims=True), places_PIq.max(axis=-1, keepdims=True)
    first_11J = np.arange(0, length, size.keys)[None, None]
    reach_PIJ = first_11J <= highest_PI1
    return reach_PIJ & (lowest_PI1 - (first_11J + size.keys - 1) < window) if window else reach_PIJ


def share_segments(segments: Segments, size: Tiles) -> jax.Array:
    """(B, I, J): whether two tiles may have a document in common, by their lowest and highest numbers."""
    lowest_BI, highest_BI = _numbers(segments.queries_BQ, size.queries)
    lowest_BJ, highest_BJ = _numbers(segments.keys_BT, size.keys)
    return (lowest_BI[:, :, None] <= highest_BJ[:, None]) & (highest_BI[:, :, None] >= lowest_BJ[:, None])


def steps(needs_BXY: jax.Array, most: int) -> Steps:
    """From the first tile that is needed to the last; `most` are the steps that are enough for any documents."""
    B, _, Y = needs_BXY.shape
    first_BX = jnp.argmax(needs_BXY, axis=2)
    last_BX = jnp.where(needs_BXY.any(axis=2), Y - 1 - jnp.argmax(needs_BXY[:, :, ::-1], axis=2), -1)
    tile_BXS = first_BX[:, :, None] + jnp.arange(most)[None, None]
    runs_BXS = tile_BXS <= last_BX[:, :, None]
    before_B1 = Y * jnp.arange(B)[:, None]  # tiles of the rows before this one
    next_BX = jnp.roll((first_BX + before_B1).reshape(-1), -1).reshape(B, -1)
    return Steps(runs_BXS, jnp.where(runs_BXS, tile_BXS + before_B1[:, :, None], next_BX[:, :, None]))


def _numbers(segments_BT: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Lowest and highest number of a document in each tile; padding, which comes last in a row, has the highest."""
    padding = jnp.iinfo(segments_BT.dtype).max
    numbers_BIt = jnp.where(segments_BT == 0, padding, segments_BT).reshape(segments_BT.shape[0], -1, size)
    return numbers_BIt.min(axis=2), numbers_BIt.max(axis=2)


def _longest(length: int, most: int) -> int:
    largest = max(SMALLEST, min(most, LARGEST))
    return max(size for size in range(SMALLEST, largest + 1, SMALLEST) if length % size == 0)


def _block_sizes(size: Tiles) -> BlockSizes:
    """The same tiles forward and backward: what is needed is found out once."""
    return BlockSizes(
        block_q=size.queries,
        block_kv=size.keys,
        block_q_dkv=size.queries,
        block_kv_dkv=size.keys,
        block_q_dq=size.queries,
        block_kv_dq=size.keys,
    )


def _one_row(x_BTNH: jax.Array) -> jax.Array:
    """All rows one after the other, heads first: (N, B·T, H)."""
    return x_BTNH.transpose(2, 0, 1, 3).reshape(x_BTNH.shape[2], -1, x_BTNH.shape[3])
