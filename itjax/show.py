"""What the model will be trained on: rows of the real plan, text coloured by loss weight, every token with its name.

    python -m itjax.show --config=configs/quickstart.py

Text is made from the ids of the packed rows, never by rendering a conversation again, so it cannot flatter. A row of T
positions feeds the tokens of an example but its last, and asks for all but its first:

    text       Capital?   Paris    .   <|im_end|>
    ids          57        301    13       5
    fed          57        301    13                     tokens, at positions 0, 1, 2
    predicted              301    13       5             targets
    weight        0         1      1       1             a token is coloured by the weight of predicting it

So every id of an example is shown once: the first is never predicted (weight 0), the last is predicted and never fed.
"""

import codecs
import itertools
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from itjax import cli, showing
from itjax.base import freeze
from itjax.base.files import write_whole
from itjax.base.records import PackedBatch
from itjax.base.schema import Run
from itjax.data import manifest, prepare, table
from itjax.data.loader import Loader, Placed
from itjax.data.prepare import Data
from itjax.evaluation import page
from itjax.evaluation.chart import percent
from itjax.evaluation.page import escape
from itjax.text.tokenizer import Tokenizer

HELP = """Show what the model will be trained on, token by token.

    python -m itjax.show --config=configs/quickstart.py --html=rows.html

  --rows=N     how many rows: the first N of the run (2), or of the step
  --step=K     the rows of optimizer step K, as metrics.jsonl counts them (from 1)
  --templates  instead: a row of each source in the words of every phrasing it may be asked in
  --html=OUT   write one page there; the pointer shows id, position, weight and target of a token
  --json=OUT   write the rows there, as data
  --mixture    instead of rows, the shares of all sources, planned and realised; with --json that account, as data
"""
FIRST_ROWS = 2
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
GREY, GREEN = np.array([128, 128, 128]), np.array([30, 170, 90])


# --- ids to text ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """The smallest stretch of ids with a text of its own: one token, or the few whose bytes spell one character."""

    text: str
    weight: float
    special: bool
    start: int
    stop: int


@dataclass(frozen=True)
class Example:
    """One example of a row, with the numbers that the row holds of it."""

    placed: Placed
    key: str
    template: str
    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    positions: np.ndarray
    units: Sequence[Unit]
    scale: float  # what the loss reduction has multiplied the example's weights by

    def shade(self, unit: Unit) -> float:
        """The weight as the source gave it, at most 1: how strongly the unit is coloured."""
        return min(unit.weight / self.scale, 1.0)

    @property
    def ids(self) -> np.ndarray:
        """All ids of the example: those fed, and the last one, which is only predicted."""
        return np.append(self.tokens, self.targets[-1:])

    @property
    def num_trained(self) -> int:
        return int(np.count_nonzero(self.weights))


@dataclass(frozen=True)
class Row:
    """One row of the run; row r of step s (both from 0) is number `s * rows + r`."""

    number: int
    step: int  # as metrics.jsonl counts, from 1
    examples: Sequence[Example]
    length: int

    @property
    def num_tokens(self) -> int:
        return sum(len(example.tokens) for example in self.examples)

    @property
    def fill(self) -> float:
        return self.num_tokens / self.length


def units(ids: Sequence[int], weights: Sequence[float], tokenizer: Tokenizer) -> Iterator[Unit]:
    """The text of ids, byte for byte; `weights` are those of predicting each id. Bytes that are not UTF-8 become U+FFFD.

    Control tokens are special and stand as their names.
    """
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    start = 0
    for at, (id, weight) in enumerate(zip(ids, weights, strict=True)):
        name, special, byte = _token(int(id), tokenizer)
        is_cut = byte is None or weight != weights[start]
        if start < at and is_cut:  # a character that was begun is not completed
            yield Unit(decode(b"", True), weights[start], False, start, at)
            start = at
        text = name if byte is None else decode(byte, at == len(ids) - 1)
        if text:
            yield Unit(text, weight, special, start, at + 1)
            start = at + 1


def _token(id: int, tokenizer: Tokenizer) -> tuple[str, bool, bytes | None]:
    """The token's text, whether it is special, and its byte where it is one byte and no text."""
    name = tokenizer.token(id)
    if tokenizer.control(name) == id or id in (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unk):
        return name, True, None
    byte = BYTE.fullmatch(name)
    is_byte = byte is not None and tokenizer.decode([id]) != name
    return name, False, bytes.fromhex(byte[1]) if byte and is_byte else None


def segments(example: Example) -> list[dict[str, Any]]:
    """Text in stretches of one weight; each special token alone."""
    groups = itertools.groupby(
        example.units, key=lambda unit: (unit.weight, unit.start if unit.special else None, unit.special)
    )
    return [
        {"text": "".join(unit.text for unit in group), "weight": weight, "special": special}
        for (weight, _, special), group in groups
    ]


# --- the rows of a run ------------------------------------------------------------------------------------------------


def plan(run: Run, data: Data) -> Loader:
    """The loader of training, for one process that reads all rows."""
    return prepare.loader(run, data, local_rows=range(run.rows), workers=0)


def chosen(loader: Loader, *, rows_per_step: int, rows: int | None, step: int | None) -> range:
    """Numbers of the rows asked for. Raises Fault for a step or a number of rows that the run does not have."""
    if rows is not None and rows < 1:
        raise freeze.Fault(f"--rows={rows}: nothing to show; ask for at least 1")
    if step is None:
        first, available = 0, loader.num_steps * rows_per_step
    elif 1 <= step <= loader.num_steps:
        first, available = (step - 1) * rows_per_step, rows_per_step
    else:
        raise freeze.Fault(f"--step={step}: this run has steps 1 to {loader.num_steps}")
    wanted = rows or (FIRST_ROWS if step is None else available)
    if wanted > available and rows is not None:
        where = "the run" if step is None else f"step {step}"
        raise freeze.Fault(f"--rows={rows}: {where} has {available} rows; ask for {available} or fewer")
    return range(first, first + min(wanted, available))


def read(loader: Loader, data: Data, numbers: Sequence[int], *, rows_per_step: int) -> Iterator[Row]:
    """The rows of these numbers, as the loader hands them to training."""
    for step, members in itertools.groupby(numbers, key=lambda number: number // rows_per_step):
        batch = loader.batch(step, all_rows=True)
        for number in members:
            placed = loader.row(number)
            examples = [_example(batch, number % rows_per_step, one, data) for one in placed]
            yield Row(number, step + 1, examples, batch.tokens_BT.shape[1])


def _example(batch: PackedBatch, row: int, placed: Placed, data: Data) -> Example:
    here = batch.segments_BT[row] == placed.segment
    source = next(source for source in data.train if source.name == placed.source)
    tokens, targets, weights = batch.tokens_BT[row, here], batch.targets_BT[row, here], batch.weights_BT[row, here]
    return Example(
        placed=placed,
        key=source.address(placed.index),
        template=source.template(placed.index),
        tokens=tokens,
        targets=targets,
        weights=weights,
        positions=batch.positions_BT[row, here],
        units=tuple(units([*tokens.tolist(), *targets[-1:].tolist()], [0.0, *map(float, weights)], data.tokenizer)),
        scale=float(weights.sum() / source.weight_sums[placed.index]),
    )


# --- as data ----------------------------------------------------------------------------------------------------------


def as_json(row: Row) -> dict[str, Any]:
    """The row as contracts say. Segments cover every id of an example; the arrays are what the model is fed and asked."""
    return {
        "examples": [
            {
                "source": example.placed.source,
                "key": example.key,
                "template": example.template,
                "segments": segments(example),
                "tokens": example.tokens.tolist(),
                "targets": example.targets.tolist(),
                "weights": example.weights.tolist(),
                "positions": example.positions.tolist(),
            }
            for example in row.examples
        ],
        "fill": row.fill,
    }


def _title(row: Row) -> str:
    count = len(row.examples)
    return (
        f"row {row.number} (step {row.step}): {count} example{'s' * (count != 1)}, {row.num_tokens} of {row.length} "
        f"positions ({percent(row.fill)})"
    )


def _facts(example: Example) -> list[str]:
    """What is known of an example besides its text."""
    placed, size = example.placed, len(example.tokens)
    facts = [placed.source, example.key, example.template]
    facts += [f"epoch {placed.epoch}"] if placed.epoch else []
    facts += [f"positions {example.positions[0]}-{example.positions[-1]}", f"{example.num_trained} of {size} trained"]
    return [fact for fact in facts if fact]


def visible(text: str) -> str:
    """Control characters as signs, so that data can neither hide nor steer a terminal; line breaks and tabs stay."""
    return "".join(_sign(character) if _hides(character) else character for character in text)


def _hides(character: str) -> bool:
    return character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp")


def _sign(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"\\u{code:04x}"


# --- in the terminal --------------------------------------------------------------------------------------------------


def print_rows(rows: Sequence[Row], console: Console) -> None:
    legend = Text("not learned", style=_style(0.0)) + Text("  half", style=_style(0.5)) + Text("  learned", _style(1.0))
    console.print(legend + Text("  a special token", style="default") + Text(" <name> ", style="reverse"), "\n")
    for row in rows:
        console.rule(Text(_title(row), style="bold"), align="left", style="dim")
        for example in row.examples:
            console.print(Text(f"[{example.placed.segment}] {' · '.join(map(visible, _facts(example)))}", style="cyan"))
            console.print(Padding(_coloured(example), (0, 0, 1, 2)), soft_wrap=False)


def _coloured(example: Example) -> Text:
    text = Text()
    for unit in example.units:
        style = _style(example.shade(unit)) + (" reverse" if unit.special else "")
        text.append(visible(unit.text).replace("\n", "↵\n").replace("\t", "→\t"), style=style)
    return text


def _style(shade: float) -> str:
    if shade <= 0:
        return "dim"
    red, green, blue = (GREY + (GREEN - GREY) * shade).astype(int).tolist()
    return f"rgb({red},{green},{blue})" + (" bold" if shade >= 1 else "")


# --- as a page --------------------------------------------------------------------------------------------------------

STYLE = """
:root { --learned: 150 62% 40%; } @media (prefers-color-scheme: dark) { :root { --learned: 152 55% 45%; } }
.row { margin-top: 36px; } .example { margin-top: 10px; } .example h3 { margin: 0 0 6px; font-size: 13px; font-weight: 600; }
.example h3 span { color: var(--soft); font-weight: 400; }
.map { display: flex; height: 10px; border-radius: 5px; overflow: hidden; background: var(--chip); margin: 6px 0 4px; }
.map i { border-right: 1px solid var(--page); background: linear-gradient(90deg, var(--bar) 0 var(--p),
  hsl(var(--learned)) var(--p) 100%); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75; }
.text b { font-weight: 400; color: var(--soft); position: relative; border-radius: 3px; }
.text b[style] { color: var(--text); background: hsl(var(--learned) / calc(var(--w) * .38)); }
.text b.s { border: 1px solid currentColor; padding: 0 3px; font-size: 12px; }
.text b:hover { outline: 1px solid var(--c0); }
.text b:hover::after { content: attr(data-t); position: fixed; left: 24px; bottom: 16px; z-index: 3; white-space: pre-wrap;
  background: var(--text); color: var(--page); padding: 6px 12px; border-radius: 8px; font-size: 13px; line-height: 1.5;
  max-width: calc(100vw - 48px); pointer-events: none; }
.text i::before { content: attr(data-sign); font-style: normal; opacity: .45; }
.legend b { font-weight: 400; padding: 1px 6px; }
"""


def as_page(rows: Sequence[Row], words: str, tokenizer: Tokenizer) -> str:
    """All rows as one self-contained page."""
    legend = (
        '<p class="legend text"><b>not learned</b> <b style="--w:.5">half the weight</b> <b style="--w:1">learned</b> '
        '<b class="s">special token</b></p>'
    )
    body = "\n".join(_row_html(row, tokenizer) for row in rows)
    head = (
        f'<h1>What the model is trained on</h1><p class="soft" style="white-space:pre-line">{escape(words)}</p>{legend}'
    )
    return page.document("rows as they are trained", f"{head}\n{body}", style=STYLE)


def _row_html(row: Row, tokenizer: Tokenizer) -> str:
    parts = "".join(
        f'<i style="width:{len(example.tokens) / row.length:.3%};--p:{1 - example.num_trained / len(example.tokens):.1%}"></i>'
        for example in row.examples
    )
    examples = "\n".join(_example_html(example, tokenizer) for example in row.examples)
    return f'<section class="row"><h2 style="margin:0">{escape(_title(row))}</h2><div class="map">{parts}</div>{examples}</section>'


def _example_html(example: Example, tokenizer: Tokenizer) -> str:
    first, *others = _facts(example)
    tokens = "".join(_unit_html(unit, example, tokenizer) for unit in example.units)
    return (
        f'<div class="card example"><h3>{example.placed.segment} · {escape(first)} '
        f"<span>· {escape(' · '.join(others))}</span></h3><pre class=text>{tokens}</pre></div>"
    )


def _unit_html(unit: Unit, example: Example, tokenizer: Tokenizer) -> str:
    shade = example.shade(unit)
    weight = f' style="--w:{shade:.3g}"' if shade else ""
    text = escape(visible(unit.text)).replace("\n", '<i data-sign="↵"></i>\n').replace("\t", '<i data-sign="→"></i>\t')
    tip = "\n".join(_tip(at, example, tokenizer) for at in range(unit.start, unit.stop))
    return f'<b{" class=s" * unit.special}{weight} data-t="{escape(tip)}">{text}</b>'


def _tip(at: int, example: Example, tokenizer: Tokenizer) -> str:
    """`id 301 "Paris" · position 1 · learned with weight 1 · target 13 "."`."""
    ids = example.ids
    learned = f"predicted with weight {example.weights[at - 1]:.4g}" if at else "never predicted"
    if at == len(example.tokens):
        return f"id {_named(ids[at], tokenizer)} · only predicted, not fed · {learned}"
    target = f"target {_named(ids[at + 1], tokenizer)}, weight {example.weights[at]:.4g}"
    return f"id {_named(ids[at], tokenizer)} · position {example.positions[at]} · {learned}\n{target}"


def _named(id: int, tokenizer: Tokenizer) -> str:
    return f"{id} {json.dumps(visible(tokenizer.token(int(id))), ensure_ascii=False)}"


# --- the command ------------------------------------------------------------------------------------------------------


def command(argv: Sequence[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(HELP)
        return 0
    values = flags.FlagValues()
    flags.DEFINE_integer("rows", None, "how many rows", flag_values=values)
    flags.DEFINE_integer("step", None, "the optimizer step whose rows are shown", flag_values=values)
    flags.DEFINE_boolean("templates", False, "show phrasings instead of rows", flag_values=values)
    flags.DEFINE_string("html", None, "write a page there", flag_values=values)
    flags.DEFINE_string("json", None, "write the rows there", flag_values=values)
    flags.DEFINE_bool("mixture", False, "show the shares of the sources", flag_values=values)
    run = freeze.load(argv, values)
    if values.mixture and (unused := [name for name in ("rows", "step", "html") if values[name].value is not None]):
        raise freeze.Fault(f"--{unused[0]}: is about rows; leave it out, or leave out --mixture")
    console = Console()
    if values.templates:
        showing.print_templates(run, console, visible=visible)
        return 0
    data = prepared(run)
    loader = plan(run, data)
    if values.mixture:
        told = manifest.manifest(data, loader)
        if values.json:
            _save(values.json, json.dumps(told, indent=1) + "\n")
        else:
            table.show(told, console)
        return 0
    numbers = chosen(loader, rows_per_step=run.rows, rows=values.rows, step=values.step)
    rows = list(read(loader, data, numbers, rows_per_step=run.rows))
    words = about(run, data, loader, values.step)
    if values.html:
        _save(values.html, as_page(rows, words, data.tokenizer))
    if values.json:
        _save(values.json, json.dumps([as_json(row) for row in rows], indent=1) + "\n")
    if not values.html and not values.json:
        console.print(words, highlight=False, markup=False)
        print_rows(rows, console)
    return 0


def about(run: Run, data: Data, loader: Loader, step: int | None) -> str:
    """A few lines about the rows: how full, what was dropped, and the digest that names a step's examples in metrics.jsonl."""
    report = loader.report()
    words = (
        f"{report['examples']:,} examples in {report['num_rows']:,} rows of {run.length}, {run.rows} rows a step; "
        f"fill {percent(report['fill'])}, {percent(report['trained_share'])} of the tokens are learned."
    )
    digest = [f"Step {step}: example_ids {loader.digest(step - 1)}."] if step else []
    return "\n".join([words, *data.notes(), *digest])


def prepared(run: Run) -> Data:
    """The data of the run, encoded or from the cache, with a word on what goes on."""
    console = Console(stderr=True)
    with console.status("opening the data") as status:
        return prepare.prepare(run, progress=lambda what, done, total: status.update(f"{what}: {done:,} of {total:,}"))


def _save(path: str, text: str) -> None:
    write_whole(Path(path), text)
    print(path)


if __name__ == "__main__":
    cli.run(command)
