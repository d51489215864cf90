"""Along a mesh axis, groups of devices that lie in one direction of the machine: what libtpu has fast instructions for.

    axis of 8 on a torus of 4 x 2     devices of the axis   0 1 | 2 3 | 4 5 | 6 7      sizes  4 2
                                      groups of digit 0     0 2 4 6 and 1 3 5 7
                                      groups of digit 1     0 1, 2 3, 4 5 and 6 7

Over the whole of an axis that takes several directions libtpu reduces everything to everybody and then cuts; group by group
it scatters, and gathers. Between slices only what a slice has not got itself travels.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from itjax.parallel import layout

_SIZES: dict[
    tuple[tuple[str, int], ...], dict[str, tuple[int, ...]]
] = {}  # shape of a mesh -> sizes of each axis' digits


def learn(mesh: Mesh) -> None:
    """Looks where the devices of a mesh are: tracing, which has only its shape, asks later."""
    is_tpu = mesh.devices.flat[0].platform == "tpu"
    _SIZES[tuple(mesh.shape.items())] = {
        axis: digits([_place(device) for device in np.moveaxis(mesh.devices, number, 0).reshape(size, -1)[:, 0]])
        for number, (axis, size) in enumerate(mesh.shape.items())
        if is_tpu and size > 1
    }


def _place(device: jax.Device) -> tuple[int, ...]:
    return (getattr(device, "slice_index", None) or 0, *device.coords, getattr(device, "core_on_chip", 0))


def digits(places: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Sizes of the digits that number these places, one direction each, the last one fastest.

    (0, 0) (0, 1) (1, 0) (1, 1) (2, 0) (2, 1)   ->   3 2
    Where places go several ways at once, those that are left are one digit.
    """
    found: list[int] = []
    stride, first = 1, np.array(places[0])
    while stride < len(places):
        left = [np.flatnonzero(np.array(place) != first) for place in places[::stride]]
        count = 1
        while count < len(left) and len(left[count]) == 1 and left[count][0] == left[1][0]:
            count += 1
        if count == 1 or len(left) % count:
            count = len(left)
        found.append(count)
        stride *= count
    return tuple(reversed(found))


def sizes(axis: str) -> tuple[int, ...]:
    """The sizes of the digits of an axis of the mesh in scope."""
    scope = layout.scope()
    return _SIZES.get(tuple(scope.items()), {}).get(axis, (scope[axis],))


def _groups(sizes: Sequence[int], digit: int) -> list[list[int]]:
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return np.moveaxis(numbers, digit, -1).reshape(-1, sizes[digit]).tolist()


def all_gather(x: jax.Array, axes: Sequence[str], *, dimension: int) -> jax.Array:
    """In `per_device`: the parts of all devices along these axes, one behind the other."""
    for axis in reversed(axes):
        if len(ways := sizes(axis)) == 1:
            x = jax.lax.all_gather(x, axis, axis=dimension, tiled=True)
            continue
        for digit in range(len(ways)):
            x = jax.lax.all_gather(x, axis, axis=dimension + digit, axis_index_groups=_groups(ways, digit))
        after = x.shape[dimension + len(ways) + 1 :]
        x = x.reshape(*x.shape[:dimension], math.prod(x.shape[dimension : dimension + len(ways) + 1]), *after)
    return x


def sum_scatter(x: jax.Array, axes: Sequence[str], *, dimension: int) -> jax.Array:
    """In `per_device`: the sum over these axes, of which each device gets its part."""
    for axis in axes:
        if len(ways := sizes(axis)) == 1:
            x = jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)
            continue
        x = x.reshape(*x.shape[:dimension], *ways, x.shape[dimension] // math.prod(ways), *x.shape[dimension + 1 :])
        for digit in reversed(range(len(ways))):
            groups = _groups(ways, digit)
            x = jax.lax.psum_scatter(x, axis, scatter_dimension=dimension + digit, axis_index_groups=groups)
    return x
