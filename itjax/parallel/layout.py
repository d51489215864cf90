"""Names of axes to devices: one table says which mesh axes each dimension of an array is split over.

A parameter carries its names beside it, an activation says them in `pin`; nothing else in the package speaks of shards.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from itjax.base.records import PackedBatch

Rules = Mapping[str, tuple[str, ...]]

# Logical name -> mesh axes, outermost first. A name with no axes is whole on every device.
RULES: Rules = {
    "batch": ("data", "fsdp", "expert"),
    "length": ("context",),
    "shards": ("data", "fsdp", "expert", "context"),  # of the positions of a batch
    "slots": (),  # of a cache
    "layers": (),
    "embed": ("fsdp", "expert", "context"),
    "norm": (),  # of so few numbers that to gather them would take longer than to have them
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_size": (),
    "ffn": ("tensor",),
    "experts": ("expert",),
    "routes": (),  # experts, where a router tells all of them apart
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
    return math.prod(sizes[axis] for axis in split((name,), (extent,))[0])


def split(names: Sequence[str | None], shape: Sequence[int]) -> list[tuple[str, ...]]:
    """The axes of the mesh in scope that split each dimension of an array."""
    return _splitters(names, shape, scope(), RULES)


def per_device(
    function: Callable[..., jax.Array],
    *arrays: Any,
    names: Sequence[Any],
    everywhere: bool = True,
    tracked: bool = True,
    out: tuple[PartitionSpec, Sequence[int]] | None = None,
) -> jax.Array:
    """`function` of the part of each array that a device holds; the result is laid out like the first array, or as `out`
    says: names and shape of the whole.

    `names` has a tree for every tree of arrays, with PartitionSpecs of logical names. What the function is given varies over
    all axes of the mesh, so it adds up over the axes that do not split its result; or not `everywhere` but over those axes
    that split something, which then are the axes that split the first array. Without a mesh: a plain call.

    A function that jax cannot follow, such as kernels that do not say over which axes their results vary, is not `tracked`:
    gradients are as right, but cross axes that split nothing once in vain.
    """
    sizes = scope()
    if math.prod(sizes.values()) == 1:
        return function(*arrays)

    def part(x: jax.Array, logical: PartitionSpec) -> PartitionSpec:
        return spec(tuple(logical), x.shape, sizes, RULES)

    specs = tuple(jax.tree.map(part, tree, logical) for tree, logical in zip(arrays, names, strict=True))
    landing = specs[0] if out is None else spec(tuple(out[0]), out[1], sizes, RULES)
    parted = {axis for one in jax.tree.leaves(specs) for entry in one for axis in _axes(entry)}
    axes = tuple(axis for axis in sizes if everywhere or axis in parted)

    def varied(x: jax.Array) -> jax.Array:
        missing = tuple(axis for axis in axes if axis not in jax.typeof(x).manual_axis_type.varying)
        return jax.lax.pcast(x, missing, to="varying")

    def local(*parts: Any) -> jax.Array:
        return function(*jax.tree.map(varied, parts))

    return jax.shard_map(local, in_specs=specs, out_specs=landing, check_vma=tracked)(*arrays)


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that one entry of a PartitionSpec names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def shardings(axes: Any, mesh: Mesh, shapes: Any) -> Any:
    """Where every array of a tree lives: `axes` are PartitionSpecs of logical names, `shapes` has arrays or their shapes."""
    sizes = dict(mesh.shape)

    def one(names: PartitionSpec, array: Any) -> NamedSharding:
        padded = (*names, *(None,) * (len(array.shape) - len(names)))
        return NamedSharding(mesh, spec(padded, array.shape, sizes, RULES))

    return jax.tree.map(one, axes, shapes, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def located(shapes: Any, shardings: Any) -> Any:
    """The shapes of a tree of arrays, each with where it is to live."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def batch_sharding(mesh: Mesh, rows: int, length: int) -> NamedSharding:
    """Rows of a batch over the batch axes that divide them, positions over the axes of the length."""
    return NamedSharding(mesh, spec(("batch", "length"), (rows, length), dict(mesh.shape), RULES))


def batch_shapes(mesh: Mesh, *, rows: int, length: int) -> PackedBatch:
    """A global batch without numbers, for whoever compiles before there is data."""
    sharding = batch_sharding(mesh, rows, length)
    kinds = PackedBatch(*(np.float32 if name == "weights_BT" else np.int32 for name in PackedBatch._fields))
    return jax.tree.map(lambda kind: jax.ShapeDtypeStruct((rows, length), kind, sharding=sharding), kinds)


def batch_copies(mesh: Mesh, rows: int) -> int:
    """How many devices along the batch axes compute the same rows, because the axes do not divide them; 1 is none."""
    shards = math.prod(mesh.shape.get(axis, 1) for axis in RULES["batch"])
    return shards // (rows // batch_sharding(mesh, rows, 1).shard_shape((rows, 1))[0])


def local_rows(mesh: Mesh, rows: int) -> list[int]:
    """Which rows of a global batch of `rows` this process must hold, in order."""
    indices = batch_sharding(mesh, rows, 1).addressable_devices_indices_map((rows, 1))
    return sorted({row for index in indices.values() if index for row in range(*index[0].indices(rows))})


def place(local: PackedBatch, mesh: Mesh, *, rows: int) -> PackedBatch:
    """This process's rows of a global batch of `rows` (numpy, whole rows) as its part of the global arrays."""
    sharding = batch_sharding(mesh, rows, local.tokens_BT.shape[1])
    if jax.process_count() == 1:
        return jax.device_put(local, sharding)
    held = np.array(local_rows(mesh, rows))

    def globally(x_BT: np.ndarray) -> jax.Array:
        def box(index: tuple[slice, ...] | None) -> np.ndarray:
            """Rows by their numbers in the global batch; of each, the positions of one device."""
            assert index is not None
            return x_BT[np.searchsorted(held, np.arange(rows)[index[0]]), index[1]]

        return jax.make_array_from_callback((rows, x_BT.shape[1]), sharding, box)

    return jax.tree.map(globally, local)
