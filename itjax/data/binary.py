"""Files of rows that are no text: Parquet and ArrayRecord. Their rows have numbers, from 1, instead of lines."""

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordReader

from itjax.base.files import create_private
from itjax.data.files import Bytes
from itjax.data.places import Layout, Place, places_at
from itjax.data.strict_json import RowError, parse

PARQUET, ARRAY_RECORD = b"PAR1", bytes.fromhex("83af70d10d884a3f")  # first bytes
ARROW_BATCH = 1024  # rows at most; a row is found in a file of such batches without unpacking its neighbours
ARROW_BYTES = 16 << 20  # of a batch, about
NUMBERED = 1 << 20  # places told at a time


class Parquet(Layout):
    """Parquet, turned once into Arrow batches from which a row is read alone."""

    kind = "parquet"
    is_table = True

    def places(self) -> Iterator[np.ndarray]:
        yield from _numbered(self.facts["rows"])

    def fetch(self, places: Sequence[Place]) -> list[Any]:
        """Rows that follow each other inside a batch are turned into values together."""
        self.data.check()
        try:
            table = _arrow(self.data.path)
        except OSError:
            raise ValueError(f"{self.data.origin}: its copy in {self.data.path} is gone; start again") from None
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
        with pq.ParquetFile(data.path) as file, create_private(target) as sink, contextlib.ExitStack() as stack:
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
    for start in range(0, rows, NUMBERED):
        numbers = np.arange(start, min(start + NUMBERED, rows))
        yield places_at(numbers, numbers + 1, np.zeros(len(numbers)))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
