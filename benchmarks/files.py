"""How fast rows are found in files and read in any order, and what memory that takes, for files of every layout.

Each file is opened in a process of its own: once to find its rows, once more when they are found already. Memory is what
the process holds by itself (anonymous pages), beside the pages of the mapped index that the system may take back.
"""

import csv
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import SEED, measured
from itjax.data.sources import FileSource

LINES = 2_000_000  # rows of JSON Lines
ROWS = 200_000  # rows of the other layouts
READS, BATCH, REPEATS = 20_000, 256, 3


def results() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return [result for name, write in WRITERS.items() for result in of_file(Path(folder), name, write)]


def of_file(folder: Path, name: str, write: Callable[[Path, int], None]) -> list[dict[str, Any]]:
    path, rows = folder / name, LINES if name.endswith("jsonl") else ROWS
    write(path, rows)
    facts = {"rows": rows, "bytes": path.stat().st_size}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        found = [pool.apply(find, (path, folder / f"kept {turn}")) for turn in range(REPEATS)]
        read = pool.apply(read_in_any_order, (path, folder / "kept 0"))
    path.unlink()
    return [
        measured(f"{name}: rows found", "rows/s", [rows / seconds for seconds, _ in found], **facts),
        measured(f"{name}: own memory while rows are found", "MB", [size / 1e6 for _, size in found], **facts),
        measured(f"{name}: opened again", "ms", [read["open"] * 1e3], **facts),
        measured(f"{name}: rows in any order, one at a time", "rows/s", read["single"], **facts),
        measured(f"{name}: rows in order, {BATCH} at a time", "rows/s", read["batch"], **facts),
        measured(f"{name}: own memory while rows are read", "MB", [read["memory"] / 1e6], **facts),
    ]


def find(path: Path, kept: Path) -> tuple[float, int]:
    """Seconds, and the memory that the process has more of, at the end or on the way."""
    before, start = own_memory(), time.perf_counter()
    source = open_one(path, kept)
    seconds = time.perf_counter() - start
    assert source.conversation(0)
    return seconds, own_memory() - before


def read_in_any_order(path: Path, kept: Path) -> dict[str, Any]:
    before, start = own_memory(), time.perf_counter()
    source = open_one(path, kept)
    opened = time.perf_counter() - start
    order = np.random.default_rng(SEED).permutation(len(source))[:READS].tolist()
    batches = [range(at, at + BATCH) for at in range(0, READS, BATCH)]
    single = [rate(source.conversation, order) for _ in range(REPEATS)]
    batch = [rate(source.conversations, batches) for _ in range(REPEATS)]
    return {"open": opened, "single": single, "batch": batch, "memory": own_memory() - before}


def rate(read: Callable[[Any], Any], pieces: list[Any]) -> float:
    start = time.perf_counter()
    for piece in pieces:
        read(piece)
    return READS / (time.perf_counter() - start)


def open_one(path: Path, kept: Path) -> FileSource:
    return FileSource([path], "rows", cache_dir=kept)


def own_memory() -> int:
    """Bytes of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))


# ---------------------------------------------------------------------------------------------- files of short rows


def draw(rows: int) -> Iterator[dict[str, str]]:
    lengths = np.random.default_rng(SEED).integers(0, 60, rows)
    for number, length in enumerate(lengths.tolist()):
        yield {"prompt": f"What is {number} and one? {'x' * length}", "completion": str(number + 1)}


def write_lines(path: Path, rows: int) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in draw(rows))


def write_array(path: Path, rows: int) -> None:
    path.write_text(json.dumps(list(draw(rows)), indent=1))


def write_cells(path: Path, rows: int) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, ["prompt", "completion"])
        table.writeheader()
        table.writerows(draw(rows))


def write_parquet(path: Path, rows: int) -> None:
    pq.write_table(pa.Table.from_pylist(list(draw(rows))), path, compression="zstd")


WRITERS = {
    "lines.jsonl": write_lines,
    "list.json": write_array,
    "table.csv": write_cells,
    "table.parquet": write_parquet,
}
