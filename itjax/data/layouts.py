"""How a file holds its rows, recognised by looking: lines, a JSON list, a table of text, Parquet or ArrayRecord.

A layout says where every row is (`places`) and what it holds (`fetch`, then `decode`), one block or one row at a time.

    PLACE     start     bytes into the file; the number of the row in Parquet and ArrayRecord
              line      what a row's address says: the line it begins on; there, the row's number from 1
              size      bytes, ending included
              number    0, or which conversation of a row that holds several: the address ends in `#number`
"""

import contextlib
import csv
import functools
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordReader

from itjax.data.files import LONGEST_ROW, Bytes, create, stem
from itjax.data.strict_json import LINE_END, RowError, parse, parts

PLACE = np.dtype([("start", "<i8"), ("line", "<i8"), ("size", "<u4"), ("number", "<u4")])
BLOCK = 1 << 20
HEAD = 1 << 20  # bytes that are looked at to recognise a file
GAP = 1 << 12  # bytes between two rows that are read in one go
LONGEST_SIZE = (1 << 32) - 1
BOM = b"\xef\xbb\xbf"
PARQUET, ARROW_RECORDS = b"PAR1", bytes.fromhex("83af70d10d884a3f")
RECORDS = 1 << 14  # of a table whose places are told at a time
ARROW_BATCH = 1024  # rows at most; a row is found in a file of such batches without unpacking its neighbours
ARROW_BYTES = 16 << 20  # of a batch, about
DEFINITION = re.compile(rb'"Definition"\s*:')  # opens a Natural-Instructions task that is one JSON object
NAME = re.compile(r"[^\W\d][\w .:/()#?%-]{0,39}")  # a cell that may be the name of a column
SAMPLE = 100  # records that are looked at to understand a table
csv.field_size_limit(max(csv.field_size_limit(), LONGEST_ROW))


class Place(NamedTuple):
    """Where a row is: see above."""

    start: int
    line: int
    size: int
    number: int


class Layout:
    """One way of holding rows. `facts` are plain values that are kept with the index."""

    kind: ClassVar[str]
    unit: ClassVar[str] = "line"

    def __init__(self, data: Bytes, facts: Mapping[str, Any], *, longest: int) -> None:
        self.data, self.facts, self.longest = data, dict(facts), longest

    @property
    def task(self) -> Mapping[str, Any] | None:
        """The head of a Natural-Instructions file: what all its rows have in common."""
        return self.facts.get("task")

    def places(self) -> Iterator[np.ndarray]:
        raise NotImplementedError

    def fetch(self, places: Sequence[Place]) -> list[Any]:
        """The bytes of rows, neighbours in one read; empty where the row is too long."""
        spans = [(place.start, 0 if place.size > self.longest else place.size) for place in places]
        fetched = [b""] * len(places)
        for group in _neighbours(spans):
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


def _neighbours(spans: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
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


def _places(starts: Any, lines: Any, sizes: Any) -> np.ndarray:
    found = np.zeros(len(starts), PLACE)
    found["start"], found["line"], found["size"] = starts, lines, np.minimum(sizes, LONGEST_SIZE)
    return found


# ---------------------------------------------------------------------------------------------- JSON


class Lines(Layout):
    """JSON Lines: a value a line; blank lines are no rows, and neither is the head of a Natural-Instructions file."""

    kind = "lines"

    def places(self) -> Iterator[np.ndarray]:
        start, line = self.facts["begin"], self.facts["line"]  # of the line that a block may have begun
        has_text = False  # so far
        for at in range(start, self.data.size, BLOCK):
            raw = self.data.read(at, min(BLOCK, self.data.size - at))
            ends = np.flatnonzero(np.frombuffer(raw, np.uint8) == LINE_END)
            bounds = np.concatenate([[0], ends + 1, [len(raw)]])
            have_text = _have_text(raw, bounds)
            have_text[0] |= has_text
            starts = np.concatenate([[start], at + ends + 1])
            found = _places(starts[:-1], line + np.arange(len(ends)), np.diff(starts))
            yield found[have_text[:-1]]
            start, line, has_text = int(starts[-1]), line + len(ends), bool(have_text[-1])
        if has_text:
            yield _places([start], [line], [self.data.size - start])

    def decode(self, raw: bytes, place: Place) -> Any:
        return super().decode(raw.rstrip(b"\r\n"), place)


def _have_text(raw: bytes, bounds: np.ndarray) -> np.ndarray:
    """Whether the stretches between bounds hold more than spaces."""
    firsts = np.frombuffer(raw + b"\n", np.uint8)[bounds[:-1]]
    have_text = ~_IS_BLANK[firsts]
    for number in np.flatnonzero(~have_text).tolist():
        have_text[number] = bool(raw[bounds[number] : bounds[number + 1]].strip())
    return have_text


_IS_BLANK = np.zeros(256, bool)
_IS_BLANK[list(b" \t\r\n\v\f")] = True


class Array(Layout):
    """A JSON document: a list of rows, or a Natural-Instructions task with its list of `Instances`."""

    kind = "array"

    def places(self) -> Iterator[np.ndarray]:
        spot = {name: self.facts[name] for name in ("start", "stop", "line")}
        for found in _told(self.data.origin, parts(self.data.read, **spot)):
            yield _places(found.starts, found.lines, found.sizes)


def _told(name: str, found: Iterator[Any]) -> Iterator[Any]:
    """A fault of the whole document: its row cannot be left out, so it has no rows."""
    try:
        yield from found
    except RowError as error:
        line, _, reason = str(error).removeprefix("line ").partition(": ")
        raise ValueError(f"{name}:{line}: {reason}") from None


def _look_at_object(data: Bytes, begin: int, line: int, *, longest: int) -> dict[str, Any]:
    """Fields of a task, and where its `Instances` are."""
    head: dict[str, Any] = {}
    rows = None
    members = _told(data.origin, parts(data.read, start=begin, stop=data.size, line=line))
    for start, size, at_line in ((int(s), int(n), int(i)) for found in members for s, n, i in zip(*found, strict=True)):
        try:
            key, value_start = _key(data.read(start, min(size, 4096)))
            if key == "Instances":
                rows = {"start": start + value_start, "stop": start + size, "line": at_line}
            elif size > longest:
                raise RowError(f"{key!r} is too long", "too long")
            else:
                head[key] = parse(data.read(start + value_start, size - value_start), start=start + value_start)
        except RowError as error:
            raise ValueError(f"{data.origin}:{at_line}: {error}") from None
    if rows is None or data.read(rows["start"], 1) != b"[":
        raise ValueError(
            f"{data.origin}:{line}: one object with keys {_few(sorted(head))} is not a list of rows; "
            "give a list, an object a line, or a task with Definition and Instances"
        )
    return {**rows, "task": _task({"task": stem(data.origin), **{key.lower(): value for key, value in head.items()}})}


def _few(names: list[str]) -> str:
    return f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"


def _key(raw: bytes) -> tuple[str, int]:
    """The key of a member, and how many bytes stand before its value."""
    text = raw.decode(errors="ignore")
    try:
        key, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        key, end = None, 0
    match = re.compile(r"\s*:\s*").match(text, end)
    if not isinstance(key, str) or match is None:
        raise RowError("not JSON: a key and ':' expected", "not JSON")
    return key, len(text[: match.end()].encode())


def _task(head: Mapping[str, Any]) -> dict[str, Any]:
    """What the heads of both kinds of Natural-Instructions files call by one name."""
    names = {"categories": "category", "positive examples": "positive_examples"}
    names |= {"negative examples": "negative_examples"}
    return {names.get(key, key): value for key, value in head.items()}


# ---------------------------------------------------------------------------------------------- tables of text


class Cells(Layout):
    """CSV and its relatives: cells between delimiters, quoted cells over several lines; names of columns if it has them."""

    kind = "cells"

    def places(self) -> Iterator[np.ndarray]:
        records = self._records()
        while batch := list(itertools.islice(records, RECORDS)):
            starts, lines, sizes = zip(*batch, strict=True)
            yield _places(starts, lines, np.array(sizes))

    def _records(self) -> Iterator[tuple[int, int, int]]:
        """Start, line and size of each record that is not blank, the header left out."""
        feed = _Feed(_lines(self.data, self.facts["begin"], self.longest), self.facts["begin"], self.longest)
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


def _lines(data: Bytes, begin: int, longest: int) -> Iterator[bytes]:
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


def _reader(lines: Iterable[str], facts: Mapping[str, Any]) -> Iterator[list[str]]:
    quoted, delimiter = facts["quoted"], facts["delimiter"]
    return csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=True)


def _look_at_cells(head: bytes, path: str, columns: Iterable[str], *, whole: bool) -> dict[str, Any] | None:
    """Delimiter, quoting and names of columns; None where the text is no table."""
    text = head.removeprefix(BOM).decode(errors="replace")
    text = text if whole else text[: text.rfind("\n") + 1] or text
    ending = _ending(path)
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


# ---------------------------------------------------------------------------------------------- tables of other kinds


class Parquet(Layout):
    """Parquet, turned once into Arrow batches from which a row is read alone."""

    kind = "parquet"
    unit = "row"

    def places(self) -> Iterator[np.ndarray]:
        yield from _numbered(self.facts["rows"])

    def fetch(self, places: Sequence[Place]) -> list[Any]:
        """Rows that follow each other inside a batch are turned into values together."""
        self.data.check()
        table = _arrow(self.data.path)
        rows = [place.start for place in places]
        fetched: list[Any] = []
        while len(fetched) < len(rows):
            begin = rows[len(fetched)]
            batch, row = divmod(begin, self.facts["batch"])
            following = zip(rows[len(fetched) :], range(begin, (batch + 1) * self.facts["batch"]), strict=False)
            count = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], following))
            fetched += table.get_batch(batch).slice(row, count).to_pylist()
        return fetched

    def fetch_one(self, place: Place) -> Any:
        return self.fetch([place])[0]

    def decode(self, raw: dict[str, Any], place: Place) -> dict[str, Any]:
        return raw


@functools.lru_cache(maxsize=8)
def _arrow(path: str) -> Any:
    return pa.ipc.open_file(pa.memory_map(path))


def unpack_parquet(data: Bytes, target: Path) -> dict[str, int]:
    """Writes the rows of a Parquet file as Arrow batches of one size; returns how many rows there are, and in a batch."""
    rows = 0
    try:
        with pq.ParquetFile(data.path) as file, create(target) as sink, contextlib.ExitStack() as stack:
            size, writer = _batch_size(file.metadata), None
            for table in _equal_tables(map(_plain, file.iter_batches(size)), size):
                writer = writer or stack.enter_context(pa.ipc.new_file(sink, table.schema))
                writer.write_batch(table.to_batches()[0])
                rows += table.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{data.origin}: not a whole Parquet file ({_first_line(error)}); write it again") from None
    return {"rows": rows, "batch": size}


def _batch_size(metadata: pq.FileMetaData) -> int:
    """Rows that take about ARROW_BYTES: long rows come in small batches."""
    size = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    return max(1, min(ARROW_BATCH, ARROW_BYTES * metadata.num_rows // max(size, 1)))


def _plain(batch: pa.RecordBatch) -> pa.Table:
    """Without dictionaries, which a file of batches can hold only one of for each column."""
    table = pa.Table.from_batches([batch])
    for number, column in enumerate(table.schema):
        if pa.types.is_dictionary(column.type):
            value = column.with_type(column.type.value_type)
            table = table.set_column(number, value, table[number].cast(value.type))
    return table


def _equal_tables(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows, `size` at a time, whatever the groups of the file."""
    waiting: pa.Table | None = None
    for table in tables:
        waiting = table if waiting is None else pa.concat_tables([waiting, table])
        while waiting.num_rows >= size:
            yield waiting.slice(0, size).combine_chunks()
            waiting = waiting.slice(size)
    if waiting is not None and waiting.num_rows:
        yield waiting.combine_chunks()


class ArrayRecord(Layout):
    """ArrayRecord: each record is one row as JSON."""

    kind = "array_record"
    unit = "row"

    def places(self) -> Iterator[np.ndarray]:
        yield from _numbered(self.facts["rows"])

    def fetch(self, places: Sequence[Place]) -> list[Any]:
        self.data.check()
        with _records_told(self.data):
            return _records(self.data.path, self.data.seen).read([place.start for place in places])

    def fetch_one(self, place: Place) -> Any:
        return self.fetch([place])[0]

    def decode(self, raw: bytes, place: Place) -> Any:
        if len(raw) > self.longest:
            raise RowError("the row is too long; split it", "the row is too long")
        try:
            return parse(raw)
        except RowError as error:
            raise RowError(str(error).replace(" of the file", " of the record"), error.reason) from None


@contextlib.contextmanager
def _records_told(data: Bytes) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the reader raises what its C++ says
        reason = _first_line(error)
        raise ValueError(f"{data.origin}: not a whole ArrayRecord file ({reason}); write it again") from None


@functools.lru_cache(maxsize=8)
def _records(path: str, seen: tuple[int, int, int] | None) -> Any:
    return ArrayRecordReader(path, "readahead_buffer_size:0")  # rows are read in any order


def count_records(data: Bytes) -> int:
    """How many rows an ArrayRecord file holds."""
    with _records_told(data):
        rows = _records(data.path, data.seen).num_records()
    if not rows:
        raise ValueError(f"{data.origin}: an ArrayRecord file without rows, or not a whole one; write it again")
    return rows


def _numbered(rows: int) -> Iterator[np.ndarray]:
    for start in range(0, rows, BLOCK):
        numbers = np.arange(start, min(start + BLOCK, rows))
        yield _places(numbers, numbers + 1, np.zeros(len(numbers)))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


# ---------------------------------------------------------------------------------------------- which one


LAYOUTS: dict[str, type[Layout]] = {layout.kind: layout for layout in (Lines, Array, Cells, Parquet, ArrayRecord)}


def look(data: Bytes, *, columns: Iterable[str], longest: int) -> tuple[str, dict[str, Any]]:
    """The kind of layout that a file has, and what has to be known to read it. Parquet is to be unpacked then."""
    head = data.read(0, min(HEAD, data.size))
    if head.startswith(PARQUET):
        return Parquet.kind, {}
    if head.startswith(ARROW_RECORDS):
        return ArrayRecord.kind, {"rows": count_records(data)}
    text = head.removeprefix(BOM).lstrip()
    begin = len(head) - len(text)
    line = 1 + head.count(b"\n", 0, begin)
    _check_text(text, data)
    is_json = text.startswith((b"{", b"["))
    if not is_json or (_ending(data.origin) and not _is_value(text)):
        facts = _look_at_cells(head, data.origin, columns, whole=len(head) == data.size)
        if facts is not None:
            return Cells.kind, facts
    if text.startswith(b"["):
        return Array.kind, {"start": begin, "stop": data.size, "line": line}
    if is_json and _is_document(text, cut=len(head) < data.size):
        return Array.kind, _look_at_object(data, begin, line, longest=longest)
    if not is_json and not _is_named_json(data.origin):
        raise ValueError(f"{data.origin}:1: neither JSON, CSV, TSV, Parquet nor ArrayRecord; look at its first line")
    return Lines.kind, _look_at_lines(data, head, longest=longest)


def _check_text(text: bytes, data: Bytes) -> None:
    if text.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{data.origin}:1: this is UTF-16; save it as UTF-8")
    if not text and data.size <= HEAD:
        raise ValueError(f"{data.origin}: the file is empty; give a file with rows")


def _ending(path: str) -> str:
    """`.csv` or `.tsv` where the name promises a table of text, packed or not."""
    name = path.removesuffix(".gz").removesuffix(".zst")
    return next((ending for ending in (".csv", ".tsv") if name.endswith(ending)), "")


def _is_named_json(path: str) -> bool:
    return path.removesuffix(".gz").removesuffix(".zst").endswith((".jsonl", ".ndjson", ".json"))


def _is_value(text: bytes) -> bool:
    """Whether the first line is JSON, or a bracket that opens a document."""
    line = text.partition(b"\n")[0].rstrip(b"\r, ")
    return line in (b"[", b"{", b"[{") or _parsed(line) is not None


def _parsed(line: bytes) -> Any:
    try:
        return parse(line)
    except ValueError:
        return None


def _is_document(text: bytes, *, cut: bool) -> bool:
    """Whether a text that opens an object is one JSON value as a whole; else each line is one."""
    first_line, line_end, others = text.partition(b"\n")
    if not line_end and cut:  # the line goes on behind the head
        return DEFINITION.search(first_line) is not None
    row = _parsed(first_line)
    if isinstance(row, dict):
        return "Definition" in row and "Instances" in row
    second_line = others.lstrip().partition(b"\n")[0]
    is_broken_row = first_line.rstrip().endswith(b"}") or isinstance(_parsed(second_line), dict) or not second_line
    return not is_broken_row


def _look_at_lines(data: Bytes, head: bytes, *, longest: int) -> dict[str, Any]:
    """Where lines of rows begin: behind a mark of the byte order, and behind the head of a Natural-Instructions file."""
    begin = len(BOM) if head.startswith(BOM) else 0
    end = head.find(b"\n", begin) + 1
    if b'"definition"' not in head[begin : end or len(head)]:
        return {"begin": begin, "line": 1}
    if not end and len(head) < data.size:
        end = next((len(line) for line in _lines(data, 0, longest)), 0)
    task = _parsed(data.read(begin, (end or data.size) - begin))
    if not isinstance(task, dict) or task.get("type") != "task":
        return {"begin": begin, "line": 1}
    return {"begin": end or data.size, "line": 2, "task": _task(task)}
