"""Where the rows of a file are and how they are read: what all layouts of files have in common.

A layout says where every row is (`places`) and what it holds (`fetch`, then `decode`), one block or one row at a time.

    PLACE     start     bytes into the file; the number of the row in Parquet and ArrayRecord
              line      what a row's address says: the line it begins on; there, the row's number from 1
              size      bytes, ending included
              number    0, or which conversation of a row that holds several: the address ends in `#number`
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from itjax.data.files import Bytes
from itjax.data.strict_json import RowError, parse

PLACE = np.dtype([("start", "<i8"), ("line", "<i8"), ("size", "<u4"), ("number", "<u4")])
BLOCK = 1 << 20
GAP = 1 << 12  # bytes between two rows that are read in one go
LONGEST_SIZE = (1 << 32) - 1
BOM = b"\xef\xbb\xbf"


class Place(NamedTuple):
    """Where a row is: see above."""

    start: int
    line: int
    size: int
    number: int


class Layout(ABC):
    """One way of holding rows. `facts` are plain values that are kept with the index."""

    kind: ClassVar[str]
    is_table: ClassVar[bool] = False  # its columns have an order

    def __init__(self, data: Bytes, facts: Mapping[str, Any], *, longest: int) -> None:
        self.data, self.facts, self.longest = data, dict(facts), longest

    @property
    def task(self) -> Mapping[str, Any] | None:
        """The head of a Natural-Instructions file: what all its rows have in common."""
        return self.facts.get("task")

    @abstractmethod
    def places(self) -> Iterator[np.ndarray]:
        """PLACEs of all rows, in order, some at a time."""

    def fetch(self, places: Sequence[Place]) -> list[Any]:
        """The bytes of rows, neighbours in one read; empty where the row is too long."""
        spans = [(place.start, 0 if place.size > self.longest else place.size) for place in places]
        fetched = [b""] * len(places)
        for group in neighbours(spans):
            begin = spans[group[0]][0]
            raw = self.data.read(begin, max(start + size for start, size in map(spans.__getitem__, group)) - begin)
            for row in group:
                start, size = spans[row]
                fetched[row] = raw[start - begin : start - begin + size]
        return fetched

    def fetch_one(self, place: Place) -> Any:
        """The same for one row."""
        return b"" if place.size > self.longest else self.data.read(place.start, place.size)

    def decode(self, raw: Any, place: Place) -> Any:
        """The row itself. Raises RowError."""
        self._check_size(place)
        return parse(raw, start=place.start)

    def _check_size(self, place: Place) -> None:
        if place.size > self.longest:
            bound = f"{self.longest >> 20} MiB" if self.longest >> 20 else f"{self.longest} bytes"
            raise RowError(f"the row is longer than {bound}; split it", "the row is too long")


def neighbours(spans: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Rows that are worth one read: close together, and no more than a block of them."""
    group: list[int] = []
    begin = end = 0
    for row in sorted(range(len(spans)), key=spans.__getitem__):
        start, size = spans[row]
        if group and (start - end > GAP or start + size - begin > BLOCK):
            yield group
            group = []
        begin = begin if group else start
        group.append(row)
        end = start + size
    if group:
        yield group


def places_at(starts: Any, lines: Any, sizes: Any) -> np.ndarray:
    found = np.zeros(len(starts), PLACE)
    found["start"], found["line"], found["size"] = starts, lines, np.minimum(sizes, LONGEST_SIZE)
    return found


def lines_of(data: Bytes, begin: int, longest: int) -> Iterator[bytes]:
    """Lines with their ends, from a file that is read in blocks; one that is too long comes in pieces."""
    rest = b""
    for at in range(begin, data.size, BLOCK):
        *whole, rest = (rest + data.read(at, min(BLOCK, data.size - at))).split(b"\n")
        yield from (line + b"\n" for line in whole)
        if len(rest) > longest:
            yield rest
            rest = b""
    if rest:
        yield rest


def ending_of(path: str) -> str:
    """`.csv` or `.tsv` where the name promises a table of text, packed or not."""
    name = path.removesuffix(".gz").removesuffix(".zst")
    return next((ending for ending in (".csv", ".tsv") if name.endswith(ending)), "")
