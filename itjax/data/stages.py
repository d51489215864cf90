"""The stages of an audit: what is asked of every example alone, and what needs examples beside each other.

A stage never sees a whole corpus. So the same stages run in one process or on an engine that has a map and a group-by:

    row stage      example -> findings
    group stage    example -> (bucket, mark); members of a bucket -> pairs; all pairs -> findings

`run` is the single process; it streams, and what group stages must remember waits on disk. `engine.run` is the cluster.
"""

import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np

from itjax.base.records import Conversation, Finding
from itjax.data.processes import spread

MEMORY = 256 << 20  # bytes of buckets in memory at one time
CHUNK = 256  # examples that travel to a process together
BUCKET = 16  # bytes
ENTRY = np.dtype([("bucket_high", ">u8"), ("bucket_low", ">u8"), ("place", "<u8")])  # of a member in a bucket


@dataclass(frozen=True)
class Example:
    """A conversation with its place in the audit's order: sources in order, their rows in order."""

    number: int
    split: str  # "train", or "eval" where it may not be trained on
    conversation: Conversation


class Address(NamedTuple):
    """What remains of an example when its text is gone."""

    number: int
    key: str
    source: str
    split: str


class Pair(NamedTuple):
    """Two examples that are the same, or nearly: the first has the lower number."""

    first: Address
    second: Address
    score: float


class Mark(NamedTuple):
    """What a group stage must know of an example in one bucket."""

    bucket: bytes  # 16 bytes of a digest, so that buckets spread evenly
    content: bytes  # as small as can be: it waits on disk, or travels between machines


class RowStage(Protocol):
    """Looks at one example at a time."""

    @property
    def name(self) -> str: ...

    def look(self, example: Example) -> list[Finding]: ...


class GroupStage(Protocol):
    """Looks at examples that share a bucket."""

    @property
    def name(self) -> str: ...

    def marks(self, example: Example) -> list[Mark]:
        """The buckets of an example, each with what the stage must know of it there."""

    def pairs(self, members: Iterable[tuple[Address, bytes]]) -> Iterator[Pair]:
        """Members of one bucket that belong together. They come in the order of examples; two may meet in several buckets."""

    def findings(self, pairs: Iterable[Pair]) -> Iterator[tuple[int, Finding]]:
        """All pairs of the corpus, in any order and some of them repeatedly, to findings with the number of the example."""


Stage = RowStage | GroupStage


class Noted(NamedTuple):
    """A finding and where it belongs: by example, then by stage, then as the stage said it."""

    number: int
    stage: int
    order: int
    finding: Finding


class Marked(NamedTuple):
    """What one group stage knows of one example."""

    stage: int
    marks: list[Mark]


def run(
    stages: Sequence[Stage], examples: Iterable[Example], *, workers: int = 1, memory: int = MEMORY
) -> list[Finding]:
    """All findings, in the order of the examples and then of the stages; the same for any number of workers."""
    return [note.finding for note in notes(stages, examples, workers=workers, memory=memory)]


def notes(
    stages: Sequence[Stage], examples: Iterable[Example], *, workers: int = 1, memory: int = MEMORY
) -> list[Noted]:
    """The same, each with the number of its example."""
    noted: list[Noted] = []
    with ExitStack() as opened:
        groups = {place: stage for place, stage in enumerate(stages) if looks_at_groups(stage)}
        buckets = {place: opened.enter_context(Buckets(memory)) for place in groups}
        for address, notes, known in _looked(stages, examples, workers):
            noted.extend(notes)
            for place, marks in known:
                buckets[place].add(address, marks)
        for place, stage in groups.items():
            pairs = itertools.chain.from_iterable(map(stage.pairs, buckets[place].groups()))
            noted.extend(grouped(stage, place, pairs))
    return in_order(noted)


def looks_at_groups(stage: Stage) -> TypeGuard[GroupStage]:
    return not hasattr(stage, "look")


def look(stages: Sequence[Stage], example: Example) -> tuple[list[Noted], list[Marked]]:
    """What all stages say of one example alone."""
    noted, marked = [], []
    for place, stage in enumerate(stages):
        if hasattr(stage, "look"):
            found = stage.look(example)
            noted += [Noted(example.number, place, order, finding) for order, finding in enumerate(found)]
        elif marks := stage.marks(example):
            marked.append(Marked(place, marks))
    return noted, marked


def grouped(stage: GroupStage, place: int, pairs: Iterable[Pair]) -> Iterator[Noted]:
    """What a group stage says once all pairs are known."""
    for order, (number, finding) in enumerate(stage.findings(pairs)):
        yield Noted(number, place, order, finding)


def in_order(noted: list[Noted]) -> list[Noted]:
    return sorted(noted, key=lambda note: note[:3])


def address_of(example: Example) -> Address:
    return Address(example.number, example.conversation.key, example.conversation.source, example.split)


# ---------------------------------------------------------------------------------------------- processes

Looked = tuple[Address, list[Noted], list[Marked]]


def _looked(stages: Sequence[Stage], examples: Iterable[Example], workers: int) -> Iterator[Looked]:
    if workers > 1:
        chunks = spread(_look_at, _in_chunks(examples), shared=tuple(stages), workers=workers)
        yield from itertools.chain.from_iterable(chunks)
    else:
        for example in examples:
            yield address_of(example), *look(stages, example)


def _in_chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    remaining = iter(examples)
    while chunk := list(itertools.islice(remaining, CHUNK)):
        yield chunk


def _look_at(stages: Sequence[Stage], chunk: list[Example]) -> list[Looked]:
    return [(address_of(example), *look(stages, example)) for example in chunk]


# ---------------------------------------------------------------------------------------------- buckets


class Buckets:
    """Who is in which bucket, on disk: 24 bytes for each, and every mark's content once.

    Groups are made in as many passes over the buckets as keep one pass within `memory`; examples that share their bucket
    with nobody are never read again.
    """

    def __init__(self, memory: int = MEMORY) -> None:
        self._memory = memory
        self._entries = tempfile.TemporaryFile(prefix="itjax-audit-")  # noqa: SIM115, closed on exit
        self._members = tempfile.TemporaryFile(prefix="itjax-audit-")  # noqa: SIM115
        self._end = 0  # of the members' file

    def __enter__(self) -> "Buckets":
        return self

    def __exit__(self, *_: Any) -> None:
        self._entries.close()
        self._members.close()

    @property
    def num_bytes(self) -> int:
        """How much is on disk."""
        return self._entries.tell() + self._end

    def add(self, address: Address, marks: Iterable[Mark]) -> None:
        places: dict[bytes, bytes] = {}
        for bucket, content in marks:
            if len(bucket) != BUCKET:
                raise ValueError(f"audit: a stage's bucket has {len(bucket)} bytes; give {BUCKET} of a digest")
            if content not in places:
                places[content] = self._write(address, content).to_bytes(8, "little")
            self._entries.write(bucket + places[content])

    def groups(self) -> Iterator[Iterator[tuple[Address, bytes]]]:
        """The members of every bucket that has more than one, in the order they were added."""
        for entries in self._passes():
            order = np.lexsort((entries["place"], entries["bucket_low"], entries["bucket_high"]))
            entries = entries[order]
            same = (entries["bucket_high"][1:] == entries["bucket_high"][:-1]) & (
                entries["bucket_low"][1:] == entries["bucket_low"][:-1]
            )
            edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)))
            for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
                yield map(self._read, entries["place"][start : stop + 1].tolist())

    def _passes(self) -> Iterator[np.ndarray]:
        """All entries of some buckets, then all of some others."""
        self._entries.flush()
        size = self._entries.tell()
        if not size:
            return
        entries = np.memmap(self._entries, dtype=ENTRY, mode="r")
        num_passes = -(-size // self._memory)
        step = max(1, self._memory // ENTRY.itemsize)
        for turn in range(num_passes):
            blocks = (entries[start : start + step] for start in range(0, len(entries), step))
            yield np.concatenate([block[block["bucket_low"] % num_passes == turn] for block in blocks])

    def _write(self, address: Address, content: bytes) -> int:
        place, about = self._end, json.dumps(address).encode()
        record = len(about).to_bytes(4, "little") + len(content).to_bytes(4, "little") + about + content
        self._members.write(record)
        self._end += len(record)
        return place

    def _read(self, place: int) -> tuple[Address, bytes]:
        self._members.seek(place)
        sizes = self._members.read(8)
        about = self._members.read(int.from_bytes(sizes[:4], "little"))
        return Address(*json.loads(about)), self._members.read(int.from_bytes(sizes[4:], "little"))
