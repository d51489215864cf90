"""Tokenised once, kept on disk: a source's examples as flat memory-mapped arrays.

    tokens   [10, 11, 20, 21,  1 | 30, 31,  1]      two examples, one behind the other
    weights  [ 0,  0,  1,  1,  1 |  0,  1,  1]      of each token as a target; the first of an example never is one
    offsets  [ 0, 5, 8]
    lengths  [ 4, 2]                                positions: one less than tokens

A source may come in several editions: the same rows again in other words, one edition behind the other. Row number
e * R + i of a source of R rows is row i in edition e, and `edition_ends` says where each edition's examples end:

    rows         [0, 2, 3 | 4, 5, 7]                two editions of four rows, two dropped
    edition_ends [3, 6]

A cache is a folder whose name ends in a hash of everything that shapes it. It is built beside its place and renamed, so
it is whole or absent.
"""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from itjax.base.files import building, create_private, private_folder
from itjax.base.records import TokenizedExample
from itjax.data import files, sources
from itjax.data.encode import Dropped, Encoding, encode_many
from itjax.data.processes import spread
from itjax.data.sources import RowSource

VERSION = 3  # of the code that shapes tokens and of the files; a new number makes all caches anew
CHUNK = 256  # rows a process encodes at a time
SMALL = 2048  # rows for which no process is started
SUMMARY = "summary.json"
COLUMNS: dict[str, np.dtype[Any]] = {  # file name -> type
    "tokens": np.dtype("<i4"),
    "weights": np.dtype("<f4"),
    "lengths": np.dtype("<i4"),
    "weight_sums": np.dtype("<f4"),
    "num_trained": np.dtype("<i4"),
    "rows": np.dtype("<i8"),
    "templates": np.dtype("<i4"),
    "keys": np.dtype("u1"),
    "key_ends": np.dtype("<i8"),
}
NO_WEIGHT = np.zeros(1, np.float32)
Progress = Callable[[int, int], None]  # rows done, rows in all


class EncodedSource:
    """The examples of one source, opened from its cache folder. Pickles as the path."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._summary = _read_summary(self.path)
        self.name: str = self._summary["name"]
        self.fingerprint: str = self._summary["fingerprint"]
        self.rows_fingerprint: str = self._summary["rows_fingerprint"]  # the same however many editions there are
        self.report: dict[str, Any] = self._summary["report"]
        self._columns = columns = {name: _open_column(self.path, name, self._summary) for name in COLUMNS}
        self.tokens, self.weights = columns["tokens"], columns["weights"]
        self.lengths, self.weight_sums = columns["lengths"], columns["weight_sums"]
        self.num_trained, self.rows = columns["num_trained"], columns["rows"]
        self._keys, self._key_ends, self._templates = columns["keys"], columns["key_ends"], columns["templates"]
        self.edition_ends = np.array(self._summary["edition_ends"], np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths.astype(np.int64) + 1)])

    def __reduce__(self) -> tuple[type["EncodedSource"], tuple[Path]]:
        return EncodedSource, (self.path,)

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, index: int) -> TokenizedExample:
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        return TokenizedExample(
            tokens_T=self.tokens[start : end - 1],
            targets_T=self.tokens[start + 1 : end],
            weights_T=self.weights[start + 1 : end],
        )

    def address(self, index: int) -> str:
        """Where the example comes from: `path:line`, or `task:number`."""
        start = int(self._key_ends[index - 1]) if index else 0
        return self._keys[start : int(self._key_ends[index])].tobytes().decode()

    def template(self, index: int) -> str:
        return self._summary["templates"][int(self._templates[index])]

    def check(self) -> None:
        """Reads everything once: sums as written, and every id inside the vocabulary."""
        for name, column in self._columns.items():
            if _checksum(column) != self._summary["checksums"][name]:
                raise _damaged(self.path, f"{name} is not what was written")
        if len(self.offsets) and int(self.offsets[-1]) != len(self.tokens):
            raise _damaged(self.path, f"{len(self.tokens)} tokens, but lengths add up to {int(self.offsets[-1])}")
        length, editions = self.report["rows"] * self.report["editions"], self.report["editions"]
        if self.edition_ends.tolist() != _edition_ends(self.rows, length, editions).tolist():
            raise _damaged(self.path, "edition_ends are not those of the rows")
        lowest, highest = (int(self.tokens.min()), int(self.tokens.max())) if len(self.tokens) else (0, 0)
        if lowest < 0 or highest >= self._summary["vocabulary"]:
            raise _damaged(
                self.path, f"ids {lowest} to {highest}, but the vocabulary has {self._summary['vocabulary']}"
            )


def encode_source(
    source: RowSource, encoding: Encoding, *, cache_dir: Path, workers: int, progress: Progress | None
) -> EncodedSource:
    """The source's examples, from the cache or made now, in the order of its rows whatever the number of workers."""
    fingerprint = _fingerprint(source, encoding)
    place = cache_dir / f"{_file_name(source.name)}-{fingerprint[:16]}"
    if not place.exists():
        _build(source, encoding, fingerprint, place, workers=workers, progress=progress)
    elif progress is not None:
        progress(len(source), len(source))
    encoded = EncodedSource(place)
    encoded.check()
    return encoded


def default_dir() -> Path:
    """The user's cache folder, readable by nobody else."""
    return private_folder(files.default_dir())


def _fingerprint(source: RowSource, encoding: Encoding) -> str:
    parts = (str(VERSION), source.name, str(_editions(source)), source.fingerprint(), encoding.fingerprint())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _editions(source: RowSource) -> int:
    """How many times a source says each of its rows; one where it does not speak of it."""
    editions = getattr(source, "editions", 1)
    assert len(source) % editions == 0, f"{source.name}: {len(source)} rows in {editions} editions"
    return editions


def _edition_ends(rows: np.ndarray, length: int, editions: int) -> np.ndarray:
    """How many of these row numbers, which ascend, are before the end of each edition of a source."""
    return np.searchsorted(rows, np.arange(1, editions + 1) * (length // editions)).astype(np.int64)


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:80]


# ---------------------------------------------------------------------------------------------- rows to chunks


class Chunk(NamedTuple):
    """Examples of a stretch of rows, one array per column of the cache."""

    columns: dict[str, np.ndarray]
    templates: list[str]
    counts: Counter[str]  # kept, truncated, and "dropped: reason"


def encode_rows(source: RowSource, encoding: Encoding, start: int, stop: int) -> Chunk:
    """Rows `start` to `stop` of a source, encoded."""
    conversations = sources.conversations(source, range(start, stop))
    counts: Counter[str] = Counter()
    kept: list[tuple[int, TokenizedExample]] = []
    for row, (example, was_cut) in enumerate(encode_many(conversations, encoding), start=start):
        counts["truncated"] += was_cut and not isinstance(example, Dropped)
        if isinstance(example, Dropped):
            counts[f"dropped: {example.reason}"] += 1
        else:
            kept.append((row, example))
    counts["kept"] = len(kept)
    keys = [conversations[row - start].key.encode() for row, _ in kept]
    templates = [conversations[row - start].template for row, _ in kept]
    names = sorted(set(templates))
    examples = [example for _, example in kept]
    lengths = np.array([len(e.tokens_T) for e in examples], dtype=np.int64)
    weights = _flat([part for e in examples for part in (NO_WEIGHT, e.weights_T)])
    columns = {
        "tokens": _flat([part for e in examples for part in (e.tokens_T, e.targets_T[-1:])]),
        "weights": weights,
        "lengths": lengths,
        "weight_sums": _sums(weights.astype(np.float64), lengths + 1),
        "num_trained": _sums(weights > 0, lengths + 1),
        "rows": [row for row, _ in kept],
        "templates": [names.index(template) for template in templates],
        "keys": np.frombuffer(b"".join(keys), dtype=np.uint8),
        "key_ends": np.cumsum([len(key) for key in keys]),
    }
    return Chunk({name: np.asarray(columns[name]).astype(COLUMNS[name]) for name in COLUMNS}, names, counts)


def _flat(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0)


def _sums(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Sums of consecutive stretches of these sizes, none empty."""
    starts = np.cumsum(sizes) - sizes
    return np.add.reduceat(values, starts, dtype=np.float64) if len(starts) else np.zeros(0)


def _chunks(source: RowSource, encoding: Encoding, *, workers: int) -> Iterator[Chunk]:
    ranges = [(start, min(start + CHUNK, len(source))) for start in range(0, len(source), CHUNK)]
    if workers <= 1 or len(source) <= SMALL:
        yield from (encode_rows(source, encoding, start, stop) for start, stop in ranges)
    else:
        yield from spread(_encode_range, ranges, shared=(source, encoding), workers=min(workers, len(ranges)))


def _encode_range(shared: tuple[RowSource, Encoding], stretch: tuple[int, int]) -> Chunk:
    return encode_rows(*shared, *stretch)


# ---------------------------------------------------------------------------------------------- chunks to disk


def _build(
    source: RowSource,
    encoding: Encoding,
    fingerprint: str,
    place: Path,
    *,
    workers: int,
    progress: Progress | None,
) -> None:
    """Makes the folder beside its place and renames it. Who finds the place taken had company, and is content."""
    private_folder(place.parent)
    with building(place.parent) as folder:
        summary = _write_columns(source, encoding, folder, workers=workers, progress=progress)
        first = getattr(source, "first_edition", source)
        summary |= {
            "version": VERSION,
            "name": source.name,
            "fingerprint": fingerprint,
            "rows_fingerprint": _fingerprint(first, encoding),
        }
        with create_private(folder / SUMMARY) as file:
            file.write(json.dumps(summary, indent=1).encode())
            _sync(file)
        _sync_folder(folder)
        try:
            folder.rename(place)
        except OSError:
            if not (place / SUMMARY).exists():
                raise
        _sync_folder(place.parent)


def _write_columns(
    source: RowSource, encoding: Encoding, folder: Path, *, workers: int, progress: Progress | None
) -> dict[str, Any]:
    """Writes chunk after chunk; what is said about all of them comes back."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter(dict.fromkeys(COLUMNS, 0))
    checksums: Counter[str] = Counter(dict.fromkeys(COLUMNS, 0))
    templates: dict[str, int] = {}
    rows_done = 0
    editions = _editions(source)
    edition_ends = np.zeros(editions, np.int64)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(create_private(folder / name)) for name in COLUMNS}
        for chunk in _chunks(source, encoding, workers=workers):
            numbers = np.array([templates.setdefault(name, len(templates)) for name in chunk.templates], np.int32)
            columns = chunk.columns | {
                "templates": numbers[chunk.columns["templates"]] if len(numbers) else chunk.columns["templates"],
                "key_ends": chunk.columns["key_ends"] + sizes["keys"],
            }
            for name, column in columns.items():
                files[name].write(column.tobytes())
                checksums[name] += _checksum(column)
                sizes[name] += len(column)
            counts += chunk.counts
            edition_ends += _edition_ends(chunk.columns["rows"], len(source), editions)
            counts["tokens"] += int(chunk.columns["lengths"].sum(dtype=np.int64))
            counts["trained tokens"] += int(chunk.columns["num_trained"].sum(dtype=np.int64))
            rows_done = min(rows_done + CHUNK, len(source))
            if progress is not None:
                progress(rows_done, len(source))
        for file in files.values():
            _sync(file)
    return {
        "vocabulary": encoding.tokenizer.size,
        "report": _report(len(source), editions, counts),
        "edition_ends": edition_ends.tolist(),
        "templates": list(templates),
        "sizes": dict(sizes),
        "checksums": {name: sum_ % (1 << 64) for name, sum_ in checksums.items()},
    }


def _report(length: int, editions: int, counts: Counter[str]) -> dict[str, Any]:
    """What became of the rows. Tokens are positions: what the model is fed.

    `rows` are the rows that were read; all other counts are over their editions: kept + dropped = rows * editions.
    """
    prefix = "dropped: "
    return {
        "rows": length // editions,
        "editions": editions,
        "kept": counts["kept"],
        "dropped": {k.removeprefix(prefix): n for k, n in sorted(counts.items()) if k.startswith(prefix)},
        "truncated": counts["truncated"],
        "tokens": counts["tokens"],
        "trained_tokens": counts["trained tokens"],
    }


def _checksum(column: np.ndarray) -> int:
    """The sum of the bit patterns, modulo 2^64: any one changed element changes it."""
    patterns = column.view(f"<u{column.dtype.itemsize}")
    return int(patterns.sum(dtype=np.uint64))


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads((path / SUMMARY).read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(path, f"{SUMMARY} cannot be read ({error})") from None
    if not isinstance(summary, dict) or summary.get("version") != VERSION:
        raise _damaged(path, f"{SUMMARY} is not of version {VERSION}")
    return summary


def _open_column(path: Path, name: str, summary: dict[str, Any]) -> np.ndarray:
    dtype, size = COLUMNS[name], summary["sizes"][name]
    file = path / name
    found = file.stat().st_size if file.exists() else -1
    if found != size * dtype.itemsize:
        raise _damaged(path, f"{name} has {found} bytes instead of {size * dtype.itemsize}")
    return np.memmap(file, dtype=dtype, mode="r", shape=(size,)) if size else np.zeros(0, dtype)


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path}: the cache is damaged ({what}); delete this folder and run again")


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
