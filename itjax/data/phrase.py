"""Rows and a family become conversations: which phrasing, which worked examples, in which order, in every epoch anew.

    row 7, epoch 0   Is it true that ...?      Yes         Number e * R + i of R rows is row i in edition (epoch) e.
    row 7, epoch 1   (A) true  (B) false ...   (A)         A row meets every phrasing once before it meets one again.

All that is drawn follows from the seed, the row's key and the epoch: the same after a resume, in every process and on
every machine.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from itjax.base.records import Conversation, Message
from itjax.base.schema import Source
from itjax.data import library, templates
from itjax.data.sources import BadRow, Rows
from itjax.data.strict_json import RowError
from itjax.data.templates import EXEMPLARS, Family, FewShot, Lots, Rendered, Row, Template

VERSION = 1  # of how conversations are made and drawn; a new number makes all caches anew
ATTEMPTS = 4  # rows of the pool that are looked at for each worked example wanted
SPLITS = ("train", "eval")
_T = TypeVar("_T")


class Phrased:
    """Rows in the words of a family. A source of conversations, `editions` times as long as its rows.

    `pool` is where worked examples come from: rows that are never evaluated on, without the row itself. `few_shot` is
    how many at most: a row gets 0 to `few_shot`, drawn evenly, as many of them as the family's budget and `room` leave,
    which is what a conversation may measure as a whole. `inverted` is the share of rows whose answer is given and whose
    question is asked for. For training ("train") a held-out phrasing is refused.
    """

    def __init__(
        self,
        rows: Rows,
        family: Family,
        *,
        split: str,
        phrasings: str,
        seed: int,
        columns: Mapping[str, str] | None = None,
        few_shot: int = 0,
        inverted: float = 0.0,
        pool: Rows | None = None,
        editions: int = 1,
        room: int | None = None,
        measure: Callable[[str], int] = len,
    ) -> None:
        assert split in SPLITS, split
        self.name, self.editions, self.rows, self.family = rows.name, editions, rows, family
        self._columns, self._seed, self._split, self._phrasings = dict(columns or {}), seed, split, phrasings
        self._few_shot, self._inverted, self._pool = few_shot, inverted, pool
        self._room, self._measure = room, measure
        self._is_keyed = True
        place = f"source {rows.name!r}"
        _check_columns(self._columns, family, place)
        usable = _usable(templates.selected(family, phrasings), split, few_shot, family, place)
        self._direct, self._turned = _groups(usable, phrasings, inverted, family, place)
        if few_shot and (pool is None or not len(pool)):
            raise ValueError(f"{place}: few_shot is {few_shot}, and no row can be a worked example; use few_shot=0")

    def __len__(self) -> int:
        return len(self.rows) * self.editions

    def conversation(self, index: int) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: row {index} of {len(self)}")
        return self._conversation(index, self.rows.row(index % len(self.rows)))

    def conversations(self, indices: Sequence[int] | np.ndarray) -> list[Conversation]:
        """Many at a time: in one read of the rows where they have a way to."""
        read = getattr(self.rows, "rows", None)
        if read is None:
            return [self.conversation(int(index)) for index in indices]
        raw = read([int(index) % len(self.rows) for index in indices])
        return [self._conversation(int(index), row) for index, row in zip(indices, raw, strict=True)]

    def over(self, rows: Rows, *, editions: int, pool: Rows | None = None) -> "Phrased":
        """The same phrasings of other rows: those that are left when bad ones are taken out, or of an evaluation.

        Worked examples come from the same pool as before, or from `pool`.
        """
        other = copy(self)
        other.rows, other.name, other.editions = rows, rows.name, editions
        other._pool = self._pool if pool is None else pool
        return other

    def notes(self) -> list[str]:
        """What the rows have to say, and which templates of an imported family are not used."""
        of_rows: list[str] = getattr(self.rows, "notes", list)()
        refused = self.family.refused.items()
        return of_rows + [f"{self.family.name}: template {name!r} is left out: {reason}" for name, reason in refused]

    @property
    def first_edition(self) -> "Phrased":
        """Each row once."""
        return self.over(self.rows, editions=1)

    @property
    def alone(self) -> "Phrased":
        """Each row once, without worked examples and in words that its key has no part in: equal rows say the same."""
        other = self.first_edition
        other._few_shot, other._inverted, other._is_keyed = 0, 0.0 if self._direct else 1.0, False
        return other

    def _conversation(self, index: int, raw: Mapping[str, Any]) -> Conversation:
        """Raises BadRow for a row that cannot be put into words, whatever the phrasing."""
        edition, number = divmod(index, len(self.rows))
        key = self.rows.key(number)
        try:
            return self._said(raw, key, edition)
        except ValueError as error:
            reason = getattr(error, "reason", "it cannot be put into words")
            raise BadRow(key, reason, str(error).removeprefix(f"{key}: ")) from None

    def _said(self, raw: Mapping[str, Any], key: str, edition: int) -> Conversation:
        row = templates.read(self.family, raw, columns=self._columns, place=key)
        drawn_by = key if self._is_keyed else ""
        lots = Lots(self._seed, drawn_by, edition)
        for template in self._candidates(row, drawn_by, edition):
            asked = templates.render(self.family, template, row, lots=lots, source=self.name, place=key)
            found = self._exemplars(template, asked, lots)
            if EXEMPLARS not in self.family.said[template.name]:
                return _before(asked.conversation, found, self._style(lots), self.family.few_shot)
            if found:
                written = self.family.few_shot.delimiter.join(one.text for one in found)
                made = templates.render(
                    self.family, template, row, lots=lots, source=self.name, place=key, exemplars=written
                )
                return _tagged(made.conversation, found)
        raise RowError(
            f"no phrasing of family {self.family.name!r} fits it: it lacks what they say", "no phrasing fits"
        )

    def fingerprint(self) -> str:
        """Changes with whatever changes the conversations."""
        settings = (
            self._seed,
            self._columns,
            self._few_shot,
            self._inverted,
            self.editions,
            self._room,
            self._is_keyed,
        )
        chosen = (self._split, self._phrasings, getattr(self._measure, "__qualname__", type(self._measure).__name__))
        pool = self._pool.fingerprint() if self._pool is not None and self._few_shot else ""
        parts = (VERSION, self.name, self.rows.fingerprint(), fingerprint(self.family), pool, settings, chosen)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _candidates(self, row: Row, key: str, edition: int) -> Iterator[Template]:
        """The phrasing of this edition; behind it, those that stand in where it wants worked examples and none fit."""
        group, turn = self._group(key, edition)
        fitting = [one for one in group if self.family.fits(one, row)]
        if fitting:
            around, place = divmod(turn, len(fitting))
            order = Lots(self._seed, key, around).order(len(fitting), "phrasing")
            yield fitting[order[place]]
            yield from (one for one in fitting if EXEMPLARS not in self.family.said[one.name])

    def _group(self, key: str, edition: int) -> tuple[Sequence[Template], int]:
        """Direct or inverted phrasings, and how often the row has met that group before.

        Over E epochs a row meets inverted phrasings floor or ceil(E * inverted) times.
        """
        start = Lots(self._seed, key, 0).share("inverted")
        before = math.floor(start + edition * self._inverted)
        if math.floor(start + (edition + 1) * self._inverted) > before:
            return self._turned, before
        return self._direct, edition - before

    def _style(self, lots: Lots) -> str:
        style = self.family.few_shot.style
        return lots.pick(("turns", "text"), "style") if style == "both" else style

    def _exemplars(self, template: Template, asked: Rendered, lots: Lots) -> list["Exemplar"]:
        """Rows of the pool in the same words, as many as were drawn and fit the budget."""
        least = 1 if EXEMPLARS in self.family.said[template.name] else 0
        wanted = least + int(lots.share("few shot") * (self._few_shot - least + 1)) if self._few_shot else 0
        if not wanted or self._pool is None or not _is_plain(asked):
            return []
        found: list[Exemplar] = []
        left = self._left_beside(asked)
        seen = {lots.key}
        for attempt in range(ATTEMPTS * wanted):
            exemplar = self._exemplar(lots.number(f"exemplar {attempt}") % len(self._pool), template, asked, lots, seen)
            if exemplar is None:
                continue
            left -= self._measure(exemplar.prompt) + self._measure(exemplar.answer)
            if left < 0:
                break
            found.append(exemplar)
            if len(found) == wanted:
                break
        return found

    def _left_beside(self, asked: Rendered) -> int:
        """How much worked examples may measure together."""
        if self._room is None:
            return self.family.few_shot.budget
        taken = sum(self._measure(message.content) for message in asked.conversation.messages)
        return min(self.family.few_shot.budget, self._room - taken)

    def _exemplar(
        self, number: int, template: Template, asked: Rendered, lots: Lots, seen: set[str]
    ) -> "Exemplar | None":
        """One row of the pool, unless it is there already, asks the same, or is not to be had in these words."""
        assert self._pool is not None
        key = self._pool.key(number)
        if key in seen:
            return None
        seen.add(key)
        try:
            row = templates.read(self.family, self._pool.row(number), columns=self._columns, place=key)
            if not self.family.fits(template, row):
                return None
            beside = _Beside(lots.seed, key, lots.round, lots)
            made = templates.render(self.family, template, row, lots=beside, source=self.name, place=key)
        except ValueError:  # a row that cannot be read is told where it is itself asked
            return None
        if made.prompt == asked.prompt and made.system == asked.system:
            return None
        return Exemplar(key, made.prompt, made.answer, made.exemplar) if _is_plain(made) else None


class Exemplar(NamedTuple):
    """A worked example."""

    key: str
    prompt: str
    answer: str
    text: str  # as the phrasing writes it where it says {exemplars}


@dataclass(frozen=True)
class _Beside(Lots):
    """Lots of a worked example: system prompt and marker are the question's, the order of options its own."""

    asked: Lots

    def pick(self, things: Sequence[_T], what: str) -> _T:
        return self.asked.pick(things, what)


def _check_columns(columns: Mapping[str, str], family: Family, place: str) -> None:
    for name in columns:
        if name not in family.fields and not family.expressions:
            raise ValueError(
                f"{place}: columns: {name!r} is no field of family {family.name!r}; "
                f"{templates.nearest(name, family.fields)}"
            )


def _groups(
    usable: Sequence[Template], phrasings: str, inverted: float, family: Family, place: str
) -> tuple[list[Template], list[Template]]:
    """Direct and inverted phrasings. One that was asked for by name is used as it is."""
    if phrasings not in ("seen", "heldout", "all"):
        return list(usable), list(usable)
    direct, turned = ([one for one in usable if one.inverted == is_turned] for is_turned in (False, True))
    if inverted > 0 and not turned:
        raise ValueError(f"{place}: inverted is {inverted}, and family {family.name!r} has no such phrasings; use 0")
    if inverted < 1 and not direct:
        raise ValueError(f"{place}: all {phrasings} phrasings of family {family.name!r} are inverted; use inverted=1")
    return direct, turned


def _usable(chosen: Sequence[Template], split: str, few_shot: int, family: Family, place: str) -> tuple[Template, ...]:
    """Those that may be used: held-out ones never in training, those that say {exemplars} only where there are some."""
    held = [one.name for one in chosen if one.heldout]
    if held and split == "train":
        raise ValueError(
            f"{place}: phrasing {held[0]!r} of family {family.name!r} is held out for evaluation; train on 'seen' ones"
        )
    usable = tuple(one for one in chosen if few_shot or EXEMPLARS not in family.said[one.name])
    if not usable:
        raise ValueError(f"{place}: all phrasings chosen say {{exemplars}}; set few_shot to at least 1")
    return usable


def family_of(source: Source, *, place: str) -> Family:
    """The family that a source of the config names: its own files, or a kind of the library."""
    if source.kind and source.templates:
        raise ValueError(f"{place}: it names kind {source.kind!r} and templates {source.templates!r}; keep one")
    if source.kind and source.kind not in library.kinds():
        raise ValueError(f"{place}.kind: {source.kind!r} is unknown; {library.nearest(source.kind, library.kinds())}")
    return library.family(source.kind) if source.kind else library.read(Path(source.templates).expanduser())


def fingerprint(family: Family) -> str:
    """Changes with anything that shapes what the family says."""
    few_shot = vars(family.few_shot)
    fields = {name: vars(one) for name, one in family.fields.items()}
    shape = [
        family.name,
        [_said(one) for one in family.templates],
        fields,
        family.markers,
        few_shot,
        family.expressions,
    ]
    return hashlib.sha256(json.dumps(shape, sort_keys=True, default=repr).encode()).hexdigest()


def _said(template: Template) -> dict[str, Any]:
    return {name: value for name, value in vars(template).items() if not name.startswith("_")}


def exemplars(conversation: Conversation) -> list[str]:
    """The keys of the rows that stand in a conversation as worked examples."""
    return json.loads(conversation.tags.get(EXEMPLARS, "[]"))


def _before(made: Conversation, found: Sequence[Exemplar], style: str, few_shot: FewShot) -> Conversation:
    """The conversation with worked examples before its question; they are never learned."""
    if not found:
        return made
    *first, question, answer = made.messages
    if style == "text":
        lead = [few_shot.lead] if few_shot.lead else []
        worked = [f"{one.prompt}{few_shot.delimiter}{one.answer}" for one in found]
        question = Message("user", few_shot.separator.join([*lead, *worked, question.content]))
    else:
        for one in found:
            first += [Message("user", one.prompt), Message("assistant", one.answer, learn=False)]
    return _tagged(replace(made, messages=(*first, question, answer)), found)


def _tagged(made: Conversation, found: Sequence[Exemplar]) -> Conversation:
    return replace(made, tags={**made.tags, EXEMPLARS: json.dumps([one.key for one in found])})


def _is_plain(made: Rendered) -> bool:
    """One question and one answer in words, so that another can stand before it."""
    messages, said = made.conversation.messages, made.conversation.tools
    return not said and len(messages) == 2 + (messages[0].role == "system") and not messages[-1].tool_calls
