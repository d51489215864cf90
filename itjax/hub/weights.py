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
from fnmatch import fnmatchcase
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
from itjax.hub.names import Entry
from itjax.hub.tensors import Box, Reader, Tensor
from itjax.parallel import cluster

if TYPE_CHECKING:
    from itjax.models.model import Params

Convert = Callable[[str, jax.Array], Mapping[str, jax.Array]]  # path, one layer -> what is kept of it, by name

EMBEDDING, HEAD = "embed/kernel", "head/kernel"
TABLES = (EMBEDDING, HEAD)  # a row for each id
HEAD_NAME = "lm_head.weight"  # what a folder calls a head, which one with tied embeddings may repeat
SHARD_BYTES = 5_000_000_000
MOST_FAULTS = 50  # lines of an error
COMPARED_ROWS = 1024  # of a head and an embedding at a time


@dataclass(frozen=True)
class Lie:
    """How one leaf of ours lies in tensors of theirs."""

    entry: Entry
    lead: tuple[int, ...]  # our first dimensions, which have a tensor for each index: (L,), (L, E) or ()
    shape: tuple[int, ...]  # our other dimensions
    strides: tuple[int, ...]  # of those, in elements of a tensor of theirs
    start: int
    theirs: tuple[int, ...]  # the shape of a tensor of theirs

    @property
    def order(self) -> tuple[int, ...]:
        """Our other dimensions as they lie in the file, the outermost first."""
        return tuple(sorted(range(len(self.shape)), key=lambda n: (-self.strides[n], n)))

    def name(self, at: Sequence[int]) -> str:
        """The tensor of an index of the leading dimensions."""
        fields = [field for field in ("layer", "expert") if f"{{{field}}}" in self.entry.name]
        return self.entry.name.format(**dict(zip(fields, at, strict=True)))

    def names(self) -> Iterator[str]:
        return map(self.name, itertools.product(*map(range, self.lead)))

    def box(self, starts: Sequence[int], counts: Sequence[int]) -> Box:
        """A part of our other dimensions, as the file has it."""
        start = self.start + sum(first * stride for first, stride in zip(starts, self.strides, strict=True))
        return Box(start, tuple(counts[n] for n in self.order), tuple(self.strides[n] for n in self.order))


def lies(entries: Sequence[Entry], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Lie]:
    """How every leaf lies in their tensors, by its path; `shapes` are those of our leaves."""
    outputs: dict[str, int] = {}  # of a tensor that several leaves share, all together
    for entry in entries:
        outputs[entry.name] = outputs.get(entry.name, 0) + math.prod(_parts(entry, shapes[entry.path])[2])
    return {entry.path: _lie(entry, shapes[entry.path], outputs[entry.name]) for entry in entries}


def _parts(entry: Entry, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Our shape in its leading dimensions, (experts within a tensor and) inputs, and outputs."""
    num_lead = sum(field in entry.name for field in ("{layer}", "{expert}"))
    num_whole = int(entry.experts and "{expert}" not in entry.name)
    border = num_lead + num_whole + entry.contract
    return shape[:num_lead], shape[num_lead:border], shape[border:]


def _lie(entry: Entry, shape: tuple[int, ...], num_outputs: int) -> Lie:
    lead, before, outputs = _parts(entry, shape)
    experts, inputs = before[: len(before) - entry.contract], before[len(before) - entry.contract :]
    num_inputs = math.prod(inputs)
    rows: tuple[int, ...]
    part = range(num_outputs)[entry.part] if entry.part is not None else range(num_outputs)
    assert len(part) == math.prod(outputs), (entry, shape, num_outputs)
    if entry.contract and entry.flip:
        rows, output_step, input_step = (num_outputs, num_inputs), num_inputs, 1
    elif entry.contract:
        rows, output_step, input_step = (num_inputs, num_outputs), 1, num_outputs
    else:
        rows, output_step, input_step = (num_outputs,), 1, 0
    inner = outputs if entry.path in TABLES else rows
    strides = (
        *(stride * math.prod(inner) for stride in _row_major(experts)),
        *(stride * input_step for stride in _row_major(inputs)),
        *(stride * output_step * part.step for stride in _row_major(outputs)),
    )
    return Lie(entry, lead, (*before, *outputs), strides, part.start * output_step, (*experts, *inner))


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[n + 1 :]) for n in range(len(shape)))


# --- reading ----------------------------------------------------------------------------------------------------------


def load(
    folder: str | Path,
    entries: Sequence[Entry],
    like: "Params",
    *,
    ids: tuple[int, int] | None = None,
    ignored: Sequence[str] = (),
    convert: Convert | None = None,
    kept: "Params | None" = None,
    reader: Reader | None = None,
) -> "Params":
    """The parameters of a folder, with the shapes, dtypes and shardings of `like`: ShapeDtypeStructs, one for each entry.

    Every process calls this, and reads what its own devices keep. All tensors are compared with `like` before any is
    read; `ignored` are patterns of names that may be there and are of no use.

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
    lay = check(place, entries, {path: leaf.shape for path, leaf in leaves.items()}, found, ignored=ignored)
    keeps = {path: _located(leaf) for path, leaf in tree.flatten(leaves if kept is None else kept).items()}
    params: dict[str, jax.Array] = {}
    with reader or Reader() as opened:
        if HEAD not in leaves and HEAD_NAME in found:
            _check_tied(place, found[HEAD_NAME], found[lay[EMBEDDING].name(())], opened)
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
    ignored: Sequence[str] = (),
) -> dict[str, Lie]:
    """How our leaves lie in the folder's tensors. Raises one ValueError that lists every tensor that does not fit."""
    lay = lies(entries, shapes)
    faults: dict[str, str] = {}
    wanted: set[str] = set()
    for path, lie in lay.items():
        for name in lie.names():
            wanted.add(name)
            if fault := _fault(path, lie, found.get(name)):
                faults[name] = fault
    for name in sorted(found.keys() - wanted):
        repeats = HEAD not in shapes and name == HEAD_NAME and found[name].dtype in tensors.FLOATS
        if not repeats and not any(fnmatchcase(name, pattern) for pattern in ignored):
            faults[name] = f"have {_words(found[name])}, and the model has no such parameter"
    if faults:
        listed = [f"  {folder.name}: {name}: {fault}" for name, fault in faults.items()]
        more = [f"  and {len(listed) - MOST_FAULTS} more"] if len(listed) > MOST_FAULTS else []
        raise ValueError(
            "\n".join([f"{folder}: {len(listed)} tensors do not fit config.json:", *listed[:MOST_FAULTS], *more])
            + "\nGive the folder as it was published, with the config.json that belongs to the weights"
        )
    return lay


def _fault(path: str, lie: Lie, tensor: Tensor | None) -> str:
    """What is wrong with a tensor; nothing where it fits."""
    if tensor is None:
        return f"have none, want {list(lie.theirs)}"
    if tensor.dtype not in tensors.FLOATS:
        return f"have {_words(tensor)}, want one of {', '.join(tensors.FLOATS)}; quantised weights are not read"
    if path in TABLES and tensor.shape[1:] == lie.theirs[1:] and 0 < tensor.shape[0] <= lie.theirs[0]:
        return ""
    if tensor.shape != lie.theirs:
        return f"have {_words(tensor)}, want {list(lie.theirs)}"
    return ""


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
            tensor = found[lie.name((*fixed, *chosen))]
            return _read(tensor, lie, box[len(lead) :], reader).reshape(*(1,) * len(lead), *_counts(box[len(lead) :]))

        piece = _assembled(shape, sharding, read)
        whole = _write(whole, piece, np.array(at, np.int32), order=lie.order)
        del piece
    return whole


def _entries(sharding: NamedSharding, shape: Sequence[int]) -> tuple[Any, ...]:
    return (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))


def _counts(box: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def _read(tensor: Tensor, lie: Lie, box: Sequence[tuple[int, int]], reader: Reader) -> np.ndarray:
    """A box of our other dimensions in the order of the file; rows that the file lacks are 0."""
    ours = [box[lie.order.index(n)] for n in range(len(lie.shape))]
    if lie.entry.path not in TABLES:
        return _narrowed(reader.read(tensor, lie.box([start for start, _ in ours], _counts(ours))))
    (first, stop), columns = ours
    there = max(0, min(stop, tensor.shape[0]) - first)
    values = np.zeros(_counts(ours), tensors.FLOATS[tensor.dtype]) if there < stop - first else None
    rows = reader.read(tensor, lie.box((first, columns[0]), (there, _counts(ours)[1]))) if there else None
    if values is None:
        assert rows is not None
        return _narrowed(rows)
    if rows is not None:
        values[:there] = rows
    return _narrowed(values)


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
    rows: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the parameters into a folder as safetensors, in shards of at most `shard_bytes` where a tensor is not larger.

    Every process calls this; the first one writes. The host holds one tensor at a time. `dtype` is of all tensors:
    float64, float32, float16 or bfloat16. `rows` of the embedding and the head are written, None: all.
    """
    leaves = tree.flatten(params)
    code = code_of(dtype)
    shapes = {entry.path: _cut(entry.path, leaves[entry.path].shape, rows) for entry in entries}
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


def _cut(path: str, shape: tuple[int, ...], rows: int | None) -> tuple[int, ...]:
    if path not in TABLES or rows is None:
        return shape
    assert rows <= shape[0], (path, rows, shape)
    return (rows, *shape[1:])


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
    whole = np.empty(math.prod(theirs), dtype)
    for lie, at in parts:
        box = lie.box((0,) * len(lie.shape), lie.shape)
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
