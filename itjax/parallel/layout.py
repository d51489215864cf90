"""Names of axes to devices: one table says which mesh axes each dimension of an array is split over.

A parameter carries its names beside it, an activation says them in `pin`; nothing else in the package speaks of shards.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from itjax.base.records import PackedBatch

Rules = Mapping[str, tuple[str, ...]]

# Logical name -> mesh axes, outermost first. A name with no axes is whole on every device.
RULES: Rules = {
    "batch": ("data", "fsdp"),
    "length": (),
    "layers": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_size": (),
    "ffn": ("tensor",),
    "vocab": ("tensor",),
    "rank": (),
}


def spec(names: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int], rules: Rules) -> PartitionSpec:
    """Where each dimension lands on a mesh with axes of these `sizes`.

    names  ("batch", "length", "embed")   shape  (8, 512, 64)   sizes  {"data": 2, "fsdp": 2, "tensor": 2}
    spec   (("data", "fsdp"), None, None)      fsdp already splits the batch, so "embed" stays whole here

    A mesh axis splits one dimension, the first that asks for it. A dimension that an axis does not divide is whole over
    that axis: correct on every mesh, and the layout that is printed for a run shows it.
    """
    entries = _splitters(names, shape, sizes, rules)
    return PartitionSpec(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in entries))


def _splitters(
    names: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int], rules: Rules
) -> list[tuple[str, ...]]:
    """The mesh axes that split each dimension."""
    assert len(names) == len(shape), (names, shape)
    taken: set[str] = set()
    entries = []
    for name, extent in zip(names, shape, strict=True):
        axes: list[str] = []
        for axis in rules[name] if name is not None else ():
            parts = math.prod(sizes[chosen] for chosen in axes) * sizes.get(axis, 1)
            if axis not in taken and sizes.get(axis, 1) > 1 and extent % parts == 0:
                axes.append(axis)
        taken.update(axes)
        entries.append(tuple(axes))
    return entries


def scope() -> dict[str, int]:
    """Sizes of the axes of the mesh in scope (`jax.set_mesh`); empty without one."""
    return dict(jax.sharding.get_abstract_mesh().shape)


def pin(x: jax.Array, *names: str | None) -> jax.Array:
    """The same array, laid out by the names of its dimensions; identity when no mesh is in scope."""
    sizes = scope()
    if math.prod(sizes.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape, sizes, RULES))


def ways(name: str, extent: int) -> int:
    """Into how many parts the mesh in scope splits a dimension of this name and extent."""
    sizes = scope()
    return math.prod(sizes[axis] for axis in _splitters((name,), (extent,), sizes, RULES)[0])


def shardings(axes: Any, mesh: Mesh, shapes: Any) -> Any:
    """Where every array of a tree lives: `axes` are PartitionSpecs of logical names, `shapes` has arrays or their shapes."""
    sizes = dict(mesh.shape)

    def one(names: PartitionSpec, array: Any) -> NamedSharding:
        padded = (*names, *(None,) * (len(array.shape) - len(names)))
        return NamedSharding(mesh, spec(padded, array.shape, sizes, RULES))

    return jax.tree.map(one, axes, shapes, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def batch_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Rows of a batch over the batch axes that divide them, positions whole."""
    return NamedSharding(mesh, spec(("batch",), (rows,), dict(mesh.shape), RULES))


def batch_copies(mesh: Mesh, rows: int) -> int:
    """How many devices along the batch axes compute the same rows, because the axes do not divide them; 1 is none."""
    shards = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    return shards // (rows // batch_sharding(mesh, rows).shard_shape((rows,))[0])


def local_rows(mesh: Mesh, rows: int) -> list[int]:
    """Which rows of a global batch of `rows` this process must hold, in order."""
    indices = batch_sharding(mesh, rows).addressable_devices_indices_map((rows,))
    return sorted({row for index in indices.values() if index for row in range(*index[0].indices(rows))})


def place(local: PackedBatch, mesh: Mesh, *, rows: int) -> PackedBatch:
    """This process's rows of a global batch of `rows` (numpy) as its part of the global arrays."""
    sharding = batch_sharding(mesh, rows)
    if jax.process_count() == 1:
        return jax.device_put(local, sharding)

    def globally(x_BT: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, x_BT, (rows, *x_BT.shape[1:]))

    return jax.tree.map(globally, local)
