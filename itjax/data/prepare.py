"""From the rows of a run to encoded data: the tokenizer made or read, every example encoded, in as many editions as it is seen."""

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from itjax.base.files import write_private
from itjax.base.records import Conversation
from itjax.base.schema import Run
from itjax.data import cache, gather
from itjax.data.cache import EncodedSource
from itjax.data.encode import Encoding
from itjax.data.gather import Gathered, Progress
from itjax.data.loader import Loader, make_loader
from itjax.data.phrase import Phrased
from itjax.data.recipe import resolve
from itjax.data.rows import size
from itjax.data.sources import BadRow, RowSource
from itjax.data.tasks import TaskSource
from itjax.text import chat, checks, formats, tokenizer
from itjax.text.jinja import ChatTemplate
from itjax.text.tokenizer import Tokenizer

TOKENIZER_VERSION = 2  # of how an automatic tokenizer is made; a new number makes all of them anew
TOKENIZER_TEXTS = 200_000  # conversations that an automatic tokenizer is made from, spread evenly over all sources
LOOKED_AT = 64  # conversations that are written as a trial before any is encoded
MOST_EDITIONS = 8  # other words for the same row: from then on they come again


@dataclass(frozen=True)
class HeldOut:
    """Rows of one source that are never trained on."""

    name: str
    template_split: str | None  # "seen" or "heldout" phrasings; None where rows have no templates
    encoded: EncodedSource
    task: TaskSource | None  # the embedded task that the rows come from: its answers can be scored


@dataclass(frozen=True)
class Data:
    """Everything about the data that training, showing, verifying and evaluating need."""

    tokenizer: Tokenizer
    format: chat.Writes
    gathered: Gathered
    train: tuple[EncodedSource, ...]
    empty: tuple[EncodedSource, ...]  # sources of which every row was dropped: left out of training
    held: tuple[HeldOut, ...]
    remarks: tuple[str, ...] = ()  # on the format

    def notes(self) -> list[str]:
        """What was not taken as it stands in the files, a line each; nothing when all was."""
        reports = [source.report for source in (*self.train, *self.empty)]
        rows = sum(report["rows"] * report["editions"] for report in reports)
        lines = [*self.remarks, *self.gathered.notes()]
        lines += [f"{source.name} is left out: {_why(source)}" for source in self.empty]
        dropped = sum((Counter(report["dropped"]) for report in reports), Counter())
        lines += [f"{count:,} of {rows:,} examples dropped: {reason}" for reason, count in dropped.most_common()]
        truncated = sum(report["truncated"] for report in reports)
        return [*lines, f"{truncated:,} of {rows:,} examples truncated"] if truncated else lines


def prepare(run: Run, *, progress: Progress) -> Data:
    """Gathers and encodes the data of a run. Raises ValueError naming path and line of what cannot be used."""
    folder = Path(run.cache_dir) if run.cache_dir else cache.default_dir()
    gathered = gather.gather(run, folder=folder, progress=progress)
    pieces = _tokenizer(run, gathered.train, folder=folder, progress=progress)
    encoding = Encoding(
        tokenizer=pieces,
        format=run.format,
        length=run.length,
        truncation=run.truncation,
        prompt_weight=run.loss.prompt_weight,
        learn=run.learn,
        bad_rows=run.bad_rows,
        folder=_model_folder(run),
        reasoning=run.reasoning,
        learns_separator=run.learn_separator,
    )

    remarks = tuple(_look(run, gathered.train, encoding))
    parts = gathered.held
    encoded = _encode([part.rows for part in parts], encoding, folder=folder, progress=progress)
    held = tuple(
        HeldOut(part.name, part.template_split, source, part.task)
        for part, source in zip(parts, encoded, strict=True)
        if len(source)
    )
    editions = dict.fromkeys((rows.name for rows in gathered.train), 1)
    while True:
        rows = [gather.in_editions(part, editions[part.name]) for part in gathered.train]
        train = _encode(rows, encoding, folder=folder, progress=progress)
        kept = tuple(source for source in train if len(source))
        if not kept:
            raise ValueError(
                f"config.files: no example is left to train on: {'; '.join(map(_why, train))}. "
                f"Raise config.length (now {run.length}) or choose another config.truncation (now {run.truncation!r})"
            )
        empty = tuple(source for source in train if not len(source))
        data = Data(
            tokenizer=pieces,
            format=encoding.fmt,
            gathered=gathered,
            train=kept,
            empty=empty,
            held=held,
            remarks=remarks,
        )
        wanted = editions | _editions(run, data)
        if all(wanted[name] <= editions[name] for name in editions):
            return data
        editions = {name: max(wanted[name], editions[name]) for name in editions}


def _look(run: Run, rows: Sequence[RowSource], encoding: Encoding) -> Iterator[str]:
    """Writes a few conversations of every source as a trial. Raises ValueError for what would ruin the run; yields notes."""
    fmt = encoding.fmt
    found = [conversation for source in rows for conversation in _some(source, max(1, LOOKED_AT // len(rows)))]
    writable = [conversation for conversation in found if _learns(conversation, encoding)]
    if faults := checks.problems(writable, fmt, encoding.tokenizer):
        raise ValueError(f"config.format: {'; '.join(faults)}. Choose another format or tokenizer")
    if unlearned := checks.count_unlearned(writable, fmt):
        yield (
            f"format {fmt.name} rewrites history: {unlearned} assistant turns of {len(writable)} conversations looked at "
            "are not learned, as the model would never see them so (docs/chat.md)"
        )
    if encoding.folder and isinstance(fmt, formats.Format):
        try:
            template = ChatTemplate.open(encoding.folder, encoding.tokenizer)
        except ValueError as error:
            yield f"the model's own chat template is not compared with format {fmt.name}: {error}"
            return
        yield from (f"format {fmt.name} is not the model's template: {line}" for line in checks.compare(fmt, template))


def _some(source: RowSource, count: int) -> Iterator[Conversation]:
    """A few conversations, evenly spread; those that cannot be read are told of when all are."""
    for index in range(0, len(source), max(1, len(source) // count)):
        with contextlib.suppress(BadRow):
            yield source.conversation(index)


def _learns(conversation: Conversation, encoding: Encoding) -> bool:
    """Whether the format can write it, and something of it is learned."""
    try:
        segments = chat.render(conversation, encoding.fmt, prompt_weight=0.0, learn=encoding.learn)
    except ValueError:
        return False
    return any(segment.weight for segment in segments)


def _encode(
    sources: Sequence[RowSource], encoding: Encoding, *, folder: Path, progress: Progress
) -> list[EncodedSource]:
    total, before = sum(len(rows) for rows in sources), 0
    encoded = []
    for rows in sources:

        def told(done: int, _: int, before: int = before) -> None:
            progress("encoding", before + done, total)

        encoded.append(
            cache.encode_source(rows, encoding, cache_dir=folder, workers=os.cpu_count() or 1, progress=told)
        )
        before += len(rows)
    return encoded


def _editions(run: Run, data: Data) -> dict[str, int]:
    """How many editions of each phrased source the run sees, by its plan."""
    phrased = {rows.name for rows in data.gathered.train if isinstance(rows, Phrased)}
    if not phrased:
        return {}
    served = loader(run, data, local_rows=range(run.rows), workers=0).report()["sources"]
    return {name: min(MOST_EDITIONS, max(1, served[name]["epochs_begun"])) for name in served if name in phrased}


def loader(run: Run, data: Data, *, local_rows: Sequence[int], workers: int) -> Loader:
    """The batches of a run, for a process that needs these rows of each."""
    return make_loader(
        data.train,
        weights=resolve(data.gathered.mixture, {source.name: size(source) for source in data.train}),
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


def _model_folder(run: Run) -> str:
    """The published folder whose tokenizer and chat template are used, or nothing."""
    named = run.model if run.tokenizer == "auto" else run.tokenizer
    return named if Path(named).is_dir() else ""


def _tokenizer(run: Run, rows: Sequence[RowSource], *, folder: Path, progress: Progress) -> Tokenizer:
    """The tokenizer that the config or the model's folder names, or one made from the training rows and kept in the cache."""
    named = _model_folder(run) or run.tokenizer
    if named != "auto":
        try:
            published = tokenizer.open(named)
            return tokenizer.with_tokens(published, run.new_tokens) if run.new_tokens else published
        except ValueError as error:
            raise ValueError(f"config.{'model' if named == run.model else 'tokenizer'}: {error}") from None
    if run.new_tokens:
        raise ValueError(
            f"config.new_tokens: {', '.join(run.new_tokens)} are for the tokenizer of a model's folder; "
            "one that is made from the data has the tokens of config.format"
        )
    fingerprints = [source.fingerprint() for source in rows]
    controls = _controls(run.format)
    shape = [TOKENIZER_VERSION, run.vocab_size, run.split_digits, TOKENIZER_TEXTS, controls, *fingerprints]
    key = hashlib.blake2b(repr(shape).encode(), digest_size=16).hexdigest()
    name = f"tokenizers/{key}.model"
    if not (folder / name).exists():
        model = tokenizer.train(
            _texts(rows, progress),
            size=run.vocab_size,
            controls=controls,
            split_digits=run.split_digits,
        )
        write_private(folder, name, model)
    return tokenizer.open(folder / name)


def _controls(name: str) -> tuple[str, ...]:
    """The control tokens that a chat format needs of its tokenizer; those of ChatML where it needs none."""
    return (formats.FORMATS[name].controls if name in formats.FORMATS else ()) or formats.CHATML_CONTROLS


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
