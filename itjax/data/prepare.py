"""From a config to encoded data: sources opened, a part of each held out, the tokenizer made or read, every example encoded."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from itjax.base.files import write_whole
from itjax.base.schema import Run, Source
from itjax.data import cache, sources
from itjax.data.cache import EncodedSource
from itjax.data.encode import Encoding
from itjax.data.loader import Loader, make_loader
from itjax.data.sources import RowSource, Subset
from itjax.data.tasks import TaskSource
from itjax.text import formats, tokenizer
from itjax.text.formats import Format
from itjax.text.tokenizer import SentencePiece

TOKENIZER_VERSION = 2  # of how an automatic tokenizer is made; a new number makes all of them anew
TOKENIZER_TEXTS = 200_000  # conversations that an automatic tokenizer is made from, spread evenly over all sources

Progress = Callable[[str, int, int], None]  # (what, done, of how many)


@dataclass(frozen=True)
class HeldOut:
    """Rows of one source that are never trained on."""

    name: str
    template_split: str | None  # "seen" or "heldout" phrasings; None where rows have no templates
    encoded: EncodedSource
    task: TaskSource | None  # the embedded task that the rows come from: its answers can be scored


@dataclass(frozen=True)
class Part:
    """One source of a mixture: what is trained on, with its share of the examples (None: proportional to its rows)."""

    rows: RowSource
    weight: float | None


@dataclass(frozen=True)
class Data:
    """Everything about the data that training, showing, verifying and evaluating need."""

    tokenizer: SentencePiece
    format: Format
    train: tuple[EncodedSource, ...]
    weights: tuple[float | None, ...]
    empty: tuple[EncodedSource, ...]  # sources of which every row was dropped: left out of training
    held: tuple[HeldOut, ...]

    def notes(self) -> list[str]:
        """What was not taken as it stands in the files, a line each; nothing when all was."""
        reports = [source.report for source in (*self.train, *self.empty)]
        rows = sum(report["rows"] for report in reports)
        lines = [f"{source.name} is left out: {_why(source)}" for source in self.empty]
        dropped = sum((Counter(report["dropped"]) for report in reports), Counter())
        lines += [f"{count:,} of {rows:,} examples dropped: {reason}" for reason, count in dropped.most_common()]
        truncated = sum(report["truncated"] for report in reports)
        return [*lines, f"{truncated:,} of {rows:,} examples truncated"] if truncated else lines


@dataclass(frozen=True)
class _HeldRows:
    name: str
    template_split: str | None
    rows: RowSource
    task: TaskSource | None = None


def prepare(run: Run, *, progress: Progress) -> Data:
    """Opens, splits and encodes the data of a run. Raises ValueError naming path and line of what cannot be used."""
    parts, held = _open(run)
    folder = Path(run.cache_dir) if run.cache_dir else cache.default_dir()
    pieces = _tokenizer(run, [part.rows for part in parts], folder=folder, progress=progress)
    fmt = formats.resolve(run.format, pieces)
    encoding = Encoding(
        tokenizer=pieces,
        format=fmt.name,
        length=run.length,
        truncation=run.truncation,
        prompt_weight=run.loss.prompt_weight,
    )

    total, before = sum(len(part.rows) for part in parts) + sum(len(part.rows) for part in held), 0

    def encode(rows: RowSource) -> EncodedSource:
        nonlocal before
        source = cache.encode_source(
            rows,
            encoding,
            cache_dir=folder,
            workers=os.cpu_count() or 1,
            progress=lambda done, _: progress("encoding", before + done, total),
        )
        before += len(rows)
        return source

    train = [(part, encode(part.rows)) for part in parts]
    encoded = [(part, encode(part.rows)) for part in held]
    kept = [(part, source) for part, source in train if len(source)]
    if not kept:
        raise ValueError(
            f"config.files: no example is left to train on: {'; '.join(_why(source) for _, source in train)}. "
            f"Raise config.length (now {run.length}) or choose another config.truncation (now {run.truncation!r})"
        )
    return Data(
        tokenizer=pieces,
        format=fmt,
        train=tuple(source for _, source in kept),
        weights=tuple(part.weight for part, _ in kept),
        empty=tuple(source for _, source in train if not len(source)),
        held=tuple(
            HeldOut(part.name, part.template_split, source, part.task) for part, source in encoded if len(source)
        ),
    )


def loader(run: Run, data: Data, *, local_rows: Sequence[int], workers: int) -> Loader:
    """The batches of a run, for a process that needs these rows of each."""
    return make_loader(
        data.train,
        weights=data.weights,
        length=run.length,
        rows=run.rows,
        steps=run.steps or None,
        epochs=run.epochs or None,
        window=run.window,
        seed=run.seed,
        packing=run.packing,
        reduction=run.loss.reduction,
        local_rows=local_rows,
        workers=workers,
    )


def _why(source: EncodedSource) -> str:
    """Why nothing of a source is left."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in source.report["dropped"].items())
    return f"{source.name}: of {source.report['rows']} rows dropped {reasons}"


def _open(run: Run) -> tuple[list[Part], list[_HeldRows]]:
    parts: list[Part] = []
    held: list[_HeldRows] = []

    def add_file(rows: RowSource, weight: float | None) -> None:
        if run.eval_files or not run.evaluation.examples:
            parts.append(Part(rows, weight))
            return
        train, kept = sources.hold_out(
            rows, examples=run.evaluation.examples, fraction=run.evaluation.fraction, seed=run.seed
        )
        parts.append(Part(train, weight))
        if len(kept):
            held.append(_HeldRows(rows.name, None, kept))

    for rows in sources.open_files(run.files) if run.files else []:
        add_file(rows, None)
    for name, source in run.sources.items():
        if source.task:
            task = TaskSource(
                source.task, examples=source.examples, seed=run.seed, split="train", phrasings=source.phrasings
            )
            parts.append(Part(_renamed(task, name), source.weight))
            held.extend(_held_tasks(run, name, source))
            continue
        files = sources.open_files(source.files)
        total = sum(len(rows) for rows in files)
        for rows in files:
            named = name if len(files) == 1 else f"{name}/{rows.name}"
            add_file(_renamed(rows, named), source.weight and source.weight * len(rows) / total)
    for rows in sources.open_files(run.eval_files) if run.eval_files else []:
        held.append(_HeldRows(rows.name, None, rows))
    names = [part.rows.name for part in parts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"config.sources: two sources are named {twice[0]!r}; give each its own name")
    return parts, held


def _renamed(rows: RowSource, name: str) -> RowSource:
    return rows if rows.name == name else Subset(rows, range(len(rows)), name)


def _held_tasks(run: Run, name: str, source: Source) -> Iterator[_HeldRows]:
    """Rows of an embedded task that training never sees, in the phrasings it sees and in those it does not."""
    count = max(run.evaluation.examples, run.evaluation.generate)
    for template_split, phrasings in (("seen", source.phrasings), ("heldout", "heldout")):
        if count:
            task = TaskSource(source.task, examples=count, seed=run.seed, split="eval", phrasings=phrasings)
            yield _HeldRows(name, template_split, _renamed(task, f"{name}/{template_split}"), task)


def _tokenizer(run: Run, rows: Sequence[RowSource], *, folder: Path, progress: Progress) -> SentencePiece:
    """The tokenizer file of the config, or one made from the training rows and kept in the cache."""
    if run.tokenizer != "auto":
        path = Path(run.tokenizer)
        if not path.is_file():
            raise ValueError(
                f"config.tokenizer: {run.tokenizer}: no such file; name a SentencePiece model, or use auto to make one"
            )
        return SentencePiece(path)
    fingerprints = [source.fingerprint() for source in rows]
    shape = [TOKENIZER_VERSION, run.vocab_size, run.split_digits, TOKENIZER_TEXTS, *fingerprints]
    key = hashlib.blake2b(repr(shape).encode(), digest_size=16).hexdigest()
    path = folder / "tokenizers" / f"{key}.model"
    if not path.exists():
        model = tokenizer.train(
            _texts(rows, progress),
            size=run.vocab_size,
            controls=formats.CHATML_CONTROLS,
            split_digits=run.split_digits,
        )
        write_whole(path, model)
    return SentencePiece(path)


def _texts(rows: Sequence[RowSource], progress: Progress) -> Iterator[str]:
    """The texts of all conversations, or of an even spread of them where there are very many."""
    total = sum(len(source) for source in rows)
    stride = max(1, -(-total // TOKENIZER_TEXTS))
    done = 0
    for source in rows:
        for index in range(0, len(source), stride):
            for message in source.conversation(index).messages:
                yield message.content
            done += 1
        progress("reading texts for the tokenizer", min(done * stride, total), total)
