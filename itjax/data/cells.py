"""Tables of text: CSV, TSV and their relatives, with their delimiter, their quotes and their header found by looking."""

import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from itjax.data.files import LONGEST_ROW
from itjax.data.places import BOM, Layout, Place, ending_of, lines_of, places_at
from itjax.data.strict_json import RowError

RECORDS = 1 << 14  # whose places are told at a time
NAME = re.compile(r"[^\W\d][\w .:/()#?%-]{0,39}")  # a cell that may be the name of a column
SAMPLE = 100  # records that a header is compared with
csv.field_size_limit(max(csv.field_size_limit(), LONGEST_ROW))


class Cells(Layout):
    """CSV and its relatives: cells between delimiters, quoted cells over several lines; names of columns if it has them."""

    kind = "cells"
    is_table = True

    def places(self) -> Iterator[np.ndarray]:
        records = self._records()
        while batch := list(itertools.islice(records, RECORDS)):
            starts, lines, sizes = zip(*batch, strict=True)
            yield places_at(starts, lines, np.array(sizes))

    def _records(self) -> Iterator[tuple[int, int, int]]:
        """Start, line and size of each record that is not blank, the header left out."""
        feed = _Feed(lines_of(self.data, self.facts["begin"], self.longest), self.facts["begin"], self.longest)
        header = bool(self.facts["header"])
        reader = _reader(feed.texts(), self.facts)
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                if "end of data" in str(error) or feed.is_long:
                    reason = "a quoted cell is never closed" if "end of data" in str(error) else str(error)
                    raise ValueError(f"{self.data.origin}:{feed.line}: not a table: {reason}") from None
                cells = [""]  # a row all the same: reading it says what is wrong
            if cells is None:
                return
            record = feed.take()
            if cells and not header:
                yield record
            header = header and not cells

    def decode(self, raw: bytes, place: Place) -> dict[str, str]:
        self._check_size(place)
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            at = place.start + error.start
            raise RowError(f"not UTF-8 at byte {at} of the file; save the file as UTF-8", "not UTF-8") from None
        if "\0" in text:
            raise RowError(f"a NUL at character {text.index(chr(0)) + 1}; remove it", "a NUL")
        try:
            cells = next(_reader(io.StringIO(text, newline=""), self.facts))
        except csv.Error as error:
            raise RowError(f"not a table: {error}; write a quote inside quotes twice", "a quote out of place") from None
        names = self.facts["names"]
        if len(cells) != len(names):
            raise RowError(f"{len(cells)} cells, but {len(names)} columns", "wrong number of cells")
        return dict(zip(names, cells, strict=True))


class _Feed:
    """Lines for a reader of records; knows how much of them the reader has taken."""

    def __init__(self, lines: Iterator[bytes], begin: int, longest: int) -> None:
        self.lines, self.longest = lines, longest
        self.start, self.line = begin, 1  # of the record being read
        self.size = self.count = 0  # of its bytes and lines so far

    @property
    def is_long(self) -> bool:
        return self.size > self.longest

    def texts(self) -> Iterator[str]:
        for line in self.lines:
            self.size += len(line)
            self.count += 1
            if self.is_long:
                raise csv.Error(f"a record is longer than {self.longest} bytes; split it, or close its quotes")
            yield line.decode("latin-1")  # delimiters, quotes and line ends are the same bytes

    def take(self) -> tuple[int, int, int]:
        record = self.start, self.line, self.size
        self.start, self.line, self.size, self.count = self.start + self.size, self.line + self.count, 0, 0
        return record


def _reader(lines: Iterable[str], facts: Mapping[str, Any]) -> Iterator[list[str]]:
    quoted, delimiter = facts["quoted"], facts["delimiter"]
    return csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=True)


def look_at_cells(head: bytes, path: str, columns: Iterable[str], *, whole: bool) -> dict[str, Any] | None:
    """Delimiter, quoting and names of columns; None where the text is no table."""
    text = head.removeprefix(BOM).decode(errors="replace")
    text = text if whole else text[: text.rfind("\n") + 1] or text
    ending = ending_of(path)
    guesses = [_guess(text, delimiter, whole=whole) for delimiter in ("\t,;|" if ending == ".tsv" else ",\t;|")]
    tables = [guess for guess in guesses if guess.records and (ending or guess.is_certain)]
    if not tables:
        return None
    best = max(tables, key=lambda guess: (len(guess.records[0]) > 1, guess.agreement))
    header = _is_header(best.records, set(columns))
    names = [(header and cell.strip()) or str(number) for number, cell in enumerate(best.records[0])]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{path}:1: two columns are named {twice[0]!r}; give each its own name")
    begin = len(BOM) if head.startswith(BOM) else 0
    return {"delimiter": best.delimiter, "quoted": best.quoted, "header": header, "names": names, "begin": begin}


class _Guess(NamedTuple):
    delimiter: str
    quoted: bool
    records: list[list[str]]

    @property
    def agreement(self) -> float:
        """Share of records that have as many cells as the first."""
        return sum(len(cells) == len(self.records[0]) for cells in self.records) / len(self.records)

    @property
    def is_certain(self) -> bool:
        """Whether it is a table whatever the file is called."""
        return len(self.records) > 1 and len(self.records[0]) > 1 and self.agreement == 1


def _guess(text: str, delimiter: str, *, whole: bool) -> _Guess:
    """The records of a text with this delimiter. Between tabs a quote is a quote unless cells are quoted throughout."""
    records, is_table = _sample(text, delimiter, quoted=True, whole=whole)
    if delimiter == "\t":
        literal, _ = _sample(text, delimiter, quoted=False, whole=whole)
        is_quoted = any(cell.startswith('"') for cells in literal for cell in cells)
        if not (is_quoted and is_table and _Guess(delimiter, True, records).agreement == 1):
            return _Guess(delimiter, False, literal)
    return _Guess(delimiter, True, records)


def _sample(text: str, delimiter: str, *, quoted: bool, whole: bool) -> tuple[list[list[str]], bool]:
    """Records as far as they can be read, and whether that is to the end."""
    records: list[list[str]] = []
    try:
        for cells in _reader(io.StringIO(text, newline=""), {"delimiter": delimiter, "quoted": quoted}):
            if cells:
                records.append(cells)
    except csv.Error as error:
        return records, not whole and "end of data" in str(error)  # the sample ends inside a record
    return records, bool(records)


def _is_header(records: list[list[str]], columns: set[str]) -> bool:
    """Whether the first record names columns: short distinct cells, known or asked for or unlike what stands below."""
    first = records[0]
    if any(cell in columns and not cell.isdigit() for cell in first):
        return True
    if len(set(first)) < len(first) or not all(NAME.fullmatch(cell) or not cell for cell in first):
        return False
    below = [cells for cells in records[1 : SAMPLE + 1] if len(cells) == len(first)]
    unlike = (not any(NAME.fullmatch(cells[n]) for cells in below) for n, cell in enumerate(first) if cell)
    return not KNOWN_COLUMNS.isdisjoint(first) or any(unlike)


KNOWN_COLUMNS = frozenset(
    {"messages", "conversations", "instruction", "input", "output", "response", "system", "history", "prompt"}
    | {"completion", "question", "answer", "context", "label", "text", "chosen", "rejected", "tools"}
)
