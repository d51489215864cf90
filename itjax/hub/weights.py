"""A folder of safetensors <-> our tree of parameters, one tensor at a time, each part straight to the device that keeps it.

A tensor of theirs is one layer (and expert) of a leaf of ours. It is never turned around on the host: our dimensions are
strides in the file, so that a device's part of a leaf is a box of the file.

    layers/attn/q/kernel (L, D, N, H)    <-    model.layers.3.self_attn.q_proj.weight (N·H, D)
    of layer 3: D has stride 1, N has stride H·D, H has stride D; read as (N, H, D), transposed on the device

The host holds one such box at a time, and every process reads those of its own devices. The same strides say where a leaf
is written. L layers, E experts, V rows of the vocabulary, D width.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from itjax.base import tree
from itjax.base.files import write_whole
from itjax.hub import tensors
from itjax.hub.mxfp4 import mxfp4
from itjax.hub.names import Entry, is_left_out
from itjax.hub.tensors import Box, Reader, Tensor
from itjax.parallel import cluster

if TYPE_CHECKING:
    from itjax.models.model import Params

Convert = Callable[[str, jax.Array], Mapping[str, jax.Array]]  # path, one layer -> what is kept of it, by name

EMBEDDING, HEAD = "embed/kernel", "head/kernel"
TABLES = (EMBEDDING, HEAD)  # a row for each id
PACKED = 32  # numbers that share a scale
SHARD_BYTES = 5_000_000_000
MOST_FAULTS = 50  # lines of an error
COMPARED_ROWS = 1024  # of a head and an embedding at a time


@dataclass(frozen=True)
class Lie:
    """How one leaf of ours lies in tensors of theirs."""

    entry: Entry
    lead: tuple[int, ...]  # our first dimensions, layers and experts, which are read and written one by one
    shape: tuple[int, ...]  # our other dimensions
    strides: tuple[int, ...]  # of those, in elements of a tensor of theirs
    start: int
    expert: int  # elements from one expert to the next within a tensor; 0 where each has its own
    theirs: tuple[int, ...]  # the shape of a tensor of theirs

    @property
    def order(self) -> tuple[int, ...]:
        """Our other dimensions as they lie in the file, the outermost first."""
        return tuple(sorted(range(len(self.shape)), key=lambda n: (-self.strides[n], n)))

    def name(self, at: Sequence[int]) -> str:
        """The tensor of an index of the leading dimensions."""
        return self.entry.name.format(layer=at[0] if at else None, expert=at[-1] if at else None)

    def names(self) -> Iterator[str]:
        return iter(dict.fromkeys(map(self.name, itertools.product(*map(range, self.lead)))))

    def box(self, at: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> Box:
        """A part of our other dimensions, as the file has it."""
        start = self.start + sum(first * stride for first, stride in zip(starts, self.strides, strict=True))
        start += self.expert * at[-1] if self.expert else 0
        return Box(start, tuple(counts[n] for n in self.order), tuple(self.strides[n] for n in self.order))


def lies(entries: Sequence[Entry], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Lie]:
    """How every leaf lies in their tensors, by its path; `shapes` are those of our leaves."""
    outputs: dict[str, int] = {}  # of a tensor that several leaves share, all together
    for entry in entries:
        outputs[entry.name] = outputs.get(entry.name, 0) + math.prod(_parts(entry, shapes[entry.path])[2])
    return {entry.path: _lie(entry, shapes[entry.path], outputs[entry.name]) for entry in entries}


def _parts(entry: Entry, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Our shape in its layers and experts, inputs, and outputs."""
    num_lead = ("{layer}" in entry.name) + entry.experts
    border = num_lead + entry.contract
    return shape[:num_lead], shape[num_lead:border], shape[border:]


def _lie(entry: Entry, shape: tuple[int, ...], num_outputs: int) -> Lie:
    lead, inputs, outputs = _parts(entry, shape)
    num_inputs = math.prod(inputs)
    part = range(num_outputs)[entry.part] if entry.part is not None else range(num_outputs)
    assert len(part) == math.prod(outputs), (entry, shape, num_outputs)
    theirs: tuple[int, ...]
    if entry.path in TABLES:
        theirs, output_step, input_step = outputs, 1, 0
    elif not entry.contract:
        theirs, output_step, input_step = (num_outputs,), 1, 0
    elif entry.flip:
        theirs, output_step, input_step = (num_outputs, num_inputs), num_inputs, 1
    else:
        theirs, output_step, input_step = (num_inputs, num_outputs), 1, num_outputs
    strides = (
        *(stride * input_step for stride in _row_major(inputs)),
        *(stride * output_step * part.step for stride in _row_major(outputs)),
    )
    within = entry.experts and "{expert}" not in entry.name
    return Lie(
        entry,
        lead,
        (*inputs, *outputs),
        strides,
        start=part.start * output_step,
        expert=math.prod(theirs) if within else 0,
        theirs=(lead[-1], *theirs) if within else theirs,
    )


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[n + 1 :]) for n in range(len(shape)))


# --- reading ----------------------------------------------------------------------------------------------------------


def load(
    folder: str | Path,
    entries: Sequence[Entry],
    like: "Params",
    *,
    ids: tuple[int, int] | None = None,
    repeats: Sequence[Entry] = (),
    convert: Convert | None = None,
    kept: "Params | None" = None,
    reader: Reader | None = None,
) -> "Params":
    """The parameters of a folder, with the shapes, dtypes and shardings of `like`: ShapeDtypeStructs, one for each entry.

    Every process calls this, and reads what its own devices keep. All tensors are compared with `like` before any is
    read. `repeats` are tensors that may be there and have to be what another is: the head of a model with tied
    embeddings.

    `ids` is (how many ids the folder's tokenizer has, how many the run's has). The embedding and the head may have more
    rows than the folder: those of new ids become the mean of the folder's ids, and rows of no id that the folder lacks
    become 0. None: every row of the folder is an id, and every further row a new one.

    Where `kept` has other leaves than `like` (a quantised base has `layers/attn/q/kernel/codes` and `/scales` below the
    kernel's path), `convert` makes one layer of them, {"codes": ..., "scales": ...}, of one layer of the kernel.
    """
    place = Path(folder)
    leaves = {path: _located(leaf) for path, leaf in tree.flatten(like).items()}
    assert leaves.keys() == {entry.path for entry in entries}, leaves.keys() ^ {entry.path for entry in entries}
    found = tensors.of_folder(place)
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    lay = check(place, entries, shapes, found, repeats=repeats, grows=True)
    keeps = {path: _located(leaf) for path, leaf in tree.flatten(leaves if kept is None else kept).items()}
    params: dict[str, jax.Array] = {}
    with reader or Reader() as opened:
        for entry in repeats:
            if entry.name in found:
                _check_tied(place, found[entry.name], found[lay[entry.path].name(())], opened)
        for path, leaf in leaves.items():
            if path in keeps:
                whole = _fill(keeps[path], lay[path], found, opened)
                params[path] = _grown(whole, _rows(found, lay[path]), ids) if path in TABLES else whole
            else:
                assert convert is not None, f"{path}: what is kept of it differs, and nothing converts it"
                below = {sub: keeps[sub] for sub in keeps if sub.startswith(f"{path}{tree.SEPARATOR}")}
                params |= _converted(path, leaf, below, convert, lay[path], found, opened)
    return tree.unflatten(params)


def _located(leaf: Any) -> jax.ShapeDtypeStruct:
    """The leaf with a NamedSharding: whole on the first device where none is said."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        sharding = NamedSharding(Mesh(np.array(jax.local_devices()[:1]), ("all",)), P())
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _rows(found: Mapping[str, Tensor], lie: Lie) -> int:
    return found[lie.name(())].shape[0]


def check(
    folder: Path,
    entries: Sequence[Entry],
    shapes: Mapping[str, tuple[int, ...]],
    found: Mapping[str, Tensor],
    *,
    repeats: Sequence[Entry] = (),
    grows: bool = False,
) -> dict[str, Lie]:
    """How our leaves lie in the folder's tensors. Raises one ValueError that lists every tensor that does not fit.

    With `grows`, embedding and head may have fewer rows than ours.
    """
    lay = lies(entries, shapes)
    faults: dict[str, str] = {}
    wanted: dict[str, tuple[Entry, tuple[int, ...], tuple[str, ...]]] = {}
    for lie in lay.values():
        for name in lie.names():
            wanted |= {full: (lie.entry, shape, dtypes) for full, shape, dtypes in _expected(name, lie)}
    repeated = [entry for entry in repeats if entry.name in found]
    wanted |= {entry.name: (entry, lay[entry.path].theirs, tuple(tensors.FLOATS)) for entry in repeated}
    for name, (entry, shape, dtypes) in wanted.items():
        if fault := _fault(entry, shape, dtypes, found.get(name), grows=grows):
            faults[name] = fault
    for name in sorted(found.keys() - wanted.keys()):
        if not is_left_out(name):
            faults[name] = f"have {_words(found[name])}, and the model has no such parameter"
    if faults:
        listed = [f"  {folder.name}: {name}: {fault}" for name, fault in faults.items()]
        more = [f"  and {len(listed) - MOST_FAULTS} more"] if len(listed) > MOST_FAULTS else []
        raise ValueError(
            "\n".join(
                [
                    f"{folder}: {len(listed)} {'tensors do' if len(listed) > 1 else 'tensor does'} not fit config.json:",
                    *listed[:MOST_FAULTS],
                    *more,
                ]
            )
            + "\nGive the folder as it was published, with the config.json that belongs to the weights"
        )
    return lay


def _expected(name: str, lie: Lie) -> list[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """Name, shape and dtypes of the tensors, mostly one, that hold what the entry calls by this name."""
    if not lie.entry.packed:
        return [(name, lie.theirs, tuple(tensors.FLOATS))]
    groups = (*lie.theirs[:-1], lie.theirs[-1] // PACKED)
    return [(f"{name}_blocks", (*groups, PACKED // 2), ("U8",)), (f"{name}_scales", groups, ("U8",))]


def _fault(entry: Entry, shape: tuple[int, ...], dtypes: tuple[str, ...], tensor: Tensor | None, *, grows: bool) -> str:
    """What is wrong with a tensor; nothing where it fits."""
    if tensor is None:
        return f"have none, want {list(shape)}"
    if tensor.dtype not in dtypes:
        return f"have {_words(tensor)}, want one of {', '.join(dtypes)}; other numbers are not read"
    if grows and entry.path in TABLES and tensor.shape[1:] == shape[1:] and 0 < tensor.shape[0] <= shape[0]:
        return ""
    return "" if tensor.shape == shape else f"have {_words(tensor)}, want {list(shape)}"


def _words(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _check_tied(folder: Path, head: Tensor, embedding: Tensor, reader: Reader) -> None:
    """A head beside tied embeddings repeats them. Raises ValueError where it does not."""
    rows, width = embedding.shape
    same = head.shape == embedding.shape
    for start in range(0, rows if same else 0, COMPARED_ROWS):
        box = Box(start * width, (min(COMPARED_ROWS, rows - start), width), (width, 1))
        one, other = (reader.read(tensor, box).astype(np.float32) for tensor in (head, embedding))
        same = same and np.array_equal(one, other)
    if not same:
        raise ValueError(
            f"{folder}: {head.name}: differs from {embedding.name}, which is the head where tie_word_embeddings is true; "
            f'write "tie_word_embeddings": false into config.json, or remove this tensor'
        )


# --- boxes to devices -------------------------------------------------------------------------------------------------


def _fill(
    leaf: jax.ShapeDtypeStruct, lie: Lie, found: Mapping[str, Tensor], reader: Reader, *, fixed: tuple[int, ...] = ()
) -> jax.Array:
    """A leaf read tensor by tensor; with `fixed`, what is below these indices of its leading dimensions.

    Where a leading dimension is split over devices, a device keeps a stretch of it: in round r every device is given the
    r-th of its own. So a piece is one array over all devices, and each writes into its own part.
    """
    lead = lie.lead[len(fixed) :]
    splits = _entries(leaf.sharding, leaf.shape)
    own = leaf.sharding.shard_shape(leaf.shape)[: len(lead)]
    groups = tuple(extent // count for extent, count in zip(lead, own, strict=True))
    shape = (*groups, *(lie.shape[n] for n in lie.order))
    spec = P(*splits[: len(lead)], *(splits[len(lead) + n] for n in lie.order))
    sharding = NamedSharding(leaf.sharding.mesh, spec)
    whole = _zeros(leaf.shape, leaf.dtype, leaf.sharding)
    for at in itertools.product(*map(range, own)):

        def read(box: Sequence[tuple[int, int]], at: tuple[int, ...] = at) -> np.ndarray:
            chosen = (group[0] * count + number for group, count, number in zip(box, own, at, strict=False))
            values = _read((*fixed, *chosen), box[len(lead) :], lie, found, reader)
            return values.reshape(*(1,) * len(lead), *values.shape)

        piece = _assembled(shape, sharding, read)
        whole = _write(whole, piece, np.array(at, np.int32), order=lie.order)
        del piece
    return whole


def _entries(sharding: NamedSharding, shape: Sequence[int]) -> tuple[Any, ...]:
    return (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))


def _read(
    at: tuple[int, ...], part: Sequence[tuple[int, int]], lie: Lie, found: Mapping[str, Tensor], reader: Reader
) -> np.ndarray:
    """Of one layer and expert, a box of our other dimensions in the order of the file; rows that the file lacks are 0."""
    ours = [part[lie.order.index(n)] for n in range(len(lie.shape))]
    name, starts, counts = lie.name(at), [start for start, _ in ours], [stop - start for start, stop in ours]
    if lie.entry.packed:
        return _unpacked(found[f"{name}_blocks"], found[f"{name}_scales"], lie.box(at, starts, counts), lie, reader)
    if lie.entry.path not in TABLES:
        return _narrowed(reader.read(found[name], lie.box(at, starts, counts)))
    there = min(counts[0], max(0, found[name].shape[0] - starts[0]))
    if there == counts[0]:
        return _narrowed(reader.read(found[name], lie.box(at, starts, counts)))
    values = np.zeros(counts, tensors.FLOATS[found[name].dtype])
    if there:
        values[:there] = reader.read(found[name], lie.box(at, starts, (there, counts[1])))
    return _narrowed(values)


def _unpacked(blocks: Tensor, scales: Tensor, box: Box, lie: Lie, reader: Reader) -> np.ndarray:
    """A box of a tensor that is packed in four bits along its rows: whole groups are read, and cut."""
    first = box.start % lie.theirs[-1] % PACKED
    count = -(-(first + box.counts[-1]) // PACKED)  # groups
    outer, start = box.counts[:-1], box.start - first
    groups = Box(start // PACKED, (*outer, count), (*(stride // PACKED for stride in box.strides[:-1]), 1))
    half = PACKED // 2  # bytes of a group
    bytes_ = Box(start // 2, (*outer, count, half), (*(stride // 2 for stride in box.strides[:-1]), half, 1))
    values = mxfp4(reader.read(blocks, bytes_), reader.read(scales, groups))
    return values[..., first : first + box.counts[-1]]


def _narrowed(values: np.ndarray) -> np.ndarray:
    """float64 as float32: what devices keep."""
    return values.astype(np.float32) if values.dtype == np.float64 else values


def _assembled(
    shape: tuple[int, ...], sharding: NamedSharding, read: Callable[[Sequence[tuple[int, int]]], np.ndarray]
) -> jax.Array:
    """An array over all devices of which this process reads its own parts, each once; the host holds one at a time."""
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        box = tuple(part.indices(extent)[:2] for part, extent in zip(index, shape, strict=True))
        devices.setdefault(box, []).append(device)
    arrays = []
    for box, keepers in devices.items():
        values = read(box)
        arrays += [jax.device_put(values, device) for device in keepers]
        jax.block_until_ready(arrays[-len(keepers) :])  # the host's memory is free again
        del values
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


def _write(whole: jax.Array, piece: jax.Array, at: np.ndarray, *, order: tuple[int, ...]) -> jax.Array:
    """The leaf with a piece written at each device's own index `at`, in place."""
    return _writer(whole.sharding, piece.sharding, order)(whole, piece, at)


@functools.lru_cache(maxsize=256)
def _writer(sharding: NamedSharding, piece_sharding: NamedSharding, order: tuple[int, ...]) -> Callable[..., jax.Array]:
    def local(whole: jax.Array, piece: jax.Array, at: jax.Array) -> jax.Array:
        num_lead = piece.ndim - len(order)
        ours = (*range(num_lead), *(num_lead + order.index(n) for n in range(len(order))))
        turned = piece.transpose(ours).astype(whole.dtype)
        return jax.lax.dynamic_update_slice(whole, turned, (*(at[n] for n in range(num_lead)), *(0,) * len(order)))

    everywhere = (sharding.spec, piece_sharding.spec, P())
    mapped = jax.shard_map(local, mesh=sharding.mesh, in_specs=everywhere, out_specs=sharding.spec)
    return jax.jit(mapped, donate_argnums=0)


def _converted(
    path: str,
    leaf: jax.ShapeDtypeStruct,
    kept: Mapping[str, jax.ShapeDtypeStruct],
    convert: Convert,
    lie: Lie,
    found: Mapping[str, Tensor],
    reader: Reader,
) -> dict[str, jax.Array]:
    """The leaves that are kept in place of this one, made layer by layer."""
    names = {sub.removeprefix(f"{path}{tree.SEPARATOR}"): sub for sub in kept}
    wholes = {name: _zeros(kept[sub].shape, kept[sub].dtype, kept[sub].sharding) for name, sub in names.items()}
    shardings = {name: kept[sub].sharding for name, sub in names.items()}

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
    def put(wholes: dict[str, jax.Array], layer: jax.Array, number: jax.Array) -> dict[str, jax.Array]:
        made = convert(path, layer)
        assert made.keys() == wholes.keys(), (path, made.keys(), wholes.keys())
        return {
            name: jax.lax.dynamic_update_index_in_dim(whole, made[name].astype(whole.dtype), number, 0)
            for name, whole in wholes.items()
        }

    assert lie.lead, f"{path}: only what layers have can be converted"
    one = NamedSharding(leaf.sharding.mesh, P(*_entries(leaf.sharding, leaf.shape)[1:]))
    layer = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=one)
    for number in range(lie.lead[0]):
        wholes = put(wholes, _fill(layer, lie, found, reader, fixed=(number,)), np.int32(number))
    return {sub: wholes[name] for name, sub in names.items()}


def _grown(table_VD: jax.Array, num_rows: int, ids: tuple[int, int] | None) -> jax.Array:
    """The table with the mean of the folder's ids in the rows of new ones.

    known 3, now 5, of 4 rows in the folder:  [a, b, c, (padding)] -> [a, b, c, mean(a, b, c), mean(a, b, c), 0]

    Source: Alpaca's smart_tokenizer_and_embedding_resize.
    """
    known, now = (num_rows, table_VD.shape[0]) if ids is None else ids
    assert known <= num_rows, (ids, num_rows)
    assert now <= table_VD.shape[0], (ids, table_VD.shape)
    if now <= known:
        return table_VD

    def grow(table_VD: jax.Array) -> jax.Array:
        row_V1 = jnp.arange(table_VD.shape[0])[:, None]
        total_1D = jnp.where(row_V1 < known, table_VD.astype(jnp.float32), 0).sum(0, keepdims=True)  # sums in float32
        mean_1D = (total_1D / known).astype(table_VD.dtype)
        return jnp.where((row_V1 >= known) & (row_V1 < now), mean_1D, table_VD)

    return jax.jit(grow, donate_argnums=0, out_shardings=table_VD.sharding)(table_VD)


# --- writing ----------------------------------------------------------------------------------------------------------


def save(
    folder: str | Path,
    params: "Params",
    entries: Sequence[Entry],
    *,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the parameters into a folder as safetensors, in shards of at most `shard_bytes` where a tensor is not larger.

    Every process calls this; the first one writes. The host holds one tensor at a time. `dtype` is of all tensors:
    float64, float32, float16 or bfloat16.
    """
    leaves = tree.flatten(params)
    code = code_of(dtype)
    shapes = {entry.path: leaves[entry.path].shape for entry in entries}
    homes = _homes(lies(entries, shapes))
    theirs = {name: parts[0][0].theirs for name, parts in homes.items()}
    files = _files(theirs, tensors.WIDTHS[code], shard_bytes)
    for file, names in files.items():
        values = (_gathered(homes[name], leaves, tensors.FLOATS[code]) for name in names)
        if cluster.writes():
            tensors.write(Path(folder) / file, {name: theirs[name] for name in names}, code, values)
        else:
            for _ in values:  # takes part
                pass
    if len(files) > 1 and cluster.writes():
        size = sum(math.prod(shape) for shape in theirs.values()) * tensors.WIDTHS[code]
        weight_map = {name: file for file, names in files.items() for name in names}
        fields = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_whole(Path(folder) / tensors.INDEX, tensors.dump_json(fields))


def code_of(dtype: str) -> str:
    """The format's code of a dtype's name. Raises ValueError for one that is not written."""
    for name, code in ((str(known), code) for known, code in tensors.CODES.items()):
        if name == dtype:
            return code
    raise ValueError(f"dtype: {dtype!r} is not written; choose one of {', '.join(map(str, tensors.CODES))}")


def _homes(lay: Mapping[str, Lie]) -> dict[str, list[tuple[Lie, tuple[int, ...]]]]:
    """Every tensor of theirs, layer by layer, with the leaves (and where in them) that it is made of."""
    found: dict[str, list[tuple[Lie, tuple[int, ...]]]] = {}
    num_layers = max((lie.lead[0] for lie in lay.values() if lie.lead), default=0)
    flat = [lie for lie in lay.values() if not lie.lead]
    first = [lie for lie in flat if lie.entry.path == EMBEDDING]
    for lie in first:
        found.setdefault(lie.name(()), []).append((lie, ()))
    for number in range(num_layers):
        for lie in lay.values():
            if lie.lead:
                for further in itertools.product(*map(range, lie.lead[1:])):
                    found.setdefault(lie.name((number, *further)), []).append((lie, (number, *further)))
    for lie in flat:
        if lie not in first:
            found.setdefault(lie.name(()), []).append((lie, ()))
    return found


def _files(shapes: Mapping[str, tuple[int, ...]], width: int, shard_bytes: int) -> dict[str, list[str]]:
    """Names of tensors by file, in order: a file is begun where the next tensor would make the last too large."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        more = math.prod(shape) * width
        if shards[-1] and size + more > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += more
    if len(shards) == 1:
        return {tensors.SINGLE: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": names for n, names in enumerate(shards, start=1)}


def _gathered(
    parts: Sequence[tuple[Lie, tuple[int, ...]]], leaves: Mapping[str, jax.Array], dtype: np.dtype
) -> np.ndarray:
    """One tensor of theirs, from the devices that keep its parts."""
    theirs = parts[0][0].theirs
    if len(parts) == 1:
        return _piece(*parts[0], leaves, dtype).reshape(theirs)
    assert sum(math.prod(lie.shape) for lie, _ in parts) == math.prod(theirs), parts[0][0].entry
    whole = np.empty(math.prod(theirs), dtype)
    for lie, at in parts:
        box = lie.box(at, (0,) * len(lie.shape), lie.shape)
        strides = tuple(stride * dtype.itemsize for stride in box.strides)
        np.lib.stride_tricks.as_strided(whole[box.start :], box.counts, strides)[...] = _piece(lie, at, leaves, dtype)
    return whole.reshape(theirs)


def _piece(lie: Lie, at: tuple[int, ...], leaves: Mapping[str, jax.Array], dtype: np.dtype) -> np.ndarray:
    """One leading index of a leaf, in the order of the file."""
    leaf = leaves[lie.entry.path]
    on_device = np.dtype(np.float32) if dtype == np.float64 else dtype
    piece = _taker(leaf.sharding, lie.shape, lie.order, on_device)(leaf, np.array(at, np.int32))
    values = np.asarray(piece if piece.is_fully_addressable else piece.addressable_data(0))
    return values.astype(dtype, copy=False)


@functools.lru_cache(maxsize=256)
def _taker(
    sharding: jax.sharding.Sharding, shape: tuple[int, ...], order: tuple[int, ...], dtype: np.dtype
) -> Callable[..., jax.Array]:
    """Takes one leading index of a leaf and turns it as the file has it; on every process where there are several."""

    def take(leaf: jax.Array, at: jax.Array) -> jax.Array:
        num_lead = leaf.ndim - len(shape)
        starts: list[Any] = [*(at[n] for n in range(num_lead)), *(0,) * len(shape)]
        piece = jax.lax.dynamic_slice(leaf, starts, (*(1,) * num_lead, *shape)).reshape(shape)
        return piece.transpose(order).astype(dtype)

    if sharding.is_fully_addressable or not isinstance(sharding, NamedSharding):
        return jax.jit(take)
    return jax.jit(take, out_shardings=NamedSharding(sharding.mesh, P()))
