"""The stages of an audit on a cluster: the same objects as in `stages.run`, the same findings, on Ray Data.

    numbers of examples -> look, on the machine that reads the row    -> findings, marks
    marks               -> shuffled by bucket, then `pairs`           -> pairs
    pairs               -> `findings` on the machine that asked       -> findings

Ray comes with the extra `itjax[audit-ray]`. It joins the cluster that RAY_ADDRESS names, or starts one on this machine.
"""

import dataclasses
import importlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from itjax.base.records import Finding
from itjax.data.sources import BadRow
from itjax.data.stages import (
    Address,
    Example,
    Mark,
    Noted,
    Pair,
    Stage,
    address_of,
    grouped,
    in_order,
    look,
    looks_at_groups,
)

ROWS = 1024  # examples that are looked at in one go
SHARDS_PER_CORE = 4  # parts the buckets are shuffled into; one has to fit into the memory of its worker
NOBODY = -1  # the shard of a finding, which shares its bucket with nobody
UNREADABLE, SEEN = -1, -2  # in place of a stage: the row has no conversation to look at; a file that rows are in

TOLD = pa.schema(  # what is known of an example: a finding, or its mark in one bucket
    [
        ("shard", pa.int64()),
        ("stage", pa.int64()),
        ("number", pa.int64()),
        ("order", pa.int64()),
        ("bucket", pa.binary()),
        ("about", pa.string()),  # the finding, or the address, or why the row cannot be read, or the file
        ("content", pa.binary()),
    ]
)
PAIRS = pa.schema([("stage", pa.int64()), ("first", pa.string()), ("second", pa.string()), ("score", pa.float64())])


class Examples(Protocol):
    """Examples by number. Workers read what they look at, so that it travels to them without its rows."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Example: ...


class Unreadable(NamedTuple):
    """A row without a conversation to look at."""

    number: int
    reason: str
    why: str


class Told(NamedTuple):
    """What the workers say of all examples."""

    noted: list[Noted]  # in the order of the examples and then of the stages
    unreadable: list[Unreadable]
    files: list[
        tuple[int, str]
    ]  # every `path` of `path:line`, at least once, with the number of an example that is in it


def run(
    stages: Sequence[Stage], examples: Examples, *, shards: int = 0, unreadable: Counter[str] | None = None
) -> list[Finding]:
    """All findings, in the order of the examples and then of the stages. `shards` 0: a few for every core.

    Rows that cannot be read are counted in `unreadable` by their reasons; without it such a row is an error.
    """
    told = look_at_all(stages, examples, shards=shards)
    if unreadable is not None:
        unreadable.update(row.reason for row in told.unreadable)
    elif told.unreadable:
        raise ValueError(f"audit: {told.unreadable[0].why}; mend the row, or count such rows in `unreadable`")
    return [note.finding for note in told.noted]


def look_at_all(stages: Sequence[Stage], examples: Examples, *, shards: int = 0) -> Told:
    """The same with everything else that was learnt on the way."""
    ray = installed()
    started = not ray.is_initialized()
    if started:
        ray.init(configure_logging=False, log_to_driver=False)
    try:
        shards = shards or SHARDS_PER_CORE * max(1, int(ray.cluster_resources()["CPU"]))
        return _run(ray, stages, examples, shards)
    finally:
        if started:
            ray.shutdown()


def _run(ray: Any, stages: Sequence[Stage], examples: Examples, shards: int) -> Told:
    if not len(examples):
        return Told([], [], [])
    held = ray.put((tuple(stages), examples))
    get = ray.get
    numbers = ray.data.range(len(examples), override_num_blocks=max(1, min(shards, len(examples) // ROWS)))
    told = numbers.map_batches(
        partial(_look, get, held, shards), batch_size=ROWS, batch_format="pyarrow", zero_copy_batch=True
    ).materialize()  # rows are read once
    noted, unreadable, files = [], [], []
    for row in told.map_batches(_alone, batch_format="pyarrow").iter_rows():
        if row["stage"] == UNREADABLE:
            unreadable.append(Unreadable(row["number"], row["about"], row["content"].decode()))
        elif row["stage"] == SEEN:
            files.append((row["number"], row["about"]))
        else:
            noted.append(_noted(row))
    places = [place for place, stage in enumerate(stages) if looks_at_groups(stage)]
    if places:
        marks = told.map_batches(_marks, batch_format="pyarrow")
        pairs = marks.groupby("shard", num_partitions=shards).map_groups(
            partial(_pairs, get, held), batch_format="pyarrow"
        )
        found: dict[int, list[Pair]] = {place: [] for place in places}
        for row in pairs.iter_rows():
            found[row["stage"]].append(Pair(_address(row["first"]), _address(row["second"]), row["score"]))
        for place in places:
            stage = stages[place]
            assert looks_at_groups(stage)
            noted.extend(grouped(stage, place, found[place]))
    return Told(in_order(noted), sorted(unreadable), files)


# ---------------------------------------------------------------------------------------------- on the workers


def _look(get: Callable[[Any], Any], held: Any, shards: int, batch: pa.Table) -> pa.Table:
    stages, examples = get(held)
    rows: list[tuple[Any, ...]] = []
    files: dict[tuple[str, str, str], int] = {}
    for number in batch["id"].to_pylist():
        try:
            example = examples[number]
        except BadRow as error:
            rows.append((NOBODY, UNREADABLE, number, 0, b"", error.reason, str(error).encode()))
            continue
        address = address_of(example)
        files.setdefault((address.split, address.source, address.key.rpartition(":")[0]), number)
        noted, marked = look(stages, example)
        for note in noted:
            finding = json.dumps(dataclasses.asdict(note.finding))
            rows.append((NOBODY, note.stage, number, note.order, b"", finding, b""))
        about = json.dumps(address)
        for place, marks in marked:
            rows += [
                (_shard(mark, shards), place, number, order, mark.bucket, about, mark.content)
                for order, mark in enumerate(marks)
            ]
    rows += [(NOBODY, SEEN, number, 0, b"", path, b"") for (_, _, path), number in files.items()]
    return _table(rows, TOLD)


def _pairs(get: Callable[[Any], Any], held: Any, batch: pa.Table) -> pa.Table:
    stages, _ = get(held)
    ordered = batch.sort_by([("stage", "ascending"), ("bucket", "ascending"), ("number", "ascending")])
    told = zip(*(ordered[name].to_pylist() for name in ("stage", "bucket", "about", "content")), strict=True)
    rows: list[tuple[Any, ...]] = []
    for (place, _), members in itertools.groupby(told, key=lambda row: row[:2]):
        known = [(about, content) for _, _, about, content in members]
        if len(known) > 1:
            pairs = stages[place].pairs((_address(about), content) for about, content in known)
            rows += [(place, json.dumps(pair.first), json.dumps(pair.second), pair.score) for pair in pairs]
    return _table(rows, PAIRS)


def _alone(batch: pa.Table) -> pa.Table:
    return batch.filter(pc.equal(batch["shard"], NOBODY))


def _marks(batch: pa.Table) -> pa.Table:
    return batch.filter(pc.not_equal(batch["shard"], NOBODY))


# ---------------------------------------------------------------------------------------------- as tables


def _shard(mark: Mark, shards: int) -> int:
    return int.from_bytes(mark.bucket[:8], "little") % shards


def _table(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    columns: Iterator[tuple[Any, ...]] = zip(*rows, strict=True) if rows else iter([()] * len(schema))
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema
    )


def _noted(row: dict[str, Any]) -> Noted:
    return Noted(row["number"], row["stage"], row["order"], Finding(**json.loads(row["about"])))


def _address(text: str) -> Address:
    return Address(*json.loads(text))


def installed() -> Any:
    """The module ray. Raises ValueError with what to install where it is absent."""
    try:
        importlib.import_module("ray.data")
        return importlib.import_module("ray")
    except ImportError as error:
        raise ValueError(f"audit: {error}; a cluster needs Ray Data: pip install 'itjax[audit-ray]'") from None
