"""Rows that are split over the mesh axis `context`: each device has every so many stripes of a row.

    4 devices, stripes of 2    device   0 0 1 1 2 2 3 3 3 3 2 2 1 1 0 0 0 0 1 1 ...

Causal attention makes late positions dearer than early ones, and documents make that begin anew anywhere. Contiguous parts
would be of uneven work and the two ends of a row, as without packing, too; stripes that are dealt out forwards and backwards
in turn are even whatever is packed.

B rows, T positions, C devices along the axis, S positions in a stripe, M stripes that a device gets from each other.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from itjax.parallel import layout

LONGEST = 512  # positions in a stripe, at most: several blocks of a kernel, and many stripes in a long row


class Cut(NamedTuple):
    """How the mesh in scope cuts rows of some length."""

    axes: tuple[str, ...]
    parts: int  # C
    size: int  # S


def cut(length: int) -> Cut:
    """Raises ValueError where rows of this length do not divide into stripes that devices can exchange evenly."""
    sizes = layout.scope()
    axes = tuple(axis for axis in layout.RULES["length"] if sizes.get(axis, 1) > 1)
    parts = math.prod(sizes[axis] for axis in axes)
    if length % parts**2:
        raise ValueError(
            f"config.length: {length} positions do not divide over parallel.context {parts}, which needs a multiple of "
            f"{parts**2}; the next one is {-(-length // parts**2) * parts**2}"
        )
    share = length // parts**2
    return Cut(axes, parts, max(size for size in range(1, min(share, LONGEST) + 1) if share % size == 0))


def striped(x: jax.Array) -> jax.Array:
    """(B, T, ...) in the order of positions -> in the order of stripes: first those of device 0."""
    axes, parts, size = cut(x.shape[1])

    def exchange(x_BT: jax.Array) -> jax.Array:
        x_BMCS = _turned(x_BT.reshape(x_BT.shape[0], -1, parts, size, *x_BT.shape[2:]), jax.lax.axis_index(axes))
        return jax.lax.all_to_all(x_BMCS, axes, split_axis=2, concat_axis=1, tiled=True).reshape(x_BT.shape)

    return x if parts == 1 else _exchanged(exchange, x)


def natural(x: jax.Array) -> jax.Array:
    """The inverse of `striped`."""
    axes, parts, size = cut(x.shape[1])

    def exchange(x_BT: jax.Array) -> jax.Array:
        x_BCMS = x_BT.reshape(x_BT.shape[0], parts, -1, size, *x_BT.shape[2:])
        x_B1CMS = jax.lax.all_to_all(x_BCMS, axes, split_axis=1, concat_axis=2, tiled=True)
        x_BMCS = x_B1CMS.reshape(x_BCMS.shape).swapaxes(1, 2)
        return _turned(x_BMCS, jax.lax.axis_index(axes)).reshape(x_BT.shape)

    return x if parts == 1 else _exchanged(exchange, x)


def together(x: jax.Array, cut: Cut) -> jax.Array:
    """In `per_device`: the stripes of all devices, (B, T/C, ...) -> (B, T, ...) in the order of positions."""
    return in_order(jax.lax.all_gather(x, cut.axes, axis=1, tiled=True), cut)


def in_order(x: jax.Array, cut: Cut) -> jax.Array:
    """(B, T, ...), whole rows in the order of stripes -> in the order of positions."""
    x_BCMS = x.reshape(x.shape[0], cut.parts, -1, cut.size, *x.shape[2:])
    return _turned(x_BCMS.swapaxes(1, 2), 0).reshape(x.shape)


def in_stripes(x: jax.Array, cut: Cut) -> jax.Array:
    """The inverse of `in_order`."""
    x_BMCS = x.reshape(x.shape[0], -1, cut.parts, cut.size, *x.shape[2:])
    return _turned(x_BMCS, 0).swapaxes(1, 2).reshape(x.shape)


def _turned(x_BMCS: jax.Array, chunk: jax.Array | int) -> jax.Array:
    """Every other turn backwards, of those that the given chunk of a row has; the inverse is the same."""
    turns = x_BMCS.shape[1]
    is_backwards_M = (chunk * turns + jnp.arange(turns)) % 2 == 1
    mask = is_backwards_M.reshape(1, -1, *(1,) * (x_BMCS.ndim - 2))
    return jnp.where(mask, x_BMCS[:, :, ::-1], x_BMCS)


def _exchanged(exchange: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    names = PartitionSpec("batch", "length", *(None,) * (x.ndim - 2))
    return layout.per_device(exchange, x, names=(names,), everywhere=False)
