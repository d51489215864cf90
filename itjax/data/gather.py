"""From a config to rows: sources opened, unusable rows set aside, a part held out, the rest filtered and put into words.

config.sources.mails               rows
  files, columns, shape            0 1 2 3 4 5 6 7 8 9      as the files have them
  bad_rows = "skip"                0 1 2 . 4 5 6 7 8 9      without those that cannot be read, which are listed
  examples = 8                     0 1 2 . 4 5 . 7 8 9      some of them, by the seed
  evaluation.examples = 2          0 . 2 . 4 5 . 7 . 9      to train on; 1 and 8 are held out
  filters = ("exact_duplicates",)  0 . 2 . 4 5 . 7 . .      9 repeats 4
  kind = "classification"          each in the words of a family, in other words in every edition
"""

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from itjax.base.files import write_private, write_whole
from itjax.base.schema import Filters, Run, Source
from itjax.data import files, filters, mixture, phrase, recipe, shapes, sources
from itjax.data.phrase import Phrased
from itjax.data.recipe import Node
from itjax.data.sources import BadRow, RowSource
from itjax.data.tasks import TaskSource

CHECKS_VERSION = 1  # of what makes a row unusable; a new number looks at all rows anew
CHARACTERS = 3  # of a token, on the safe side: worked examples leave room for the question
Progress = Callable[[str, int, int], None]  # (what, done, of how many)


@dataclass(frozen=True)
class HeldRows:
    """Rows of one source that are never trained on."""

    name: str
    template_split: str | None  # "seen" or "heldout" phrasings; None where rows have no templates
    rows: RowSource
    task: TaskSource | None = None  # the embedded task that the rows come from: its answers can be scored


@dataclass(frozen=True)
class Filtering:
    """What the filters of a run made of its sources."""

    counts: Mapping[str, Any]  # source -> rows, kept, dropped, masked and tagged by reason
    notes: tuple[str, ...]
    findings: Path  # a line for each


@dataclass(frozen=True)
class Kept:
    """What became of the rows of one source before filters look at them. Those that are left are trained on."""

    skipped: Mapping[str, int]  # rows that cannot be read, by reason
    not_sampled: int  # more than the source's `examples`
    held_out: int


@dataclass(frozen=True)
class Gathered:
    """The rows of a run: what is trained on, by which rules it is mixed, and what is held out."""

    train: tuple[RowSource, ...]  # in the order of the mixture
    mixture: Node
    held: tuple[HeldRows, ...]
    bad: tuple[BadRow, ...] = ()  # rows that were skipped
    filtering: Filtering | None = None
    kept: Mapping[str, Kept] = field(default_factory=dict)  # by source

    def account(self) -> dict[str, Any]:
        """For a manifest: rows skipped by reason, and what the filters did to each source."""
        skipped = dict(Counter(row.reason for row in self.bad).most_common())
        return {"skipped": skipped, "filters": dict(self.filtering.counts) if self.filtering else {}}

    def account_of(self, name: str) -> dict[str, Any]:
        """For the manifest of one source: rows left out and why, before any is put into the model's format."""
        kept = self.kept.get(name, Kept({}, 0, 0))
        found = self.filtering.counts.get(name, {}) if self.filtering else {}
        left = Counter(kept.skipped) + Counter(found.get("dropped", {}))
        return {"held_out": kept.held_out, "not_sampled": kept.not_sampled, "dropped": dict(left)}

    def save(self, run_dir: Path) -> None:
        """The side files of a run: rows that were skipped, and what the filters found, where there are any."""
        if self.bad:
            sources.write_bad_rows(run_dir / "bad_rows.jsonl", self.bad)
        if self.filtering:
            write_whole(run_dir / "findings.jsonl", self.filtering.findings.read_bytes())

    def notes(self) -> list[str]:
        """What was not taken as it stands in the files, a line each."""
        lines = [f"{source.name}: {note}" for source in self.train for note in sources.notes(source)]
        lines += [f"{len(self.bad):,} rows skipped, as they cannot be read: see bad_rows.jsonl"] if self.bad else []
        return [*lines, *(self.filtering.notes if self.filtering else ())]


def gather(run: Run, *, folder: Path, progress: Progress) -> Gathered:
    """The rows of a run. Raises ValueError naming the place in the config, or path and line, of what cannot be used.

    `folder` is where indices of files and what the filters found are kept.
    """
    opened = gather_unfiltered(run, folder=folder, progress=progress)
    return _filtered(opened, run, folder=folder, progress=progress) if run.filters else opened


def gather_unfiltered(run: Run, *, folder: Path, progress: Progress) -> Gathered:
    """All rows of a run, as an audit looks at them."""
    parts: list[RowSource] = []
    held: list[HeldRows] = []
    bad: list[BadRow] = []
    kept: dict[str, Kept] = {}
    opened: dict[str, list[str]] = {}
    others: list[str] = []
    for leaf in _leaves(run):
        for rows in leaf.open(run, folder):
            usable, skipped = _usable(rows, leaf, run, folder, progress)
            if leaf.source.held_out:
                held += leaf.hold(usable, run)
                bad += skipped
                opened.setdefault(leaf.path, [])
                continue
            train, apart = leaf.split(usable, run)
            kept[train.name] = _kept(usable, skipped, train, leaf.source)
            parts.append(train)
            held += apart
            bad += skipped
            (opened.setdefault(leaf.path, []) if leaf.path else others).append(train.name)
    held += [
        HeldRows(rows.name, None, rows)
        for rows in sources.open_files(
            run.eval_files, data_dir=run.data_dir, cache_dir=folder, place="config.eval_files"
        )
    ] if run.eval_files else []  # fmt: skip
    if not parts:
        raise ValueError("config.sources: every source is held out; leave one to train on")
    names = [part.name for part in parts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"config.sources: two sources are named {twice[0]!r}; give each its own name")
    rules = recipe.tree(run.sources, run.mixture, opened=opened, others=others)
    return Gathered(tuple(parts), rules, tuple(held), tuple(bad), kept=kept)


def _kept(usable: RowSource, skipped: Sequence[BadRow], train: RowSource, source: Source) -> Kept:
    sampled = min(len(usable), source.examples or len(usable))
    reasons = Counter(row.reason for row in skipped)
    return Kept(reasons, not_sampled=len(usable) - sampled, held_out=sampled - len(train))


def options(run: Run) -> Filters:
    """What the filters look for, with the files they name where they are."""
    return replace(
        run.audit,
        leakage_files=files.below(run.data_dir, run.audit.leakage_files),
        word_lists=files.below(run.data_dir, run.audit.word_lists),
    )


def as_reviewed(rows: RowSource) -> RowSource:
    """The rows as filters look at them: each once, and those that are put into words all in the same."""
    return rows.alone if isinstance(rows, Phrased) else rows


def in_editions(rows: RowSource, editions: int) -> RowSource:
    """The rows in so many editions, where they are put into words anew in each."""
    return rows.over(rows.rows, editions=editions) if isinstance(rows, Phrased) else rows


# --- one source of a config -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Leaf:
    """A source without sources of its own. `path` is `mails`, or `tasks/sums`; empty for the files beside `sources`."""

    path: str
    source: Source

    @property
    def place(self) -> str:
        return f"config.sources.{self.path.replace('/', '.sources.')}" if self.path else "config"

    def open(self, run: Run, folder: Path) -> list[RowSource]:
        """What the source is made of: an embedded task, or one source a file."""
        source = self.source
        if source.phrasings in ("heldout", "all"):
            raise ValueError(
                f"{self.place}.phrasings: {source.phrasings!r} would train on phrasings that are held out for evaluation; "
                "use 'seen' or the name of one"
            )
        if source.task:
            task = TaskSource(
                source.task, examples=source.examples, seed=run.seed, split="train", phrasings=source.phrasings
            )
            return [_renamed(task, self.path)]
        if source.shape not in shapes.NAMES:
            known = ", ".join(shapes.NAMES)
            raise ValueError(f"{self.place}.shape: {source.shape!r} is unknown; known: {known}")
        opened = sources.open_files(
            source.files,
            columns=source.columns,
            shape=source.shape,
            data_dir=run.data_dir,
            cache_dir=folder,
            place=f"{self.place}.files",
        )
        if not self.path:
            return list(opened)
        named = [_renamed(rows, self.path if len(opened) == 1 else f"{self.path}/{rows.name}") for rows in opened]
        return [self._phrased(rows, run) for rows in named]

    def _phrased(self, rows: Any, run: Run) -> RowSource:
        source = self.source
        if not source.kind and not source.templates:
            return rows
        return Phrased(
            rows,
            phrase.family_of(source, place=self.place),
            split="train",
            phrasings=source.phrasings,
            seed=run.seed,
            few_shot=source.few_shot,
            inverted=source.inverted,
            pool=rows,
            room=CHARACTERS * run.length,
        )

    def split(self, rows: RowSource, run: Run) -> tuple[RowSource, list[HeldRows]]:
        """What is trained on and what is held out. Worked examples come from what is trained on."""
        source, wanted = self.source, run.evaluation
        if source.task:
            return rows, list(self._held_tasks(run))
        if source.examples:
            rows = _part(rows, functools.partial(_sample, count=source.examples, seed=run.seed))
        if run.eval_files or not wanted.examples:
            return rows, []
        raw: Any = rows.rows if isinstance(rows, Phrased) else rows
        train, held = sources.hold_out(raw, examples=wanted.examples, fraction=wanted.fraction, seed=run.seed)
        if not isinstance(rows, Phrased):
            return train, [HeldRows(rows.name, None, held)] if len(held) else []
        return rows.over(train, editions=1, pool=train), list(self._held_phrased(rows, train, held, run))

    def hold(self, rows: RowSource, run: Run) -> list[HeldRows]:
        """All rows, or `examples` of them, for evaluation alone."""
        if self.source.task:
            return list(self._held_tasks(run))
        if self.source.examples:
            rows = _part(rows, functools.partial(_sample, count=self.source.examples, seed=run.seed))
        if isinstance(rows, Phrased):
            return list(self._held_phrased(rows, None, rows.rows, run))
        return [HeldRows(rows.name, None, rows)]

    def _held_phrased(self, rows: Phrased, train: Any, held: Any, run: Run) -> Iterator[HeldRows]:
        """The rows held out in phrasings that are trained on, and in those that are not.

        Worked examples are rows of `train`; where there are none, as of a whole task held out, there are no examples.
        """
        has_heldout = any(template.heldout for template in rows.family.templates)
        for split, phrasings in (("seen", self.source.phrasings), ("heldout", "heldout")):
            if len(held) and (split == "seen" or has_heldout):
                name = f"{rows.name}/{split}"
                said = Phrased(
                    _renamed(held, name), rows.family, split="eval", phrasings=phrasings, seed=run.seed,
                    few_shot=self.source.few_shot if train else 0, pool=train, room=CHARACTERS * run.length,
                )  # fmt: skip
                yield HeldRows(rows.name, split, said)

    def _held_tasks(self, run: Run) -> Iterator[HeldRows]:
        """Rows of an embedded task that training never sees, in the phrasings it sees and in those it does not."""
        count = max(run.evaluation.examples, run.evaluation.generate)
        for split, phrasings in (("seen", self.source.phrasings), ("heldout", "heldout")):
            if count:
                task = TaskSource(self.source.task, examples=count, seed=run.seed, split="eval", phrasings=phrasings)
                yield HeldRows(self.path, split, _renamed(task, f"{self.path}/{split}"), task)


def _leaves(run: Run) -> Iterator[_Leaf]:
    """All sources of the config that have rows, in the order of the mixture."""
    if run.files:
        yield _Leaf("", Source(files=run.files))
    yield from _leaves_of(run.sources, "")


def _leaves_of(named: Mapping[str, Source], above: str) -> Iterator[_Leaf]:
    for name, source in named.items():
        if source.sources:
            yield from _leaves_of(source.sources, f"{above}{name}/")
        else:
            yield _Leaf(f"{above}{name}", source)


def _usable(rows: RowSource, leaf: _Leaf, run: Run, folder: Path, progress: Progress) -> tuple[RowSource, list[BadRow]]:
    """The rows that can be read, where the config says to skip others."""
    if run.bad_rows == "error" or leaf.source.task:
        return rows, []
    bad = _bad_rows(rows, folder, progress)
    good = sources.without(rows, bad, most=run.max_bad_rows)
    return (_part(rows, lambda raw: sources.Subset(raw, good.indices)) if bad else rows), list(bad.values())


def _bad_rows(rows: RowSource, folder: Path, progress: Progress) -> dict[int, BadRow]:
    """The rows that cannot be read, found before or now."""
    key = hashlib.blake2b(f"{CHECKS_VERSION} {rows.fingerprint()}".encode(), digest_size=16).hexdigest()
    name = f"checked/{key}.json"
    if not (folder / name).exists():
        found = sources.bad_rows(
            rows,
            workers=os.cpu_count() or 1,
            progress=lambda done, total: progress("checking rows", done, total),
        )
        told = [[row, bad.key, bad.reason, bad.why] for row, bad in found.items()]
        write_private(folder, name, json.dumps(told))
    return {row: BadRow(key, reason, why) for row, key, reason, why in json.loads((folder / name).read_text())}


def _part(rows: RowSource, choose: Callable[[Any], Any]) -> RowSource:
    """Some of the rows, chosen among those that a phrased source puts into words."""
    if not isinstance(rows, Phrased):
        return choose(rows)
    chosen = choose(rows.rows)
    return rows.over(chosen, editions=1, pool=chosen)


def _sample(rows: RowSource, *, count: int, seed: int) -> RowSource:
    if count >= len(rows):
        return rows
    return sources.Subset(rows, mixture.sample(len(rows), count, seed=seed, name=rows.name))


def _renamed(rows: Any, name: str) -> Any:
    return rows if rows.name == name else sources.Subset(rows, range(len(rows)), name)


# --- filters ----------------------------------------------------------------------------------------------------------


def _filtered(opened: Gathered, run: Run, *, folder: Path, progress: Progress) -> Gathered:
    """The rows that the filters leave, from what they found before on the same rows, or now."""
    wanted = options(run)
    shape = filters.fingerprint(run.filters, wanted)
    leave = functools.partial(filters.filtered, names=run.filters, options=wanted, shape=shape)
    contents = [source.fingerprint() for source in (*opened.train, *(part.rows for part in opened.held))]
    key = hashlib.blake2b(json.dumps([shape, contents]).encode(), digest_size=16).hexdigest()
    place = folder / "filtered" / key
    if not (place / "kept.json").exists():
        _review(opened, run, folder, f"filtered/{key}", progress)
    found = json.loads((place / "kept.json").read_text())
    train = []
    for rows, dropped in zip(opened.train, found["dropped_rows"], strict=True):
        kept = np.setdiff1d(np.arange(len(rows)), np.array(dropped, np.int64), assume_unique=True)
        train.append(_part(rows, functools.partial(leave, kept=kept)))
    told = Filtering(found["counts"], tuple(found["notes"]), place / "findings.jsonl")
    return replace(opened, train=tuple(train), filtering=told)


def _review(opened: Gathered, run: Run, folder: Path, place: str, progress: Progress) -> None:
    """Looks at every row and keeps what was found; `kept.json` is written last and makes it count."""
    found = filters.review(
        [as_reviewed(rows) for rows in opened.train],
        [as_reviewed(part.rows) for part in opened.held],
        run.filters,
        options(run),
        progress=lambda done, total: progress("filtering", done, total),
        workers=os.cpu_count() or 1,
    )
    train = [one for one in found.reviewed if one.split == "train"]
    dropped = [np.setdiff1d(np.arange(one.rows), one.kept, assume_unique=True).tolist() for one in train]
    told = {"dropped_rows": dropped, "counts": found.counts(), "notes": found.notes()}
    write_private(folder, f"{place}/findings.jsonl", "".join(filters.lines(found.findings)))
    write_private(folder, f"{place}/kept.json", json.dumps(told))
