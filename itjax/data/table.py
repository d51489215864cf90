"""A manifest as tables for a terminal: what each source was planned to be of the run, and what it is.

source   kept/read   epochs   examples        tokens          trained tokens
mails    980/1,000     2.04   50.0% → 50.1%   88.9% → 88.7%   91.2% → 91.1%
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from itjax.base.schema import UNITS

MANY = 24  # sources that are a line each; of more, those of a large group are one line together
FOUND = ("masked", "tagged")  # by the filters, besides what they dropped
NAME = 11  # characters of a source's name that stand in one line, however narrow the terminal
LARGE = 8  # sources of a large group


def show(told: Mapping[str, Any], console: Console) -> None:
    """Prints the mixture of a run: the rule, the shares, stage by stage where it has any, and what to look at."""
    for part in parts(told):
        console.print(part)


def parts(told: Mapping[str, Any]) -> Iterator[RenderableType]:
    plan = told["plan"]
    yield Text(_head(plan), style="bold")
    yield Text(
        f"{plan['examples']:,} examples, {plan['tokens']:,} tokens ({plan['trained_share']:.1%} trained) in "
        f"{plan['num_rows']:,} rows, {plan['num_steps']:,} steps, {plan['epochs']:.2f} epochs; fill {plan['fill']:.1%}"
    )
    yield _sources(told["sources"], plan["unit"])
    for stage in told["stages"]:
        yield _stage(stage, plan["unit"])
    for name, source in told["sources"].items():
        if lost := _lost(source):
            yield Text(f"{name}: {lost}", style="dim")
    for name, source in told["filters"].items():
        if found := [f"{n:,} {what}: {why}" for what in FOUND for why, n in source[what].items()]:
            yield Text(f"{name}: {', '.join(found)}", style="dim")
    for warning in told["warnings"]:
        yield Text("! " + warning, style="yellow")


def _head(plan: Mapping[str, Any]) -> str:
    return f"{plan['rule']}. Weights are shares of the {plan['unit'].replace('_', ' ')}."


def _sources(sources: Mapping[str, Any], unit: str) -> Table:
    table = _table("", ("kept/read", "epochs"), unit)
    for name, source in _lines(sources):
        kept = f"{source['kept']:,}/{source['kept'] + sum(source['dropped'].values()):,}"
        table.add_row(Text(name), kept, _epochs(source), *_shares(source))
    return table


def _stage(stage: Mapping[str, Any], unit: str) -> Table:
    steps = f"steps {stage['first_step']:,} to {stage['last_step']:,}"
    table = _table(f"{stage['stage'] or 'before the first stage'}, {steps}", ("drawn",), unit)
    for name, source in _lines(stage["sources"]):
        table.add_row(Text(name), f"{source['examples']:,}", *_shares(source))
    return table


def _table(title: str, counts: tuple[str, ...], unit: str) -> Table:
    table = Table(title=title or None, title_justify="left", caption="planned → realised", box=None, pad_edge=False)
    table.add_column("source", overflow="fold", min_width=NAME)
    for name in (*counts, *UNITS):
        words = name == "epochs"  # these may go on in a second line, so that names need not
        table.add_column(
            name.replace("_", " "), justify="right", style="bold" if name == unit else "", no_wrap=not words
        )
    return table


def _lines(sources: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The sources; where they are very many, those of a large group together: `tasks/files (60 sources)`."""
    sizes = Counter(_group(name) for name in sources)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name, source in sources.items():
        is_large = len(sources) > MANY and sizes[_group(name)] > LARGE
        groups.setdefault(_group(name) or "all" if is_large else name, []).append(source)
    for name, members in groups.items():
        yield (name, members[0]) if len(members) == 1 else (f"{name} ({len(members)} sources)", _together(members))


def _group(name: str) -> str:
    return name.rpartition("/")[0]


def _together(members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What sources are together; their epochs are those of a passage through all of them."""
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for member in members:
        counts.update({name: member.get(name, 0) for name in ("kept", "examples")})
        dropped.update(member.get("dropped", {}))
    once = sum(member["examples"] / member["epochs"] for member in members if member.get("epochs"))
    shares = {
        field: {unit: sum(member[field][unit] for member in members) for unit in UNITS}
        for field in ("planned_share", "realised_share")
    }
    return {
        **counts,
        **shares,
        "dropped": dropped,
        "epochs": counts["examples"] / once if once else 0.0,
        "max_epochs": None,
        "editions": 1,
    }


def _epochs(source: Mapping[str, Any]) -> str:
    words = f"{source['epochs']:.2f}"
    words += f" of {source['max_epochs']:g}" if source["max_epochs"] is not None else ""
    return words + (f" in {source['editions']} phrasings" if source["editions"] > 1 else "")


def _shares(source: Mapping[str, Any]) -> list[str]:
    planned, realised = source["planned_share"], source["realised_share"]
    return [f"{planned[unit]:.1%} → {realised[unit]:.1%}" for unit in UNITS]


def _lost(source: Mapping[str, Any]) -> str:
    """Rows that were dropped, by reason, or cut."""
    found = [f"{count:,} dropped: {reason}" for reason, count in source["dropped"].items() if count]
    return ", ".join([*found, *([f"{source['truncated']:,} truncated"] if source["truncated"] else [])])
