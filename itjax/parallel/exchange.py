"""What devices give each other by instructions of our own, where the compiler would send more.

    look_up   rows of a table whose columns are split: numbers of tokens travel, and what was found; the table stays
    added     sums of all shards, each device the part it keeps: a reduce-scatter on every platform

B rows, T positions, V vocabulary, D width, S shards of the positions of a batch.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from itjax.parallel import layout

TABLE = PartitionSpec("vocab", "embed")
TOKENS = PartitionSpec("batch", "length")


def look_up(table_VD: jax.Array, tokens_BT: jax.Array, *, dtype: str) -> jax.Array:
    """The vectors of tokens, (B, T, D) in `dtype`, laid out as the tokens are.

    Every device looks its columns up for the tokens of all devices that have others, and devices exchange columns for
    tokens: B·T·D numbers instead of the V·D of the whole table, and its gradient adds up in the table's own type, in place.
    """
    (by_vocab, by_width), by_tokens = _splits(TABLE, table_VD), _splits(TOKENS, tokens_BT)
    if not set(by_width) <= {axis for axes in by_tokens for axis in axes}:  # tokens that are too few to split
        whole_VD = layout.pin(table_VD.astype(dtype), "vocab", None)
        return layout.pin(jnp.take(whole_VD, tokens_BT, axis=0), "batch", "length", "embed")
    sizes = layout.scope()

    def on_device(numbers_BT: jax.Array, table_VD: jax.Array) -> jax.Array:
        """`numbers_BT` has a dimension of 1 for the width: the result is laid out as this argument is."""
        tokens_BT = numbers_BT[..., 0]
        for dimension, axes in enumerate(by_tokens):
            for axis in reversed([axis for axis in axes if axis in by_width]):
                tokens_BT = jax.lax.all_gather(tokens_BT, axis, axis=dimension, tiled=True)
        x_BTD = _rows(table_VD, tokens_BT, by_vocab).astype(dtype)
        for axis in reversed(by_width):  # the innermost first: its columns are neighbours
            x_BTD = _exchanged(x_BTD, axis, by_tokens, by_width, sizes)
        return x_BTD

    names = (PartitionSpec("batch", "length", None), TABLE)
    return layout.per_device(on_device, tokens_BT[..., None], table_VD, names=names, everywhere=False)


def _splits(names: PartitionSpec, x: jax.Array) -> list[tuple[str, ...]]:
    return layout.split(tuple(names), x.shape)


def _rows(table_VD: jax.Array, tokens_BT: jax.Array, by_vocab: Sequence[str]) -> jax.Array:
    """Rows of a table of which this device has some; of the others it says zeros, and all are added up."""
    if not by_vocab:
        return jnp.take(table_VD, tokens_BT, axis=0)
    count = len(table_VD)
    numbers_BT = tokens_BT - jax.lax.axis_index(tuple(by_vocab)) * count
    is_here_BT1 = ((numbers_BT >= 0) & (numbers_BT < count))[..., None]
    found_BTD = jnp.where(is_here_BT1, jnp.take(table_VD, numbers_BT, axis=0, mode="clip"), 0)
    return jax.lax.psum(found_BTD, tuple(by_vocab))


def _exchanged(
    x_BTD: jax.Array, axis: str, by_tokens: Sequence[Sequence[str]], by_width: Sequence[str], sizes: Mapping[str, int]
) -> jax.Array:
    """Tokens of the other devices along an axis, for their columns of one's own tokens."""
    dimension = next(number for number, axes in enumerate(by_tokens) if axis in axes)
    gathered = [name for name in by_tokens[dimension] if name in by_width]
    outer = math.prod(sizes[name] for name in gathered[: gathered.index(axis)])  # those after it have been given back
    parts, shape = sizes[axis], x_BTD.shape
    split = x_BTD.reshape(
        *shape[:dimension], outer, parts, shape[dimension] // (outer * parts), *shape[dimension + 1 :]
    )
    mine = jax.lax.all_to_all(split, axis, split_axis=dimension + 1, concat_axis=split.ndim - 1, tiled=True)
    return mine.reshape(*shape[:dimension], shape[dimension] // parts, *shape[dimension + 1 : -1], shape[-1] * parts)


def added(x_SVD: jax.Array, *names: str | None) -> jax.Array:
    """The sum over shards, laid out by the names of the dimensions that are left."""
    if math.prod(layout.scope().values()) == 1:
        return x_SVD.sum(axis=0)
    (by_shards, *before), after = layout.split(("shards", *names), x_SVD.shape), layout.split(names, x_SVD.shape[1:])
    scattered = [tuple(axis for axis in new if axis not in old) for old, new in zip(before, after, strict=True)]
    if not {axis for axes in scattered for axis in axes} <= set(by_shards):
        return layout.pin(x_SVD.sum(axis=0), *names)
    rest = tuple(axis for axis in by_shards if not any(axis in axes for axes in scattered))

    def on_device(x_SVD: jax.Array) -> jax.Array:
        total = x_SVD.sum(axis=0)
        for dimension, axes in enumerate(scattered):
            if axes:
                total = jax.lax.psum_scatter(total, axes, scatter_dimension=dimension, tiled=True)
        return jax.lax.psum(total, rest) if rest else total

    return jax.shard_map(
        on_device, in_specs=PartitionSpec(by_shards, *before), out_specs=PartitionSpec(*after)
    )(x_SVD)  # fmt: skip
