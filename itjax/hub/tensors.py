"""Files of tensors in the safetensors format: headers checked, boxes of tensors read, files written tensor by tensor.

A file is eight bytes with the length of the header, the header (JSON: name -> dtype, shape and where its bytes are), and
the bytes. It is read and written here without the library of that name, because what counts is host memory: a box is
read into memory of its own size, bfloat16 included, and a file is written while the host holds one of its tensors.

Nothing that is read can be executed. Whatever a header says is checked before a byte of a tensor is read.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

FLOATS = {  # what is read and written
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
READ = {**FLOATS, "U8": np.dtype(np.uint8)}  # and what four-bit numbers are packed in
CODES = {dtype: code for code, dtype in FLOATS.items()}
WIDTHS = {  # bytes of an element, of every dtype whose extent can be checked
    **{code: dtype.itemsize for code, dtype in FLOATS.items()},
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "BOOL": 1, "U8": 1, "I8": 1,
    "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8, "C64": 8,
}  # fmt: skip
CLOSE = 2  # stride up to which numbers are read together with what lies between them: gate and up that alternate
LONGEST_HEADER = 100_000_000  # bytes, the limit of the format
PREFIX = 8  # bytes that hold the length of the header
METADATA = "__metadata__"
POINTER = b"version https://git-lfs"  # begins what git has in place of a large file
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UNSAFE = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.pkl", "*.npz")
OTHERS = ("adapter", "consolidated", "optimizer", "training")  # begin names of files beside a model's own


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is."""

    name: str
    dtype: str  # a code of the format: "BF16"
    shape: tuple[int, ...]
    file: Path
    start: int  # byte of the file
    num_bytes: int

    @property
    def place(self) -> str:
        return f"{self.file}: {self.name}"


@dataclass(frozen=True)
class Box:
    """A part of a tensor, as it lies in the file: outermost dimension first, everything counted in elements."""

    start: int
    counts: tuple[int, ...]
    strides: tuple[int, ...]

    def runs(self) -> tuple[Sequence[tuple[int, int]], tuple[int, int]]:
        """(count, stride) of the dimensions to go through, and of the run to read at each stop; as few as can be."""
        merged = [(1, 1)]
        for count, stride in reversed(list(zip(self.counts, self.strides, strict=True))):
            inner_count, inner_stride = merged[0]
            if inner_count == 1:
                merged[0] = (count, stride)
            elif stride == inner_count * inner_stride:  # the next begins where the last ended
                merged[0] = (count * inner_count, inner_stride)
            elif count > 1:
                merged.insert(0, (count, stride))
        return (merged, (1, 1)) if merged[-1][1] > CLOSE else (merged[:-1], merged[-1])


class Reader:
    """Reads boxes of tensors; files stay open until it is closed. `num_bytes` counts what was read."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._files: dict[Path, int] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, tensor: Tensor, box: Box) -> np.ndarray:
        """The box, in the order of the file and the dtype of the file."""
        dtype = READ[tensor.dtype]
        dimensions, (count, stride) = box.runs()
        stops = np.zeros(1, np.int64)
        for size, step in dimensions:
            stops = (stops[:, None] + np.arange(size)[None] * step).reshape(-1)
        run = (count - 1) * stride + 1
        values = np.empty((len(stops), count), dtype)
        passing = values if stride == 1 else np.empty((1, run), dtype)
        for number, stop in enumerate(stops.tolist()):
            row = passing[number if stride == 1 else 0]
            self._fill(tensor, memoryview(row.view(np.uint8)), (box.start + stop) * dtype.itemsize)
            if stride > 1:
                values[number] = row[::stride]
        return values.reshape(box.counts)

    def _fill(self, tensor: Tensor, target: memoryview, at: int) -> None:
        if tensor.file not in self._files:
            self._files[tensor.file] = os.open(tensor.file, os.O_RDONLY)
        while target:
            done = os.preadv(self._files[tensor.file], [target], tensor.start + at)
            if not done:
                raise ValueError(f"{tensor.place}: the file ends within this tensor; copy the file again")
            self.num_bytes += done
            target, at = target[done:], at + done


# --- headers ----------------------------------------------------------------------------------------------------------


def of_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's folder, by name. Raises ValueError naming file and tensor of what cannot be right."""
    files, listed = _files(folder)
    found: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in header(file).items():
            if name in found:
                raise ValueError(
                    f"{tensor.place}: this tensor is in {found[name].file.name} too; keep the file that is meant"
                )
            found[name] = tensor
    for name, file in listed.items():
        if name not in found or found[name].file != file:
            raise ValueError(f"{file}: {name}: {INDEX} says that this tensor is here, and it is not; copy both again")
    return found


def _files(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """The files that hold a model, and where an index says that each tensor is."""
    if (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            raise ValueError(f"{folder}: there are {SINGLE} and {INDEX}; remove the one that is not meant")
        listed = _listed(folder)
        return sorted(set(listed.values())), listed
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], {}
    several = [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith(OTHERS)]
    if several:
        return several, {}
    unsafe = sorted({file.name for pattern in UNSAFE for file in folder.glob(pattern)})
    if unsafe:
        raise ValueError(
            f"{folder}: the weights are in {', '.join(unsafe[:3])}, and only safetensors is read, as it holds no code. Where "
            f"you trust the files, write them anew: transformers' from_pretrained({str(folder)!r}).save_pretrained(NEW)"
        )
    raise ValueError(f"{folder}: there are no weights; a model's folder has {SINGLE}, or shards with {INDEX}")


def _listed(folder: Path) -> dict[str, Path]:
    fields = parse_json((folder / INDEX).read_bytes(), str(folder / INDEX))
    weight_map = fields.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX}: weight_map: there is none; give the file as it was published")
    for name, file in weight_map.items():
        is_plain = isinstance(file, str) and file.endswith(".safetensors") and not set(file) & {"/", "\\", "\0"}
        if not is_plain:
            raise ValueError(
                f"{folder / INDEX}: {name}: {file!r} is not the name of a safetensors file in this folder; "
                "give the index as it was published"
            )
        if not (folder / file).is_file():
            raise ValueError(f"{folder / INDEX}: {name}: there is no file {file}; the folder is not complete")
    return {name: folder / file for name, file in weight_map.items()}


def header(file: Path) -> dict[str, Tensor]:
    """The tensors of one file; every byte behind the header belongs to exactly one of them."""
    fields, begin = _header_fields(file)
    fields.pop(METADATA, None)
    tensors = []
    for name, entry in fields.items():
        dtype, shape, (start, stop) = _entry(entry, f"{file}: {name}")
        tensors.append((start, stop, Tensor(name, dtype, shape, file, begin + start, stop - start)))
    end = 0
    for start, stop, tensor in sorted(tensors, key=lambda item: item[:2]):
        if start != end:
            raise ValueError(
                f"{tensor.place}: begins at byte {start} of the data and not at {end}; the file is damaged"
            )
        end = stop
    size = file.stat().st_size
    if size != begin + end:
        raise ValueError(f"{file}: has {size} bytes and not {begin + end} as its header says; copy it again")
    return {tensor.name: tensor for _, _, tensor in tensors}


def _header_fields(file: Path) -> tuple[dict[str, Any], int]:
    """The header as it stands, and where the data begins."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            raise ValueError(
                f"{file}: this is git's pointer to the file and not the file; fetch it with `git lfs pull`"
            )
        opened.seek(0)
        length = int.from_bytes(opened.read(PREFIX), "little")
        if size < PREFIX or length > min(size - PREFIX, LONGEST_HEADER):
            raise ValueError(f"{file}: {size} bytes cannot hold the header that it begins with; not a safetensors file")
        raw = opened.read(length)
    if raw[:1] != b"{":
        raise ValueError(f"{file}: does not begin with a header; not a safetensors file")
    return parse_json(raw, str(file)), PREFIX + length


def _entry(entry: Any, place: str) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """dtype, shape and bytes of a tensor, as the header has them."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{place}: the header lacks dtype, shape or data_offsets; the file is damaged") from None
    numbers = [*shape, start, stop] if isinstance(shape, list) else [None]
    if not isinstance(dtype, str) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{place}: dtype {dtype!r}, shape {shape!r}, bytes {start!r} to {stop!r}: the file is damaged")
    if dtype in WIDTHS and stop - start != math.prod(shape) * WIDTHS[dtype]:
        raise ValueError(f"{place}: {stop - start} bytes do not make a {dtype} of shape {shape}; the file is damaged")
    if stop < start:
        raise ValueError(f"{place}: ends at byte {stop}, before it begins at {start}; the file is damaged")
    return dtype, tuple(shape), (start, stop)


def parse_json(raw: bytes, place: str) -> dict[str, Any]:
    """A JSON object in which no name stands twice. Raises ValueError naming the place."""
    try:
        fields = json.loads(raw.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error}); copy the file again") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{place}: not a JSON object; copy the file again")
    return fields


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"{name!r} stands there twice")
        fields[name] = value
    return fields


# --- writing ----------------------------------------------------------------------------------------------------------


def write(file: Path, shapes: Mapping[str, tuple[int, ...]], code: str, values: Iterator[np.ndarray]) -> None:
    """A new file of tensors of one dtype, in this order; `values` gives each when its turn has come."""
    entries: dict[str, Any] = {METADATA: {"format": "pt"}}  # what transformers asks for: which library wrote it
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * WIDTHS[code]
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % PREFIX)  # so that data begins at a multiple of 8
    with file.open("xb") as opened:
        opened.write(len(raw).to_bytes(PREFIX, "little") + raw)
        for name, shape in shapes.items():
            value = next(values)
            assert (value.shape, CODES[value.dtype]) == (shape, code), (name, value.shape, value.dtype)
            opened.write(memoryview(np.ascontiguousarray(value).reshape(-1).view(np.uint8)))
            del value
        opened.flush()
        os.fsync(opened.fileno())


def dump_json(fields: Mapping[str, Any]) -> str:
    """JSON as published folders have it."""
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
