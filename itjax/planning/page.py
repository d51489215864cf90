"""A plan as a page in the terminal: what it is for, memory, time, what devices send each other, data, what to change, yes or no."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text

from itjax.planning.advice import Suggestion
from itjax.planning.made import Plan

WIDTH = 30  # characters of a bar
SHOWN = 6  # suggestions, at most
MEANS = {
    "products": "the products of matrices",
    "memory": "reading and writing memory",
    "link": "what devices of a slice or node send each other",
    "network": "what slices or nodes send each other",
    "host": "what devices and their hosts send each other",
}


def show(plan: Plan, console: Console) -> None:
    for title, lines in sections(plan):
        if lines:
            console.print(Text(title, style="bold"))
            for line in lines:
                console.print(Text(f"  {line}") if isinstance(line, str) else Text("  ") + line, soft_wrap=True)
            console.print()
    console.print(verdict(plan), soft_wrap=True)


def sections(plan: Plan) -> Iterator[tuple[str, Sequence[str | Text]]]:
    yield heading(plan), _what(plan)
    yield "Memory of a device", _memory(plan)
    yield "Time of a step", _time(plan)
    yield "Between devices", _traffic(plan)
    yield "Data", _data(plan)
    yield (
        "What to change (effects by shapes, where not compiled)" if plan.fitted is None else "Settings",
        _changes(plan),
    )
    yield "Warnings", [Text(line, style="yellow") for line in plan.warnings]


def heading(plan: Plan) -> str:
    run, target = plan.case.run, plan.case.target
    where = f" in {target.slices} slices or nodes" if target.slices > 1 else ""
    return f"{run.model} on {plan.case.num_devices} {target.chip.name} ({target.name}){where}"


def _what(plan: Plan) -> list[str]:
    case = plan.case
    mesh = " x ".join(f"{axis} {size}" for axis, size in case.mesh.shape.items() if size > 1) or "one device"
    micro = f" in {case.run.accumulate} micro-batches" if case.run.accumulate > 1 else ""
    return [
        f"mesh    {mesh}",
        f"step    {case.run.rows} rows of {case.run.length} positions{micro}; remat {case.run.remat}, {case.dtype}",
        f"model   {_count(plan.num_parameters)} parameters, {_count(plan.num_trained)} trained; "
        f"vocabulary {case.config.vocab:,}",
    ]


def _count(number: int) -> str:
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.3g} M"


# --- memory -----------------------------------------------------------------------------------------------------------


def _memory(plan: Plan) -> list[str | Text]:
    lines: list[str | Text] = []
    whole = max(filter(None, (plan.limit, plan.peak, sum(plan.parts.values()))))
    for name, size in plan.parts.items():
        if size:
            lines.append(_bar(name, size, whole))
    if plan.peak is not None:
        over = plan.limit is not None and plan.peak > plan.limit
        lines.append(_bar("peak, by the compiler", plan.peak, whole, style="red" if over else "green"))
    if plan.limit is not None:
        lines.append(f"{'limit':<24}{gib(plan.limit):>12}")
    if plan.measured and plan.measured.host:
        lines.append(f"{'in the host memory':<24}{gib(plan.measured.host):>12}")
    if plan.dominates:
        lines.append(f"Most of it: {plan.dominates}.")
    return lines


def _bar(name: str, size: float, whole: float, *, style: str = "cyan") -> Text:
    length = min(WIDTH, round(WIDTH * size / whole))
    return Text(f"{name:<24}{gib(size):>12}  ") + Text("█" * length, style=style)


def gib(size: float) -> str:
    """`15.2 GiB`; small ones in MiB and KiB."""
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if abs(size) >= 2**power / 10:
            return f"{size / 2**power:,.2f} {unit}"
    return f"{size / 2**10:,.1f} KiB"


# --- time -------------------------------------------------------------------------------------------------------------


def _time(plan: Plan) -> list[str]:
    flops = plan.products
    lines = [
        f"{flops.model:.3g} FLOPs of use to the model, {flops.step:.3g} done (padding, and {flops.again:.3g} once more for remat)"
    ]
    if plan.bound is None:
        return lines
    if plan.bound.step is None:
        return [*lines, f"No bound in seconds: the peak of {plan.case.target.chip.name} is not known."]
    known = ", ".join(
        f"{name} {_seconds(seconds)}" for name, seconds in plan.bound.seconds.items() if seconds is not None
    )
    lines.append(f"at least {_seconds(plan.bound.step)}, by {MEANS[plan.bound.by]}; MFU at most {plan.bound.mfu:.1%}")
    lines.append(f"  ({known})")
    rates = plan.rates()
    lines.append(f"at most {rates.tokens_per_day:.3g} tokens a day")
    if rates.device_hours is not None:
        price = f", {rates.price:,.2f} dollars" if rates.price is not None else ""
        lines.append(f"an epoch: at least {rates.device_hours:,.3g} device hours{price}")
    lines.append("All that is not named overlaps and costs nothing here; real steps are longer.")
    return lines


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _traffic(plan: Plan) -> list[str]:
    if plan.measured is None or not plan.measured.compiles:
        return []
    lines = [
        f"{kind:<24}{gib(size):>12} received by a device in a step" for kind, size in plan.measured.received.items()
    ]
    if plan.measured.crossing:
        lines.append(f"{'of it, over the network':<24}{gib(plan.measured.crossing):>12}")
    return lines


# --- data, advice, verdict --------------------------------------------------------------------------------------------


def _data(plan: Plan) -> list[str]:
    report = plan.report
    if report is None:
        return ["None is named (or --no_data): full rows of one document each, and the vocabulary of the model itself."]
    lines = [
        f"rows {report['fill']:.1%} full; {report['rows_per_epoch']:,.0f} rows and "
        f"{report['rows_per_epoch'] / plan.case.run.rows:,.1f} steps an epoch; {report['trained_share']:.1%} of tokens trained",
        f"{report['num_steps']:,} steps of {report['tokens_per_step']:,.0f} tokens, {report['epochs']:.2f} epochs",
    ]
    for name, source in report["sources"].items():
        lines.append(
            f"{name:<24}{source['share_examples']:>8.1%} of examples {source['share_tokens']:>8.1%} of tokens "
            f"{source['epochs']:>8.2f} epochs"
        )
    return lines


def _changes(plan: Plan) -> list[str | Text]:
    if plan.fitted is not None:
        return [Text(plan.fitted, style="bold")]
    return [_change(one, plan) for one in plan.suggestions[:SHOWN]]


def _change(one: Suggestion, plan: Plan) -> str:
    how = ", compiled" if one.compiled else ""
    effect = gib(one.peak)
    if plan.peak is not None:
        effect += (
            f" ({one.peak - plan.peak:+,.0f})"
            if abs(one.peak - plan.peak) < 1024
            else f" ({_signed(one.peak - plan.peak)})"
        )
    time = ""
    if one.seconds is not None and plan.bound is not None and plan.bound.step:
        time = f", step {one.seconds / plan.bound.step - 1:+.0%}"
    return f"{one.lines:<50} peak {effect}{time}{how}"


def _signed(size: float) -> str:
    return f"{'+' if size > 0 else '-'}{gib(abs(size))}"


def verdict(plan: Plan) -> Text:
    """One line, the last one."""
    if plan.reasons:
        return Text(f"No: {'; '.join(plan.reasons)}", style="bold red")
    room = f": {gib(plan.peak or 0)}" + (
        f" of {gib(plan.limit)} ({(plan.peak or 0) / plan.limit:.0%})" if plan.limit else ""
    )
    return Text(f"It fits{room}", style="bold green")


def stdout() -> Console:
    return Console(highlight=False)
