"""Attention on TPUs: the splash kernels that come with jax, given only the tiles that a packed row needs.

The kernels skip tiles that a mask known beforehand hides, and apply segments inside of the others. Here the list of tiles is
made from the segments of the batch at hand, for each row: a tile of queries is given the keys from where its first document
begins to its last query, so the work is that of the documents and not of the rows they are packed in.

    a row of 8 tiles, documents of 3, 1, 2 and 2 tiles; queries down, keys across

    causal    x . . . . . . .    given    x . . . . . . .    36 tiles would be read, 13 are
              x x . . . . . .             x x . . . . . .
              x x x . . . . .             x x x . . . . .
              x x x x . . . .             . . . x . . . .
              x x x x x . . .             . . . . x . . .
              x x x x x x . .             . . . . x x . .
              x x x x x x x .             . . . . . . x .
              x x x x x x x x             . . . . . . x x

All rows are one long row for the kernels, so that each can have tiles of its own; a tile that is not given is a step of the
kernel's loop that loads and computes nothing.

B rows, T positions, Q of them with a query, N query heads, K key/value heads, H head size; I tiles of queries in a row, J of
keys, P shares of stripes, W steps that a tile of the one kind takes through tiles of the other.
"""

import math
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

from itjax.kernels.case import Case, Scores, Segments, Stripes

LANES = 128  # positions in the smallest tile
LARGEST = 512  # positions in the largest, see `block_sizes`
NAME = "attended"  # of what the backward pass wants back of the forward one, for policies of rematerialisation


class Near(NamedTuple):
    """Which keys of its row a query sees by their places: itself and what came before it, a window back at most."""

    window: int

    def __call__(self, query: jax.Array, key: jax.Array) -> jax.Array:
        sees = query >= key
        return sees & (query - key < self.window) if self.window else sees


class Tiles(NamedTuple):
    """Positions in a tile of queries and of keys."""

    queries: int
    keys: int


def refuses(case: Case) -> str:
    """Why this cannot be done, and the way out; "" if it can."""
    if case.platform == "gpu":
        return "its kernels are for TPUs; config.attention=auto finds what runs here"
    step = LANES * case.parts
    if case.length % step:
        shares = f" in {case.parts} shares" if case.parts > 1 else ""
        return (
            f"config.length: {case.length} positions{shares} are no whole tiles of {LANES}; the next length that is: "
            f"{-(-case.length // step) * step}"
        )
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
    """What each head reads, (B, Q, N, H). On a CPU the kernels are interpreted: right, and slow."""
    B, Q, _, _ = q_BQNH.shape
    T = k_BTKH.shape[1]
    sizes = block_sizes(Q, T, stripes)
    places_BQ = stripes.places_Q(Q)[None] + T * jnp.arange(B)[:, None]  # in all rows, one after the other
    forward, dq, dkv = (
        _mask_info(segments, stripes, places_BQ, scores.window, Tiles(*tile), by_keys=by_keys)
        for tile, by_keys in (
            ((sizes.block_q, sizes.block_kv), False),
            ((sizes.block_q_dq, sizes.block_kv_dq), False),
            ((sizes.block_q_dkv, sizes.block_kv_dkv), True),
        )
    )
    kernel = SplashAttentionKernel(
        forward,
        dq,
        dkv,
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=scores.softcap or None,
        residual_checkpoint_name=NAME,
        mask_function=Near(scores.window),
        interpret=platform == "cpu",
    )
    ids = SegmentIds(segments.queries_BQ.reshape(-1), segments.keys_BT.reshape(-1))
    o_NRH = kernel(_one_row(q_BQNH * scores.scale), _one_row(k_BTKH), _one_row(v_BTKH), ids, sinks_N)
    return o_NRH.reshape(-1, B, Q, o_NRH.shape[-1]).transpose(1, 2, 0, 3)


def block_sizes(num_queries: int, length: int, stripes: Stripes) -> BlockSizes:
    """Tiles of 512 positions at most, the same in all three kernels.

    Public configs of these kernels begin at 512 (https://github.com/AI-Hypercomputer/maxtext, `sa_block_*`) and go on to
    1,024 or 2,048 where a row is one document; short documents are the other way round, since a tile is computed whole
    for the sake of the few positions that a document has in it. With 512 the three kernels fit the vector memory of a v5e,
    v5p and v6e for heads of up to 256, also in float32. A tile longer than a stripe would reach over the stripes of others.
    """
    queries, keys = _tile(num_queries, max(LANES, stripes.size if stripes.parts > 1 else LARGEST)), _tile(length, LARGEST)
    return BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=keys,
        block_q_dq=queries,
        block_kv_dq=keys,
    )


def _tile(length: int, most: int) -> int:
    return max(size for size in range(LANES, min(most, LARGEST) + 1, LANES) if length % size == 0)


def _one_row(x_BTNH: jax.Array) -> jax.Array:
    """All rows one after the other, by heads: (N, B·T, H)."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.transpose(2, 0, 1, 3).reshape(N, B * T, H)


def _mask_info(
    segments: Segments, stripes: Stripes, places_BQ: jax.Array, window: int, tiles: Tiles, *, by_keys: bool
) -> MaskInfo:
    """What the kernels go by: for each tile of queries the tiles of keys it needs, or the other way round `by_keys`."""
    reach_PIJ = _reach(places_BQ.shape[1], segments.keys_BT.shape[1], stripes, window, tiles)
    needs_BIJ = jnp.asarray(reach_PIJ)[stripes.part][None] & _shares_segment(segments, tiles)
    if by_keys:
        reach_PIJ, needs_BIJ = reach_PIJ.swapaxes(1, 2), needs_BIJ.swapaxes(1, 2)
    runs_1RW, next_1RW = _steps(needs_BIJ, int(reach_PIJ.sum(axis=-1).max()))
    if by_keys:
        runs_1RW, next_1RW = runs_1RW.swapaxes(1, 2), next_1RW.swapaxes(1, 2)
    return MaskInfo(
        data_next=next_1RW,
        mask_next=None,
        block_mask=runs_1RW,
        partial_mask_blocks=None,
        q_sequence=places_BQ.reshape(-1),
    )


def _reach(num_queries: int, length: int, stripes: Stripes, window: int, tiles: Tiles) -> np.ndarray:
    """For each part of the stripes: whether a tile of keys is in reach of some query of a tile, by their places alone."""
    size = stripes.size if stripes.parts > 1 else length
    places_PQ = np.arange(length).reshape(-1, stripes.parts, size).swapaxes(0, 1).reshape(stripes.parts, num_queries)
    places_PIq = places_PQ.reshape(stripes.parts, -1, tiles.queries)
    lowest_PI1, highest_PI1 = places_PIq.min(axis=-1)[..., None], places_PIq.max(axis=-1)[..., None]
    first_J = np.arange(0, length, tiles.keys)
    is_before_PIJ = first_J <= highest_PI1
    return is_before_PIJ & (lowest_PI1 - (first_J + tiles.keys - 1) < window) if window else is_before_PIJ


def _shares_segment(segments: Segments, tiles: Tiles) -> jax.Array:
    """(B, I, J): whether two tiles may have a document in common, by their lowest and highest numbers."""
    lowest_BI, highest_BI = _range(segments.queries_BQ, tiles.queries)
    lowest_BJ, highest_BJ = _range(segments.keys_BT, tiles.keys)
    return (lowest_BI[:, :, None] <= highest_BJ[:, None]) & (highest_BI[:, :, None] >= lowest_BJ[:, None])


def _range(segments_BT: jax.Array, tile: int) -> tuple[jax.Array, jax.Array]:
    last = jnp.iinfo(segments_BT.dtype).max
    tiles_BIt = jnp.where(segments_BT == 0, last, segments_BT).reshape(
        segments_BT.shape[0], -1, tile
    )  # padding comes last
    return tiles_BIt.min(axis=-1), tiles_BIt.max(axis=-1)


def _steps(needs_BIJ: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """(1, B·I, W) twice: whether a tile does something in a step, and with which tile of all rows.

    A step that does nothing names the tile that comes next, so that it is loaded in the meantime.
    """
    B, _, J = needs_BIJ.shape
    first_BI = jnp.argmax(needs_BIJ, axis=-1)
    last_BI = jnp.where(needs_BIJ.any(axis=-1), J - 1 - jnp.argmax(needs_BIJ[..., ::-1], axis=-1), -1)
    places_BIW = first_BI[..., None] + jnp.arange(width)[None, None]
    runs_BIW = places_BIW <= last_BI[..., None]
    offset_B1 = J * jnp.arange(B)[:, None]
    following_BI = jnp.roll((first_BI + offset_B1).reshape(-1), -1).reshape(B, -1)
    next_BIW = jnp.where(runs_BIW, places_BIW + offset_B1[..., None], following_BI[..., None])
    return tuple(x.astype(jnp.int32).reshape(1, -1, width) for x in (runs_BIW, next_BIW))  # type: ignore[return-value]
