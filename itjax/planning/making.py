"""The way of a plan: what speaks against it at once, the compiler's word, what bounds the time, what to change."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from itjax.base.chips import MEM_FRACTION
from itjax.base.schema import Run
from itjax.data import cache, prepare
from itjax.data.loader import Loader
from itjax.data.prepare import Data
from itjax.models import lora
from itjax.planning import advice, fit, memory, refusals, roofline
from itjax.planning.case import Case, Measured, measure
from itjax.planning.made import Plan
from itjax.planning.page import gib
from itjax.planning.roofline import Load, Traffic

LOOKED_AT = 16  # steps whose lengths of examples are counted, evenly spread


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What a plan is asked to do besides looking at the run as it is."""

    fit: bool = False
    advise: bool = False
    seconds: float = 480.0  # after which no further program is begun
    price: float | None = None  # of a device for an hour


def make(case: Case, loader: Loader | None, wishes: Wishes, notes: Console) -> Plan:
    load = load_of(case.run, loader)
    folder = (Path(case.run.cache_dir) if case.run.cache_dir else cache.default_dir()) / "plans"

    def told(line: str) -> None:
        notes.print(line, soft_wrap=True, style="dim")

    if wishes.fit:
        return _fitted(case, loader, load, wishes, folder=folder, told=told)
    reasons, measured = refusals.refusals(case), None
    if not reasons:
        told(f"compiling the step for {case.target.name}")
        measured = measure(case, folder=folder)
    plan = _plan(case, loader, load, measured, reasons, wishes)
    if measured is None:
        return plan
    found = advice.suggestions(case, load, peak=measured.peak, limit=plan.limit)
    if wishes.advise:
        found = advice.compiled(found, folder=folder, seconds=wishes.seconds, told=told)
    return dataclasses.replace(plan, suggestions=found)


def _fitted(case: Case, loader: Loader | None, load: Load, wishes: Wishes, *, folder: Path, told: Any) -> Plan:
    limit = limit_of(case)
    chosen, tried = fit.search(
        case, load, limit=limit or float("inf"), folder=folder, seconds=wishes.seconds, told=told
    )
    if chosen is not None:
        plan = _plan(chosen.case, loader, load, chosen.measured, [], wishes)
        return dataclasses.replace(plan, fitted=chosen.lines, tried=[_tried(one) for one in tried])
    if not tried:
        parts = case.num_devices
        reason = (
            f"no mesh of {parts} devices divides {case.run.rows} rows, {case.config.heads} heads and the experts there are; "
            f"set config.rows to a multiple of {parts}"
        )
        return _plan(case, loader, load, None, [reason], wishes)
    nearest = min(tried, key=lambda one: one.measured.peak)
    reason = (
        f"none of {len(tried)} compiled fits; the nearest needs {gib(nearest.measured.peak)} of {gib(limit or 0)}: "
        f"{nearest.lines}"
    )
    plan = _plan(nearest.case, loader, load, nearest.measured, [reason], wishes)
    return dataclasses.replace(plan, tried=[_tried(one) for one in tried])


def _tried(one: fit.Tried) -> dict[str, Any]:
    return {
        "set": one.lines,
        "peak": one.measured.peak,
        "peak_by_shapes": round(one.estimate.total),
        "step_seconds_at_least": one.estimate.seconds,
        "compile_seconds": one.measured.seconds,
    }


def _plan(
    case: Case, loader: Loader | None, load: Load, measured: Measured | None, reasons: Sequence[str], wishes: Wishes
) -> Plan:
    """Everything that follows from a case and what its compiler said."""
    limit, state = limit_of(case), memory.state(case)
    remade = measured.remade if measured else ()
    against = [*reasons, *_too_large(measured, limit), *(f"involuntary rematerialisation: {line}" for line in remade)]
    if any(refusals.undivided(case.run, case.config, dict(case.mesh.shape))):
        of_parts: dict[str, float] = {
            "parameters": state.parameters,
            "optimizer": state.optimizer,
            "frozen": state.frozen,
        }
        activations = 0.0
    else:
        of_parts = memory.parts(case, advice.kept_of(case))
        activations = of_parts["activations"]
    flops, bound = roofline.products(case, load), None
    if measured is not None and measured.compiles:
        inside = sum(measured.received.values()) - measured.crossing
        moved = roofline.memory_traffic(case, state, activations)
        bound = roofline.bound(
            case.target, flops, Traffic(inside, measured.crossing), moved, hosted=advice.hosted(case)
        )
    moves, _ = lora.split(case.model.abstract, case.compiled.moves)
    return Plan(
        case=case,
        load=load,
        report=loader.report() if loader else None,
        num_parameters=lora.num_parameters(case.model.abstract),
        num_trained=lora.num_parameters(moves),
        state=state,
        parts=of_parts,
        dominates=memory.dominates(of_parts, measured.peak - memory.total(of_parts) if measured else 0.0),
        limit=measured.limit if measured and measured.limit else limit,
        products=flops,
        measured=measured,
        bound=bound,
        reasons=against,
        warnings=[*refusals.wasted(case), *(measured.notes if measured else ())],
        price=wishes.price,
    )


def _too_large(measured: Measured | None, limit: float | None) -> Sequence[str]:
    if measured is None or (measured.compiles and (limit is None or measured.peak <= limit)):
        return []
    allowed = measured.limit or limit or 0
    return [f"a device needs {gib(measured.peak)} and has {gib(allowed)}, {gib(measured.peak - allowed)} too little"]


def limit_of(case: Case) -> float | None:
    """Bytes of a device that a program can have; None where its memory is not known."""
    given = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    return case.target.chip.limit(float(given) if given else MEM_FRACTION)


def whole_loader(run: Run, data: Data) -> Loader:
    """The loader of the run, for one process that has all rows."""
    return prepare.loader(run, data, local_rows=range(run.rows), workers=0)


def load_of(run: Run, loader: Loader | None) -> Load:
    """The work of a step, of the data if there is any."""
    positions = run.rows * run.length
    if loader is None:
        return Load([[run.length] * run.rows], positions, float(positions))
    steps = sorted({round(part * (loader.num_steps - 1) / LOOKED_AT) for part in range(LOOKED_AT + 1)})
    report = loader.report()
    return Load(
        [loader.lengths(step).tolist() for step in steps], positions, report["trained_tokens"] / loader.num_steps
    )
