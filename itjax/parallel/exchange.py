"""What devices give each other by instructions of our own, where the compiler would send more.

    look_up   rows of a table whose columns are split: numbers of tokens travel, and what was found; the table stays
    added     sums of all shards, each device the part it keeps: a reduce-scatter on every platform
    gather    kernels for a product, whose gradients are reduce-scattered

B rows, T positions, V vocabulary, D width, S shards of the positions of a batch.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from itjax.parallel import layout, rings

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
                total = rings.sum_scatter(total, axes, dimension=dimension)
        return jax.lax.psum(total, rest) if rest else total

    return jax.shard_map(
        on_device, in_specs=PartitionSpec(by_shards, *before), out_specs=PartitionSpec(*after)
    )(x_SVD)  # fmt: skip


def gather(parts: Any, names: Any, shapes: Any, *, keep: Sequence[str], dtypes: Any) -> Any:
    """In `per_device`: arrays of these whole `shapes`, put together over what splits dimensions of names other than `keep`.

    They travel in the types of `dtypes`. Their gradients are added up in their own types and reduce-scattered: each device
    keeps what belongs to its part.
    """

    def whole(x: jax.Array, logical: PartitionSpec, shape: Sequence[int], dtype: Any) -> jax.Array:
        return _whole(x, _gathered(logical, shape, keep), (x.dtype.name, jnp.dtype(dtype).name))

    return jax.tree.map(whole, parts, names, shapes, dtypes)


def gathered_axes(names: Any, shapes: Any, *, keep: Sequence[str]) -> set[str]:
    """The mesh axes over which `gather` puts arrays together."""
    found: set[str] = set()

    def note(logical: PartitionSpec, shape: Sequence[int]) -> None:
        found.update(axis for _, axes in _gathered(logical, shape, keep) for axis in axes)

    jax.tree.map(note, names, shapes)
    return found


Moves = tuple[tuple[int, tuple[str, ...]], ...]  # (dimension, mesh axes)


def _gathered(logical: PartitionSpec, shape: Sequence[int], keep: Sequence[str]) -> Moves:
    by_dimension = enumerate(layout.split(tuple(logical), shape))
    return tuple((dimension, axes) for dimension, axes in by_dimension if axes and logical[dimension] not in keep)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _whole(x: jax.Array, moves: Moves, types: tuple[str, str]) -> jax.Array:
    """An array put together, in the second of the types (its own, and that in which it travels)."""
    x = x.astype(types[1])
    for dimension, axes in moves:
        x = rings.all_gather(x, axes, dimension=dimension)
    return x


def _whole_forward(x: jax.Array, moves: Moves, types: tuple[str, str]) -> tuple[jax.Array, None]:
    return _whole(x, moves, types), None


def _whole_backward(moves: Moves, types: tuple[str, str], _: None, grad: jax.Array) -> tuple[jax.Array]:
    grad = grad.astype(types[0])
    for dimension, axes in moves:
        grad = rings.sum_scatter(grad, axes, dimension=dimension)
    return (grad,)


_whole.defvjp(_whole_forward, _whole_backward)
