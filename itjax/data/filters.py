"""Stages of the audit by name, and what becomes of what they find: rows kept, masked, tagged or dropped, each counted.

rows        0   1       2      3        4
findings        email          repeat   refusal
kept        0   1       2               4          `Reviewed.kept`
read        0   <EMAIL> 2               4          `Filtered`: masked whenever a row is read, nothing is stored
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from itjax.base.freeze import nearest
from itjax.base.records import Conversation, Finding
from itjax.base.schema import Filters
from itjax.data import duplicates, engine, leakage, privacy, quality, sources, stages, toxicity
from itjax.data.duplicates import NearDuplicates
from itjax.data.leakage import Contamination, Leakage
from itjax.data.privacy import Finder, Personal
from itjax.data.quality import Quality
from itjax.data.sources import BadRow, RowSource
from itjax.data.stages import Example, Noted, Stage
from itjax.data.toxicity import Classifier, Toxic

VERSION = 1  # of how findings become rows; a new number makes all filtered data anew
CHUNK = 256  # rows that are read together
SAMPLE = 200  # rows of a source that show what most of its rows say
SMALL = 4096  # rows for which no process is started
ENGINES = ("process", "ray")  # where rows are looked at
Progress = Callable[[int, int], None]  # rows done, rows in all


@dataclass(frozen=True)
class Own:
    """What cannot be written in a config: functions of one's own, and rows that must not leak."""

    finder: Finder | None = None
    classifier: Classifier | None = None
    items: Iterable[tuple[str, str]] = ()  # evaluation items beside `leakage_files`: (key, text)


def _leakage(options: Filters, own: Own) -> Leakage:
    if not options.leakage_files and not own.items:
        raise ValueError(
            "config.audit.leakage_files: the leakage stage has nothing to compare with; "
            "name the evaluations, e.g. --config.audit.leakage_files='evals/*.jsonl'"
        )
    listed = leakage.evaluation_texts(options.leakage_files) if options.leakage_files else ()
    return Leakage([*own.items, *listed], coverage=options.coverage)


STAGES: dict[str, Callable[[Filters, Own], Stage]] = {
    "exact_duplicates": lambda options, own: duplicates.stages_of(options)[0],
    "near_duplicates": lambda options, own: duplicates.stages_of(options)[1],
    "leakage": _leakage,
    "personal": lambda options, own: Personal(options, own.finder),
    "toxic": lambda options, own: Toxic(options, own.classifier),
    "quality": lambda options, own: Quality(options),
}


def build(names: Sequence[str], options: Filters, own: Own | None = None) -> list[Stage]:
    """The stages in the order of their names."""
    for name in names:
        if name not in STAGES:
            raise ValueError(
                f"config.filters: {name!r} is no stage.{nearest(name, list(STAGES))} Known: {', '.join(STAGES)}"
            )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"config.filters: {twice[0]!r} stands twice; name each stage once")
    return [STAGES[name](options, own or Own()) for name in names]


def possible(options: Filters, own: Own | None = None) -> tuple[str, ...]:
    """All stages that have what they need: word lists or a classifier, evaluations."""
    own = own or Own()
    lacks = {
        "leakage": not options.leakage_files and not own.items,
        "toxic": not options.word_lists and not options.toxic_classifier and own.classifier is None,
    }
    return tuple(name for name in STAGES if not lacks.get(name))


# --- every row, once --------------------------------------------------------------------------------------------------


class Examples:
    """The rows of all sources as examples, by number: those to train on first, then those held out.

    Rows that cannot be read are left out of an iteration and counted; what becomes of them is said when they are encoded.
    """

    def __init__(self, train: Sequence[RowSource], held: Sequence[RowSource], progress: Progress | None = None) -> None:
        self._parts = [*((source, "train") for source in train), *((source, "eval") for source in held)]
        self._starts = np.cumsum([0, *(len(source) for source, _ in self._parts)])
        self._progress = progress
        self.unreadable = [Counter[str]() for _ in self._parts]
        self.files: list[set[str]] = [set() for _ in self._parts]  # `path` of `path:line`

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> Example:
        part = self.part(number)
        source, split = self._parts[part]
        return _example(number, split, source, source.conversation(number - int(self._starts[part])))

    def to_send(self) -> "Examples":
        """The same for another machine, where nobody watches."""
        train, held = ([source for source, its in self._parts if its == split] for split in ("train", "eval"))
        return Examples(train, held)

    def part(self, number: int) -> int:
        """Which source an example is of."""
        return int(np.searchsorted(self._starts, number, side="right")) - 1

    def row(self, number: int) -> int:
        """The number of an example's row in its source."""
        return number - int(self._starts[self.part(number)])

    def __iter__(self) -> Iterator[Example]:
        for part, (source, split) in enumerate(self._parts):
            start, files, unreadable = int(self._starts[part]), self.files[part], self.unreadable[part]
            unreadable.clear()
            for first in range(0, len(source), CHUNK):
                rows = range(first, min(first + CHUNK, len(source)))
                for row, conversation in _readable(source, rows, unreadable):
                    files.add(conversation.key.rpartition(":")[0])
                    yield _example(start + row, split, source, conversation)
                if self._progress is not None:
                    self._progress(start + rows[-1] + 1, len(self))


def _example(number: int, split: str, source: RowSource, conversation: Conversation) -> Example:
    """A source that was renamed speaks under its new name."""
    if conversation.source != source.name:
        conversation = dataclasses.replace(conversation, source=source.name)
    return Example(number, split, conversation)


def _readable(source: RowSource, rows: range, unreadable: Counter[str]) -> Iterator[tuple[int, Conversation]]:
    """Rows with their numbers, read together; one by one where one of them cannot be read."""
    try:
        yield from zip(rows, sources.conversations(source, rows), strict=True)
        return
    except BadRow:
        pass
    for row in rows:
        try:
            conversation = source.conversation(row)
        except BadRow as error:
            unreadable[error.reason] += 1
        else:
            yield row, conversation


# --- what becomes of them ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reviewed:
    """What was found in one source. Every row that is not kept is counted once, under the first reason to drop it."""

    name: str
    split: str
    rows: int
    kept: np.ndarray  # numbers of rows, int64
    dropped: Mapping[str, int]  # "stage: reason" -> rows
    masked: Mapping[str, int]
    tagged: Mapping[str, int]
    unreadable: Mapping[str, int]  # reason -> rows; kept, for whoever encodes them to refuse
    files: tuple[str, ...]  # that the rows are in
    fingerprint: str  # of the source


@dataclass(frozen=True)
class Review:
    """What the stages say of all sources, and the sources without what was dropped or masked."""

    names: tuple[str, ...]
    options: Filters
    reviewed: tuple[Reviewed, ...]  # sources to train on, then held-out ones, in the order given
    findings: tuple[Finding, ...]  # in the order of the examples
    numbers: tuple[int, ...]  # of the example that each finding is of: see `Examples`
    train: tuple[RowSource, ...]  # what is left to train on, in the order given
    contamination: tuple[Contamination, ...]

    def counts(self) -> dict[str, dict[str, Any]]:
        """For a manifest: of each source to train on, rows and what became of them."""
        return {one.name: _counts(one) for one in self.reviewed if one.split == "train"}

    def notes(self) -> list[str]:
        """What was dropped or masked, a line for each reason; nothing where nothing was."""
        lines = []
        for words in ("dropped", "masked"):
            total = sum((Counter(getattr(one, words)) for one in self.reviewed if one.split == "train"), Counter())
            rows = sum(one.rows for one in self.reviewed if one.split == "train")
            lines += [f"{count:,} of {rows:,} examples {words}: {reason}" for reason, count in total.most_common()]
        return lines


def _counts(one: Reviewed) -> dict[str, Any]:
    return {
        "rows": one.rows,
        "kept": len(one.kept),
        "dropped": dict(one.dropped),
        "masked": dict(one.masked),
        "tagged": dict(one.tagged),
        "unreadable": dict(one.unreadable),
        "fingerprint": one.fingerprint,
    }


def review(
    train: Sequence[RowSource],
    held: Sequence[RowSource],
    names: Sequence[str],
    options: Filters,
    *,
    own: Own | None = None,
    progress: Progress | None = None,
    workers: int = 1,
    on: str = "process",
) -> Review:
    """Every row looked at by the stages named in one pass, on this machine (memory for the findings) or `on` "ray".

    Held-out rows are looked at so that nothing to train on repeats them; they are never dropped.
    """
    built = [_informed(stage, train) for stage in build(names, options, own)]
    examples = Examples(train, held, progress)
    noted: list[Noted] = []
    if built:
        noted = _notes_of_cluster(built, examples) if on == "ray" else _notes(built, examples, workers)
    findings, numbers = tuple(note.finding for note in noted), tuple(note.number for note in noted)
    parts: list[dict[int, list[Finding]]] = [{} for _ in (*train, *held)]
    for number, finding in zip(numbers, findings, strict=True):
        parts[examples.part(number)].setdefault(examples.row(number), []).append(finding)
    splits = ["train"] * len(train) + ["eval"] * len(held)
    reviewed = tuple(
        _reviewed(*of_source)
        for of_source in zip((*train, *held), splits, parts, examples.unreadable, examples.files, strict=True)
    )
    shape = fingerprint(names, options)
    return Review(
        tuple(names),
        options,
        reviewed,
        findings,
        numbers,
        tuple(
            filtered(source, one.kept, names, options, own, shape=shape)
            for source, one in zip(train, reviewed, strict=False)
        ),
        _contamination(built, findings, reviewed),
    )


def _notes(built: Sequence[Stage], examples: Examples, workers: int) -> list[Noted]:
    """What the stages say of the rows, looked at on this machine."""
    return stages.notes(built, examples, workers=workers if len(examples) > SMALL else 1)


def _notes_of_cluster(built: Sequence[Stage], examples: Examples) -> list[Noted]:
    """The same, looked at by Ray's workers, with the same said in `examples` of rows and files."""
    told = engine.look_at_all(built, examples.to_send())
    for row in told.unreadable:
        examples.unreadable[examples.part(row.number)][row.reason] += 1
    for number, path in told.files:
        examples.files[examples.part(number)].add(path)
    return told.noted


def _informed(stage: Stage, train: Sequence[RowSource]) -> Stage:
    """A stage that compares rows first hears what most rows of a source say."""
    return stage.knowing(_sample(source) for source in train) if isinstance(stage, NearDuplicates) else stage


def _sample(source: RowSource) -> list[Conversation]:
    rows = range(0, len(source), max(1, len(source) // SAMPLE))
    return [conversation for _, conversation in _readable(source, rows, Counter())]


def _reviewed(
    source: RowSource, split: str, found: Mapping[int, list[Finding]], unreadable: Counter[str], files: set[str]
) -> Reviewed:
    keeps = np.ones(len(source), dtype=bool)
    counts: dict[str, Counter[str]] = {action: Counter() for action in ("drop", "mask", "tag")}
    for row, findings in found.items():
        drops = [finding for finding in findings if finding.action == "drop"] if split == "train" else []
        for finding in drops[:1]:
            keeps[row] = False
            counts["drop"][_reason(finding)] += 1
        for action, reason in sorted({(finding.action, _reason(finding)) for finding in findings}) if not drops else ():
            counts["tag" if action == "drop" else action][reason] += 1
    dropped, masked, tagged = (dict(counts[action].most_common()) for action in ("drop", "mask", "tag"))
    kept = np.flatnonzero(keeps).astype(np.int64)
    return Reviewed(
        source.name,
        split,
        len(source),
        kept,
        dropped,
        masked,
        tagged,
        dict(unreadable),
        tuple(sorted(files)),
        source.fingerprint(),
    )


def _reason(finding: Finding) -> str:
    return f"{finding.stage}: {finding.reason}"


def _contamination(
    built: Sequence[Stage], findings: Iterable[Finding], reviewed: Sequence[Reviewed]
) -> tuple[Contamination, ...]:
    found = next((stage for stage in built if isinstance(stage, Leakage)), None)
    if found is None:
        return ()
    rows = {one.name: one.rows for one in reviewed if one.split == "train"}
    return tuple(leakage.contamination(findings, rows=rows, items=found.items))


# --- sources without them ---------------------------------------------------------------------------------------------


def filtered(
    source: RowSource,
    kept: np.ndarray,
    names: Sequence[str],
    options: Filters,
    own: Own | None = None,
    *,
    shape: str,
) -> RowSource:
    """The rows kept, masked where the stage "personal" masks; the source itself where nothing changes.

    `shape` is the `fingerprint` of names and options.
    """
    masks = (
        Personal(options, own.finder if own else None) if "personal" in names and options.personal == "mask" else None
    )
    if masks is None and len(kept) == len(source):
        return source
    kind = FilteredRows if isinstance(source, sources.Rows) else Filtered
    return kind(source, kept, masks, shape=shape)


def fingerprint(names: Sequence[str], options: Filters) -> str:
    """Changes with the stages, their settings, the files that these name, and their versions."""
    versions = [VERSION, *(module.VERSION for module in (duplicates, leakage, privacy, toxicity, quality))]
    lists = [words.fingerprint for words in toxicity.read_word_lists(options.word_lists)] if "toxic" in names else []
    leaks = "leakage" in names and options.leakage_files
    items = [source.fingerprint() for source in sources.open_files(options.leakage_files)] if leaks else []
    text = json.dumps([versions, list(names), dataclasses.asdict(options), lists, items], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Filtered:
    """Some rows of a source, without what is personal. Nothing is stored: a row is masked whenever it is read."""

    def __init__(self, source: RowSource, kept: np.ndarray, masks: Personal | None, *, shape: str) -> None:
        self.name = source.name
        self._source, self._masks, self._shape = source, masks, shape
        self._kept = np.asarray(kept, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._kept)

    def conversation(self, index: int) -> Conversation:
        return self._masked(self._source.conversation(int(self._kept[index])))

    def conversations(self, indices: Sequence[int] | np.ndarray) -> list[Conversation]:
        read = sources.conversations(self._source, self._kept[np.asarray(indices, np.int64)])
        return [self._masked(conversation) for conversation in read]

    def _masked(self, conversation: Conversation) -> Conversation:
        return self._masks.masked(conversation) if self._masks else conversation

    def notes(self) -> list[str]:
        return sources.notes(self._source)

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        parts = f"filtered {VERSION}\n{self.name}\n{self._source.fingerprint()}\n{self._shape}\n".encode()
        return hashlib.sha256(parts + self._kept.astype("<i8").tobytes()).hexdigest()


class FilteredRows(Filtered):
    """The same of a source whose rows can be read as the file has them, for templates."""

    _source: Any  # also sources.Rows

    def row(self, index: int) -> Mapping[str, Any]:
        row = self._source.row(int(self._kept[index]))
        return self._masks.masked_row(row) if self._masks else row

    def key(self, index: int) -> str:
        return self._source.key(int(self._kept[index]))


# --- findings on disk -------------------------------------------------------------------------------------------------


def lines(findings: Iterable[Finding]) -> Iterator[str]:
    """One JSON object for each finding; none quotes the data."""
    return (json.dumps(dataclasses.asdict(finding), ensure_ascii=False) + "\n" for finding in findings)
