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
from typing import Any, Protocol

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
UNREADABLE = -1  # in place of a stage: the row has no conversation to look at

TOLD = pa.schema(  # what is known of an example: a finding, or its mark in one bucket
    [
        ("shard", pa.int64()),
        ("stage", pa.int64()),
        ("number", pa.int64()),
        ("order", pa.int64()),
        ("bucket", pa.binary()),
        ("about", pa.string()),  # the finding, or the address, or why the row cannot be read
        ("content", pa.binary()),
    ]
)
PAIRS = pa.schema([("stage", pa.int64()), ("first", pa.string()), ("second", pa.string()), ("score", pa.float64())])


class Examples(Protocol):
    """Examples by number. Workers read what they look at, so that it travels to them without its rows."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Example: ...


def run(
    stages: Sequence[Stage], examples: Examples, *, shards: int = 0, unreadable: Counter[str] | None = None
) -> list[Finding]:
    """All findings, in the order of the examples and then of the stages. `shards` 0: a few for every core.

    Rows that cannot be read are counted in `unreadable` by their reasons; without it such a row is an error.
    """
    ray = _ray()
    started = not ray.is_initialized()
    if started:
        ray.init(configure_logging=False, log_to_driver=False)
    try:
        shards = shards or SHARDS_PER_CORE * max(1, int(ray.cluster_resources()["CPU"]))
        return _run(ray, stages, examples, shards, unreadable)
    finally:
        if started:
            ray.shutdown()


def _run(
    ray: Any, stages: Sequence[Stage], examples: Examples, shards: int, unreadable: Counter[str] | None
) -> list[Finding]:
    if not len(examples):
        return []
    held = ray.put((tuple(stages), examples))
    get = ray.get
    numbers = ray.data.range(len(examples), override_num_blocks=max(1, min(shards, len(examples) // ROWS)))
    told = numbers.map_batches(
        partial(_look, get, held, shards), batch_size=ROWS, batch_format="pyarrow", zero_copy_batch=True
    ).materialize()  # rows are read once
    noted = []
    for row in told.map_batches(_alone, batch_format="pyarrow").iter_rows():
        if row["stage"] != UNREADABLE:
            noted.append(_noted(row))
        elif unreadable is None:
            raise ValueError(f"audit: {row['content'].decode()}; mend the row, or count such rows in `unreadable`")
        else:
            unreadable[row["about"]] += 1
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
    return in_order(noted)


# ---------------------------------------------------------------------------------------------- on the workers


def _look(get: Callable[[Any], Any], held: Any, shards: int, batch: pa.Table) -> pa.Table:
    stages, examples = get(held)
    rows: list[tuple[Any, ...]] = []
    for number in batch["id"].to_pylist():
        try:
            example = examples[number]
        except BadRow as error:
            rows.append((NOBODY, UNREADABLE, number, 0, b"", error.reason, str(error).encode()))
            continue
        noted, marked = look(stages, example)
        for note in noted:
            about = json.dumps(dataclasses.asdict(note.finding))
            rows.append((NOBODY, note.stage, number, note.order, b"", about, b""))
        address = json.dumps(address_of(example))
        for place, marks in marked:
            rows += [
                (_shard(mark, shards), place, number, order, mark.bucket, address, mark.content)
                for order, mark in enumerate(marks)
            ]
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


def _ray() -> Any:
    try:
        importlib.import_module("ray.data")
        return importlib.import_module("ray")
    except ImportError as error:
        raise ValueError(f"audit: {error}; a cluster needs Ray Data: pip install 'itjax[audit-ray]'") from None
