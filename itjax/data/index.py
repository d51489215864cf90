"""A file opened: its layout, and where every row of it is, kept beside its private copy so that it is looked for once.

A small file is looked through each time it is opened. The index of a large one, or of a copy, is a file of PLACEs that is
mapped into memory: nothing of it is read but what is asked for.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from itjax.base.files import create_private
from itjax.data import binary, cells, files, layouts, shapes
from itjax.data.files import Bytes
from itjax.data.places import PLACE, Layout, Place
from itjax.data.strict_json import RowError

VERSION = 1  # of the index and of how rows are found; a new number makes all of them anew
SMALL = 4 << 20  # bytes of a file that is indexed in memory
LOOKED_AT = 10  # rows of which one has to be a tree for all to be
TREES_AT_ONCE = 256  # rows that are parsed to count their conversations
SUMMARY, PLACES, CONTENT, FAR_COPY = "summary.json", "places", "content", "copy"


@dataclass(frozen=True)
class Reading:
    """How the rows of a source are to be understood."""

    shape: str
    columns: Mapping[str, str]
    longest: int  # bytes of a row


@dataclass
class File:
    """The rows of one file, by number. Pickles without the index where that is kept on disk."""

    name: str
    layout: Layout
    digest: str  # of the content, unpacked
    notes: tuple[str, ...]  # what was understood of it, where it could have been understood otherwise
    folder: Path | None  # where the index is kept
    places: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.places)

    def place(self, row: int) -> Place:
        return Place(*self.places[row].item())

    def key(self, place: Place) -> str:
        """`path:line`, and `#number` where a row holds several conversations."""
        return f"{self.name}:{place.line}#{place.number}" if place.number else f"{self.name}:{place.line}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "places": self.places if self.folder is None else len(self.places)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.folder is not None:
            try:
                self.places = _open_places(self.folder / PLACES, state["places"])
            except (OSError, ValueError):
                raise ValueError(f"{self.name}: its index in {self.folder} is gone; start again") from None


def open_file(path: str, reading: Reading, *, cache_dir: Path) -> File:
    """Looks at a file and finds its rows, or finds them found already."""
    facts = files.look_up(path)
    is_far = files.is_far(path)
    packed = "" if is_far else files.packing(path)
    if not is_far:
        files.check_ending(path, packed)
    original = Bytes(path, files.shown(path), None if is_far else files.state(path))
    if not is_far and not packed and original.size <= SMALL and not _is_parquet(original):
        return _open_small(original, reading)
    build = partial(_build, original, reading)
    how = repr((VERSION, reading.shape, sorted(reading.columns.items()), reading.longest))
    folder = files.keep(cache_dir, path, facts, how=how, build=build)
    return _load(folder, original, reading)


def _is_parquet(data: Bytes) -> bool:
    return data.size >= 4 and data.read(0, 4) == binary.PARQUET


def _open_small(data: Bytes, reading: Reading) -> File:
    kind, facts = layouts.look(data, columns=reading.columns.values(), longest=reading.longest)
    layout = layouts.LAYOUTS[kind](data, facts, longest=reading.longest)
    counts = _Counts()
    places = list(_places(layout, reading, counts))
    notes = _notes(layout, counts)
    found = np.concatenate(places) if places else np.zeros(0, PLACE)
    return File(data.origin, layout, _digest(data), notes, None, found)


def _build(original: Bytes, reading: Reading, folder: Path) -> None:
    """Fills the folder: a copy of what is far or packed, the index, and what both are."""
    data = _copied(original, folder, longest=reading.longest)
    digest = _digest(data)
    kind, facts = layouts.look(data, columns=reading.columns.values(), longest=reading.longest)
    if kind == binary.Parquet.kind:
        facts = binary.unpack_parquet(data, folder / "arrow")
        (folder / "arrow").rename(folder / CONTENT)
        data = Bytes(str(folder / CONTENT), original.origin, original.seen)
    layout = layouts.LAYOUTS[kind](data, facts, longest=reading.longest)
    counts, rows = _Counts(), 0
    with create_private(folder / PLACES) as file:
        for places in _places(layout, reading, counts):
            file.write(places.tobytes())
            rows += len(places)
    original.check()
    content = CONTENT if (folder / CONTENT).exists() else ""
    summary = {"digest": digest, "kind": kind, "facts": facts, "rows": rows, "content": content}
    summary |= {"notes": _notes(layout, counts)}
    with create_private(folder / SUMMARY) as file:
        file.write(json.dumps(summary).encode())


def _copied(original: Bytes, folder: Path, *, longest: int) -> Bytes:
    """The plain bytes of a file: itself, or a copy in the folder."""
    path = original.path
    if files.is_far(path):
        files.fetch(path, folder / FAR_COPY)
        path = str(folder / FAR_COPY)
    packed = files.packing(path)
    files.check_ending(original.origin, packed)
    if packed:
        files.unpack(path, folder / CONTENT, packed=packed, name=original.origin, longest=longest)
        (folder / FAR_COPY).unlink(missing_ok=True)
        path = str(folder / CONTENT)
    elif path != original.path:
        path = str((folder / FAR_COPY).rename(folder / CONTENT))
    return Bytes(path, original.origin, original.seen)


def _load(folder: Path, original: Bytes, reading: Reading) -> File:
    try:
        summary = json.loads((folder / SUMMARY).read_bytes())
        places = _open_places(folder / PLACES, summary["rows"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: the index is damaged ({error}); delete this folder and run again") from None
    path = str(folder / summary["content"]) if summary["content"] else original.path
    data = Bytes(path, original.origin, original.seen)
    layout = layouts.LAYOUTS[summary["kind"]](data, summary["facts"], longest=reading.longest)
    return File(original.origin, layout, summary["digest"], tuple(summary["notes"]), folder, places)


def _open_places(path: Path, rows: int) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype=PLACE, mode="r", shape=(rows,))) if rows else np.zeros(0, PLACE)


def _digest(data: Bytes) -> str:
    data.check()
    with open(data.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------- rows that are trees


@dataclass
class _Counts:
    trees: int = 0
    conversations: int = 0
    unanswered: int = 0


def _places(layout: Layout, reading: Reading, counts: _Counts) -> Iterator[np.ndarray]:
    """Places of rows; where the rows are trees, of the conversations in them."""
    are_trees = reading.shape == "oasst"
    for number, block in enumerate(layout.places()):
        if number == 0 and len(block) and reading.shape == "auto" and "prompt" not in reading.columns:
            are_trees = any(shapes.is_tree(_row(layout, Place(*place))) for place in block[:LOOKED_AT].tolist())
        if not are_trees:
            yield block
            continue
        for start in range(0, len(block), TREES_AT_ONCE):
            yield _conversations(layout, block[start : start + TREES_AT_ONCE], counts)


def _conversations(layout: Layout, places: np.ndarray, counts: _Counts) -> np.ndarray:
    """Each place as often as its row has conversations; a row that has none stays, to be told of when it is read."""
    paths = np.zeros(len(places), np.int64)
    for number, place in enumerate(map(Place._make, places.tolist())):
        try:
            paths[number], unanswered = shapes.count_paths(_row(layout, place))
        except RowError:
            continue
        counts.unanswered += unanswered
    counts.trees += len(places)
    counts.conversations += int(paths.sum())
    repeated = np.repeat(places, np.maximum(paths, 1))
    starts = np.repeat(np.cumsum(np.maximum(paths, 1)) - np.maximum(paths, 1), np.maximum(paths, 1))
    repeated["number"] = np.where(np.repeat(paths, np.maximum(paths, 1)) > 0, np.arange(len(repeated)) - starts + 1, 0)
    return repeated


def _row(layout: Layout, place: Place) -> Any:
    """The row, or None where it cannot be read."""
    try:
        return layout.decode(layout.fetch_one(place), place)
    except RowError:
        return None


def _notes(layout: Layout, counts: _Counts) -> tuple[str, ...]:
    notes = []
    if layout.kind == cells.Cells.kind:
        names = ", ".join(layout.facts["names"])
        what = "the first line names the columns" if layout.facts["header"] else "columns have no names but numbers"
        notes.append(f"{layout.data.origin}: {what}: {names}")
    if counts.trees:
        notes.append(
            f"{layout.data.origin}: {counts.trees:,} trees are {counts.conversations:,} conversations; "
            f"{counts.unanswered:,} questions at their ends have no answer and are left out"
        )
    return tuple(notes)
