"""The stages of an audit: what is asked of every example alone, and what needs examples beside each other.

A stage never sees a whole corpus. So the same stages run in one process or on an engine that has a map and a group-by:

    row stage      example -> findings
    group stage    example -> (bucket, mark); members of a bucket -> pairs; all pairs -> findings
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from itjax.base.records import Conversation, Finding


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


class RowStage(Protocol):
    """Looks at one example at a time."""

    name: str

    def look(self, example: Example) -> list[Finding]: ...


class GroupStage(Protocol):
    """Looks at examples that share a bucket."""

    name: str

    def marks(self, example: Example) -> list[tuple[bytes, Any]]:
        """The buckets of an example, each with what the stage must know of it there."""

    def pairs(self, members: Sequence[tuple[Address, Any]]) -> list[Pair]:
        """The members of one bucket that belong together; two may meet in several buckets."""

    def findings(self, pairs: Iterable[Pair]) -> Iterator[Finding]:
        """All pairs of the corpus, in any order and some of them repeatedly, to findings in the order of the examples."""


Stage = RowStage | GroupStage
