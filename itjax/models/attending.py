"""Attention on the mesh: each device reads for the rows, positions and heads that it has.

Rows that are split over `context` come in two ways. By keys: keys and values of whole rows are gathered, and a device reads
for the stripes of queries that it has. By heads: devices exchange positions for heads, so that each has whole rows of some
heads; for implementations that want whole rows (https://arxiv.org/abs/2309.14509).

B rows, T positions, Q of them on a device, N query heads, K key/value heads, H head size.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from itjax.kernels import attention
from itjax.kernels.attention import Case, Scores, Segments, Stripes
from itjax.models.config import Layer, ModelConfig
from itjax.parallel import layout, stripes
from itjax.parallel.stripes import Cut

QUERIES = PartitionSpec("batch", "length", "heads", "head_size")
KEYS = PartitionSpec("batch", "length", "kv_heads", "head_size")


class Way(NamedTuple):
    """Which implementation reads, and whether by whole heads."""

    name: str
    by_heads: bool


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    sinks_N: jax.Array | None,
    *,
    wanted: str,
    platform: str,
    scores: Scores,
) -> jax.Array:
    """What each head reads, (B, T, N, H). `wanted` is a name from a config; all arrays are in the order of stripes.

    Raises ValueError where the implementation that is wanted cannot do it.
    """
    cut = stripes.cut(q_BTNH.shape[1])
    by_heads, by_kv_heads = (layout.split(tuple(names), x.shape)[2] for names, x in ((QUERIES, q_BTNH), (KEYS, k_BTKH)))
    case = on_device_case(
        platform, q_BTNH.shape[1], (q_BTNH.shape[2], k_BTKH.shape[2]), q_BTNH.shape[3], q_BTNH.dtype.name, scores,
        sinks=sinks_N is not None,
    )  # fmt: skip
    way = choose(wanted, case)
    read = partial(attention.attend, implementation=way.name, scores=scores, platform=platform)
    group = q_BTNH.shape[2] // k_BTKH.shape[2]

    def on_device(
        q_BQNH: jax.Array, k_BQKH: jax.Array, v_BQKH: jax.Array, segments_BQ: jax.Array, sinks_N: jax.Array | None
    ) -> jax.Array:
        if by_heads != by_kv_heads:
            first = jax.lax.axis_index(by_heads) * q_BQNH.shape[2]
            k_BQKH, v_BQKH = (_of_heads(x, first, q_BQNH.shape[2], group) for x in (k_BQKH, v_BQKH))
        spread = _by_heads if way.by_heads else _by_keys
        return spread(read, q_BQNH, k_BQKH, v_BQKH, segments_BQ, sinks_N, cut)

    names = (QUERIES, KEYS, KEYS, PartitionSpec("batch", "length"), None if sinks_N is None else PartitionSpec("heads"))
    return layout.per_device(
        on_device, q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N, names=names, everywhere=False,
        tracked=attention.IMPLEMENTATIONS[way.name].tracked,
    )  # fmt: skip


def scores_of(config: ModelConfig, kind: Layer) -> Scores:
    """How queries of a layer of this kind score keys."""
    scale = config.head_size**-0.5 if config.query_scale is None else config.query_scale
    return Scores(scale, config.attention_softcap, kind.window)


def possible(config: ModelConfig, *, platform: str, length: int, dtype: str) -> list[str]:
    """Names of the implementations that can do every layer of a model on the mesh in scope, best first."""
    heads = (config.heads, config.kv_heads)
    names = [
        [
            way.name
            for way in ways(
                on_device_case(platform, length, heads, config.head_size, dtype, scores, sinks=config.sinks)
            )
        ]
        for scores in {scores_of(config, kind) for kind in config.pattern}
    ]
    return [name for name in names[0] if all(name in others for others in names)]


def on_device_case(
    platform: str, length: int, heads: tuple[int, int], head_size: int, dtype: str, scores: Scores, *, sinks: bool
) -> Case:
    """The case that one device of the mesh in scope has, with (N, K) heads on all of them."""
    N, K = (count // layout.ways(name, count) for name, count in zip(("heads", "kv_heads"), heads, strict=True))
    if layout.ways("heads", heads[0]) != layout.ways("kv_heads", heads[1]):
        K = 1 if (heads[0] // heads[1]) % N == 0 else N
    return Case(platform, length, N, K, head_size, dtype, scores, sinks, stripes.cut(length).parts)


def choose(wanted: str, case: Case) -> Way:
    """The implementation and the way for a case. Raises ValueError where the one that is wanted has none."""
    attention.check(wanted)
    if wanted == "auto":
        return ways(case)[0]
    if not attention.IMPLEMENTATIONS[wanted].refuses(case):
        return Way(wanted, False)
    whole = of_whole_rows(case)
    if whole is not None and not attention.IMPLEMENTATIONS[wanted].refuses(whole):
        return Way(wanted, True)
    return Way(attention.choose(wanted, case), False)  # which says why it cannot


def ways(case: Case) -> Sequence[Way]:
    """What can do a case on its platform, best first; an implementation that can do both reads by keys."""
    whole = of_whole_rows(case)
    by_keys = attention.available(case)
    by_heads = attention.available(whole) if whole is not None else ()
    names = [name for name in attention.best_first(case) if name in by_keys or name in by_heads]
    return [Way(name, name not in by_keys) for name in names]


def of_whole_rows(case: Case) -> Case | None:
    """The case that a device has where positions are exchanged for heads; None where heads do not divide, or none are split."""
    if case.parts == 1 or case.heads % case.parts:
        return None
    if case.kv_heads % case.parts and case.parts % case.kv_heads:
        return None
    return case._replace(heads=case.heads // case.parts, kv_heads=max(1, case.kv_heads // case.parts), parts=1)


def _of_heads(x_BTKH: jax.Array, first: jax.Array, count: int, group: int) -> jax.Array:
    """The keys or values of query heads from `first` on, where heads are split over devices and these are not."""
    if group % count == 0:
        return jax.lax.dynamic_slice_in_dim(x_BTKH, first // group, 1, axis=2)
    return jnp.take(x_BTKH, (first + jnp.arange(count)) // group, axis=2)


def _by_keys(read, q_BQNH, k_BQKH, v_BQKH, segments_BQ, sinks_N, cut: Cut) -> jax.Array:
    if cut.parts == 1:
        segments, places = Segments(segments_BQ, segments_BQ), Stripes()
    else:
        k_BQKH, v_BQKH = stripes.together(k_BQKH, cut), stripes.together(v_BQKH, cut)
        segments = Segments(segments_BQ, stripes.together(segments_BQ, cut))
        places = Stripes(jax.lax.axis_index(cut.axes), cut.parts, cut.size)
    return read(q_BQNH, k_BQKH, v_BQKH, segments, sinks_N=sinks_N, stripes=places)


def _by_heads(read, q_BQNH, k_BQKH, v_BQKH, segments_BQ, sinks_N, cut: Cut) -> jax.Array:
    def there(x: jax.Array) -> jax.Array:
        """(B, T/C, N, H) -> (B, T, N/C, H), heads repeated where there are fewer than devices."""
        x = jnp.repeat(x, max(1, cut.parts // x.shape[2]), axis=2)
        return stripes.in_order(jax.lax.all_to_all(x, cut.axes, split_axis=2, concat_axis=1, tiled=True), cut)

    segments_BT = stripes.together(segments_BQ, cut)
    if sinks_N is not None:
        sinks_N = jax.lax.dynamic_slice_in_dim(
            sinks_N, jax.lax.axis_index(cut.axes) * (len(sinks_N) // cut.parts), len(sinks_N) // cut.parts
        )
    segments = Segments(segments_BT, segments_BT)
    o_BTNH = read(there(q_BQNH), there(k_BQKH), there(v_BQKH), segments, sinks_N=sinks_N)
    return jax.lax.all_to_all(
        stripes.in_stripes(o_BTNH, cut), cut.axes, split_axis=1, concat_axis=2, tiled=True
    )  # fmt: skip
