"""What `show --templates` prints: a row of each source in the words of every phrasing that it may be asked in.

reviews · kind classification · data/reviews.jsonl:1
terse                                    seen
    user       Came late, box open. -> complaint, praise or question?
    assistant  complaint
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from itjax.base.schema import Run, Source
from itjax.data import phrase, sources, templates
from itjax.data.fields import Field, say_calls, say_json
from itjax.data.tasks import FAMILIES, TaskSource
from itjax.data.templates import Family, Sample

STYLES = {"system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow"}


class Asked(NamedTuple):
    """A source that is asked in phrasings, with one of its rows."""

    source: str
    family: Family
    row: Mapping[str, Any]
    key: str
    columns: Mapping[str, str]


def asked(run: Run) -> Iterator[Asked]:
    """The sources of a run whose rows are put into words, each with its first row."""
    for name, source in _sources(run.sources, ""):
        if source.task:
            yield _task(name, source, run)
        elif source.kind or source.templates:
            place = f"config.sources.{name.replace('/', '.sources.')}"
            family = phrase.family_of(source, place=place)
            rows = sources.open_files(
                source.files,
                columns=source.columns,
                shape=source.shape,
                data_dir=run.data_dir,
                cache_dir=Path(run.cache_dir) if run.cache_dir else None,
                place=f"{place}.files",
            )[0]
            yield Asked(name, family, rows.row(0), rows.key(0), {})


def print_templates(run: Run, console: Console, *, visible: Callable[[str], str]) -> None:
    """All phrasings of all sources of a run; `visible` makes what hides in data be seen."""
    count = 0
    for one in asked(run):
        console.rule(Text(f"{one.source} · {one.family.name} · {one.key}", style="bold"), align="left", style="dim")
        made = templates.samples(
            one.family, one.row, columns=one.columns, source=one.source, key=one.key, seed=run.seed
        )
        for sample in made:
            _print_sample(sample, console, visible)
            count += 1
        for name, reason in one.family.refused.items():
            console.print(Text(visible(f"{name}: left out: {reason}"), style="red"))
    if not count:
        console.print("No source of this run is asked in phrasings. Give one a task, a kind or templates.")


def _sources(named: Mapping[str, Source], above: str) -> Iterator[tuple[str, Source]]:
    for name, source in named.items():
        yield f"{above}{name}", source
        yield from _sources(source.sources, f"{above}{name}/")


def _task(name: str, source: Source, run: Run) -> Asked:
    rows = TaskSource(source.task, examples=1, seed=run.seed, split="eval", phrasings="all")
    row = rows[0]
    family = Family(source.task, FAMILIES[source.task].templates, {field: Field() for field in row})
    return Asked(name, family, row, rows.key(0), {})


def _print_sample(sample: Sample, console: Console, visible: Callable[[str], str]) -> None:
    template = sample.template
    tags = [tag for tag in template.tags if tag != "held_out"]
    split = "held out" if template.heldout else "seen"
    console.print(Text(template.name, style="bold") + Text(f"  {', '.join([split, *tags])}", style="dim"))
    if sample.conversation is None:
        console.print(Padding(Text(visible(f"not for this row: {sample.reason}"), style="red"), (0, 0, 1, 4)))
        return
    turns = Table.grid(padding=(0, 2))
    for tool in sample.conversation.tools:
        turns.add_row(Text("function", style="yellow"), Text(visible(say_json(tool, ""))))
    for message in sample.conversation.messages:
        text = "\n".join(filter(None, (message.content, say_calls(message.tool_calls))))
        turns.add_row(Text(message.role, style=STYLES[message.role]), Text(visible(text)))
    console.print(Padding(turns, (0, 0, 1, 4)))
