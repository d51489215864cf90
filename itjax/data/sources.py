"""A row on disk, addressable by number: files of rows as conversations, and as what they hold for templates.

A source knows where every row is and reads one row, or a batch of them, at a time; the index is mapped, not held. Every
row has an address, `path:line`, and whoever cannot use a row says so with it.
"""

import hashlib
import json
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from itjax.base.files import write_whole
from itjax.base.records import Conversation
from itjax.data import files, index, shapes
from itjax.data.files import LONGEST_ROW
from itjax.data.index import File, Reading
from itjax.data.places import Place
from itjax.data.processes import spread
from itjax.data.strict_json import RowError

CHUNK = 512  # rows that are checked in one go
FEW = 4 * CHUNK  # rows for which no process is started
SHOWN = 3  # addresses of bad rows in an error


class RowSource(Protocol):
    """Rows in a fixed order, each a conversation; the same wherever it is unpickled."""

    name: str

    def __len__(self) -> int: ...
    def conversation(self, index: int) -> Conversation: ...
    def fingerprint(self) -> str:
        """Changes when any row does."""


@runtime_checkable
class Rows(Protocol):
    """Rows in a fixed order as the file has them, for templates: fields by name, with those that were mapped."""

    name: str

    def __len__(self) -> int: ...
    def row(self, index: int) -> Mapping[str, Any]: ...
    def key(self, index: int) -> str: ...
    def fingerprint(self) -> str:
        """Changes when any row does."""


class BadRow(ValueError):
    """A row that cannot be used: where it stands, a reason that can be counted and quotes no data, and the whole story."""

    def __init__(self, key: str, reason: str, why: str) -> None:
        super().__init__(key, reason, why)
        self.key, self.reason, self.why = key, reason, why

    def __str__(self) -> str:
        return f"{self.key}: {self.why}"


# ---------------------------------------------------------------------------------------------- files


class FileSource:
    """Rows of one or more files that belong together (shards), in order."""

    def __init__(
        self,
        paths: Sequence[Path | str],
        name: str,
        *,
        columns: Mapping[str, str] | None = None,
        shape: str = "auto",
        cache_dir: Path | None = None,
        longest_row: int = LONGEST_ROW,
    ) -> None:
        if shape not in shapes.NAMES:
            raise ValueError(f"{name}: shape {shape!r} is unknown; known: {', '.join(shapes.NAMES)}")
        self.name = name
        self._reading = Reading(shape, dict(columns or {}), longest_row)
        cache_dir = files.default_dir() if cache_dir is None else cache_dir
        self._files = [index.open_file(str(path), self._reading, cache_dir=cache_dir) for path in paths]
        self._ends = list(accumulate(len(file) for file in self._files))
        if not len(self):
            raise ValueError(f"{', '.join(map(str, paths))}: there are no rows in it; give a file with rows")

    def __len__(self) -> int:
        return self._ends[-1]

    def conversation(self, index: int) -> Conversation:
        """The row as a conversation. Raises BadRow."""
        return self._one(index, self._conversation)

    def conversations(self, indices: Sequence[int] | np.ndarray) -> list[Conversation]:
        """Rows in the order asked for, those that stand together read together. Raises BadRow."""
        return self._many(indices, self._conversation)

    def row(self, index: int) -> Mapping[str, Any]:
        """The fields of the row, with those of `columns` and what a task says of its instances. Raises BadRow."""
        return self._one(index, self._fields)

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[Mapping[str, Any]]:
        """The fields of rows in the order asked for, those that stand together read together. Raises BadRow."""
        return self._many(indices, self._fields)

    def key(self, index: int) -> str:
        """`path:line`; in Parquet and ArrayRecord the number of the row, from 1, stands for the line."""
        file, row = self._find(index)
        return file.key(file.place(row))

    def notes(self) -> list[str]:
        """What was understood of the files where something else could have been meant, or was left out."""
        return [note for file in self._files for note in file.notes]

    def fingerprint(self) -> str:
        contents = [f"{file.name.rpartition('/')[2]} {file.digest}" for file in self._files]
        reading = json.dumps([self._reading.shape, dict(self._reading.columns), self._reading.longest], sort_keys=True)
        return hashlib.sha256("\n".join(["file source 2", self.name, reading, *contents]).encode()).hexdigest()

    def _find(self, index: int) -> tuple[File, int]:
        if not 0 <= index < self._ends[-1]:
            raise IndexError(f"{self.name}: row {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        return self._files[number], index - (self._ends[number - 1] if number else 0)

    def _one(self, index: int, make: Callable[[File, Place, Any], Any]) -> Any:
        file, row = self._find(index)
        place = file.place(row)
        return self._made(file, place, file.layout.fetch_one(place), make)

    def _many(self, indices: Sequence[int] | np.ndarray, make: Callable[[File, Place, Any], Any]) -> list[Any]:
        found = [self._find(int(index)) for index in indices]
        made: list[Any] = [None] * len(found)
        for file in {id(file): file for file, _ in found}.values():
            wanted = [at for at, (of, _) in enumerate(found) if of is file]
            places = [Place(*place) for place in file.places[[found[at][1] for at in wanted]].tolist()]
            for at, place, raw in zip(wanted, places, file.layout.fetch(places), strict=True):
                made[at] = self._made(file, place, raw, make)
        return made

    def _made(self, file: File, place: Place, raw: Any, make: Callable[[File, Place, Any], Any]) -> Any:
        try:
            return make(file, place, file.layout.decode(raw, place))
        except RowError as error:
            raise BadRow(file.key(place), error.reason, str(error)) from None

    def _mapped(self, file: File, row: Any) -> Any:
        return shapes.mapped(row, self._reading.columns, positions=file.layout.is_table)

    def _conversation(self, file: File, place: Place, row: Any) -> Conversation:
        return shapes.conversation(
            self._mapped(file, row),
            source=self.name,
            key=file.key(place),
            shape=self._reading.shape,
            columns=self._reading.columns,
            task=file.layout.task,
            number=place.number,
        )

    def _fields(self, file: File, place: Place, row: Any) -> Mapping[str, Any]:
        row = shapes.path_fields(row, place.number) if place.number else row
        row = shapes.with_task(row, file.layout.task) if file.layout.task is not None else row
        if not isinstance(row, Mapping):
            raise RowError(f"the row is {shapes.kind(row)}, not an object", "the row is not an object")
        return self._mapped(file, row)


def open_files(
    patterns: str,
    *,
    columns: Mapping[str, str] | None = None,
    shape: str = "auto",
    data_dir: str = "",
    cache_dir: Path | None = None,
    longest_row: int = LONGEST_ROW,
    place: str = "files",
) -> list[FileSource]:
    """One source per file, or per set of shards, of all the files that comma-separated globs and directories name.

    `data_dir` is where relative names start. `columns` says which column, dotted path or position holds a field.
    `place` is where the patterns stand in a config.
    """
    found = files.find(patterns, data_dir=data_dir, place=place)
    kwargs: dict[str, Any] = {"columns": columns, "shape": shape, "cache_dir": cache_dir, "longest_row": longest_row}
    return [FileSource(paths, name, **kwargs) for name, paths in found.items()]


# ---------------------------------------------------------------------------------------------- parts of sources


class Subset:
    """Some rows of a source, in the given order."""

    def __init__(self, source: RowSource, indices: Sequence[int] | np.ndarray, name: str | None = None) -> None:
        self.name = source.name if name is None else name
        self._source = source
        self.indices = np.asarray(indices, dtype=np.int64)  # of the rows of the source

    def __len__(self) -> int:
        return len(self.indices)

    def conversation(self, index: int) -> Conversation:
        return self._source.conversation(int(self.indices[index]))

    def conversations(self, indices: Sequence[int] | np.ndarray) -> list[Conversation]:
        return conversations(self._source, self.indices[np.asarray(indices, np.int64)])

    def row(self, index: int) -> Mapping[str, Any]:
        return self._rows().row(int(self.indices[index]))

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[Mapping[str, Any]]:
        wanted, source = self.indices[np.asarray(indices, np.int64)], self._rows()
        read = getattr(source, "rows", None)
        return read(wanted) if callable(read) else [source.row(int(index)) for index in wanted]

    def key(self, index: int) -> str:
        return self._rows().key(int(self.indices[index]))

    def notes(self) -> list[str]:
        return notes(self._source)

    def fingerprint(self) -> str:
        parts = f"subset 1\n{self.name}\n{self._source.fingerprint()}\n".encode()
        return hashlib.sha256(parts + self.indices.astype("<i8").tobytes()).hexdigest()

    def _rows(self) -> Rows:
        if not isinstance(self._source, Rows):
            raise ValueError(f"{self.name}: its rows have no fields, so templates cannot be filled; use files of rows")
        return self._source


def conversations(source: RowSource, indices: Sequence[int] | np.ndarray) -> list[Conversation]:
    """Many rows of any source: in one read where the source has a way to."""
    read = getattr(source, "conversations", None)
    return [source.conversation(int(index)) for index in indices] if read is None else read(indices)


def notes(source: RowSource) -> list[str]:
    """What a source has to say of itself; nothing where it has nothing to say."""
    say = getattr(source, "notes", None)
    return [] if say is None else say()


def hold_out(source: RowSource, *, examples: int, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Rows to train on and rows to test on: at most `examples` and at most `fraction` of the source, chosen by `seed`.

    A row's lot depends on its number and the seed alone, so rows appended later move few others.
    """
    num_held = min(examples, math.floor(fraction * len(source)))
    held = np.zeros(len(source), dtype=bool)
    held[np.argsort(_lots(len(source), seed), kind="stable")[:num_held]] = True
    return Subset(source, np.flatnonzero(~held)), Subset(source, np.flatnonzero(held))


def _lots(count: int, seed: int) -> np.ndarray:
    """One pseudo-random number per row (SplitMix64, https://prng.di.unimi.it/splitmix64.c), the same everywhere."""
    start = int.from_bytes(hashlib.sha256(f"hold out {seed}".encode()).digest()[:8])
    x = np.uint64(start) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ---------------------------------------------------------------------------------------------- rows that cannot be used


def usable(
    source: RowSource, *, most: float, progress: Callable[[int, int], None] | None = None, workers: int = 1
) -> tuple[Subset, list[BadRow]]:
    """The rows that can be read, and those that cannot. Raises ValueError where they are more than this share."""
    bad = bad_rows(source, progress=progress, workers=workers)
    return without(source, bad, most=most), list(bad.values())


def bad_rows(
    source: RowSource, *, progress: Callable[[int, int], None] | None = None, workers: int = 1
) -> dict[int, BadRow]:
    """The rows that cannot be read, by number.

    Reads every row once, in `workers` processes where there are many rows; the order never depends on them.
    """
    bad: dict[int, BadRow] = {}
    for start, found in _checked(source, workers=workers):
        bad.update(found)
        if progress is not None:
            progress(min(start + CHUNK, len(source)), len(source))
    return bad


def without(source: RowSource, bad: Mapping[int, BadRow], *, most: float) -> Subset:
    """The other rows. Raises ValueError where bad ones are more than this share of the source."""
    if len(bad) > most * len(source):
        counts = ", ".join(f"{n:,} {why}" for why, n in Counter(row.reason for row in bad.values()).most_common())
        first = "; ".join(map(str, list(bad.values())[:SHOWN]))
        raise ValueError(
            f"{source.name}: {len(bad):,} of {len(source):,} rows cannot be used ({counts}), more than max_bad_rows={most:g}: "
            f"{first}{'; ...' if len(bad) > SHOWN else ''}"
        )
    is_good = np.ones(len(source), bool)
    is_good[list(bad)] = False
    return Subset(source, np.flatnonzero(is_good))


def _checked(source: RowSource, *, workers: int) -> Iterator[tuple[int, dict[int, BadRow]]]:
    """Stretches of rows by their starts, each with its bad rows."""
    starts = range(0, len(source), CHUNK)
    if workers <= 1 or len(source) <= FEW:
        found: Iterator[dict[int, BadRow]] = (check(source, start) for start in starts)
    else:
        found = spread(check, starts, shared=source, workers=min(workers, len(starts)))
    yield from zip(starts, found, strict=True)


def check(source: RowSource, start: int) -> dict[int, BadRow]:
    """The bad rows of one stretch, by number."""
    rows = range(start, min(start + CHUNK, len(source)))
    try:
        conversations(source, rows)
    except BadRow:
        return {row: bad for row in rows if (bad := _why_not(source, row)) is not None}
    return {}


def _why_not(source: RowSource, row: int) -> BadRow | None:
    try:
        source.conversation(row)
    except BadRow as bad:
        return bad
    return None


def write_bad_rows(path: Path, bad: Sequence[BadRow]) -> None:
    """A line of JSON for each bad row: its address, its reason and what was wrong. Replaces the file."""
    lines = ({"key": row.key, "reason": row.reason, "message": str(row)} for row in bad)
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
