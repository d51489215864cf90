"""What to change, and what each change would do: computed from shapes at once, or by compiling it."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itjax.base.schema import MOMENTS, REMAT
from itjax.planning import memory, roofline
from itjax.planning.case import Case, measure
from itjax.planning.memory import Kept
from itjax.planning.refusals import undivided
from itjax.planning.roofline import Load

KEPT: dict[tuple[Any, ...], Kept] = {}  # what a kind of step keeps per row; tracing it takes seconds


@dataclass(frozen=True)
class Estimate:
    """A case by its shapes alone."""

    parts: Mapping[str, float]  # bytes on one device
    seconds: float | None  # of a step, at least
    order: tuple[float, ...]  # smaller is faster; also where seconds are not known

    @property
    def total(self) -> float:
        return memory.total(self.parts)

    def faster_than(self, other: "Estimate") -> bool:
        """By more than rounding; where seconds are not known, by FLOPs."""
        return self.order[0] < 0.99 * other.order[0]


@dataclass(frozen=True)
class Suggestion:
    """Other settings, and the peak and time that they lead to."""

    settings: Mapping[str, Any]
    case: Case
    peak: float  # bytes on one device
    seconds: float | None  # of a step, at least
    compiled: bool  # or estimated, from how its shapes differ

    @property
    def lines(self) -> str:
        return config_lines(self.settings)


def config_lines(settings: Mapping[str, Any]) -> str:
    return " ".join(f"--config.{name.replace('__', '.')}={value}" for name, value in settings.items())


def kept_of(case: Case) -> Kept:
    """What the case keeps for the backward pass per row, whatever the mesh."""
    run = case.run
    key = (run.remat, case.dtype, run.attention, run.length, run.lora, case.config, case.platform, run.loss)
    if key not in KEPT:
        KEPT[key] = memory.kept(case)
    return KEPT[key]


def hosted(case: Case) -> float:
    """Bytes that a device sends to its host and back in a step."""
    _, activations = memory.per_device(case, kept_of(case))
    return 2.0 * (activations * case.run.accumulate + memory.state(case).host)


def estimate(case: Case, load: Load) -> Estimate:
    of_rows = kept_of(case)
    parts = memory.parts(case, of_rows)
    flops = roofline.products(case, load)
    traffic = roofline.expected_traffic(case)
    moved = roofline.memory_traffic(case, memory.state(case), parts["activations"])
    bound = roofline.bound(case.target, flops, traffic, moved, hosted=hosted(case))
    others = sum(seconds or 0.0 for seconds in bound.seconds.values())
    first = flops.step if bound.step is None else float(f"{bound.step:.2g}")  # what is as good as equal is equal
    return Estimate(parts, bound.step, (first, others, traffic.link + traffic.network, memory.total(parts)))


def alternatives(case: Case) -> Iterator[Mapping[str, Any]]:
    """Settings that trade memory for time or the other way round, one thing at a time."""
    run, sizes = case.run, dict(case.mesh.shape)
    yield from ({"remat": name} for name in REMAT if name != run.remat)
    for accumulate in (run.accumulate * 2, run.accumulate // 2):
        if accumulate and run.rows % accumulate == 0:
            yield {"accumulate": accumulate}
    if sizes["data"] > 1:
        yield {"parallel__data": 1, "parallel__fsdp": sizes["fsdp"] * sizes["data"]}
    if run.optimizer.kind == "adamw":
        yield from ({"optimizer__moments": name} for name in MOMENTS if name != run.optimizer.moments)
    if not run.optimizer.offload and case.platform == "tpu":  # compiled for absent GPUs nothing is on the host
        yield {"optimizer__offload": True}
    if case.dtype == "float32" and case.platform != "cpu":
        yield {"dtype": "bfloat16"}
    if run.loss.chunk > 256:
        yield {"loss__chunk": run.loss.chunk // 2}
    if run.lora.rank:
        yield from ({"lora__base": name} for name in ("int8", "nf4") if name != run.lora.base)


def suggestions(case: Case, load: Load, *, peak: float, limit: float | None) -> list[Suggestion]:
    """What would help: less memory where the step does not fit, less time where it does. Best first."""
    here = estimate(case, load)
    found = []
    for settings in alternatives(case):
        other = case.but(**settings)
        if any(name.startswith("parallel__") for name in settings):
            other = other.on(other.run.parallel)
        if any(undivided(other.run, other.config, dict(other.mesh.shape))):
            continue
        there = estimate(other, load)
        found.append((there, Suggestion(settings, other, peak + there.total - here.total, there.seconds, False)))
    if limit is not None and peak <= limit:
        chosen = [(there, one) for there, one in found if one.peak <= limit and there.faster_than(here)]
    else:
        chosen = [(there, one) for there, one in found if one.peak < peak]
    chosen.sort(key=lambda pair: (limit is not None and pair[1].peak > limit, pair[0].order))
    return [one for _, one in chosen]


def compiled(
    found: Sequence[Suggestion],
    *,
    folder: Path,
    seconds: float,
    told: Callable[[str], None],
) -> list[Suggestion]:
    """The same, the first of them with what the compiler says; none is begun when `seconds` are over."""
    began, done = time.monotonic(), []
    for one in found:
        if time.monotonic() - began < seconds:
            told(f"compiling {one.lines}")
            measured = measure(one.case, folder=folder)
            one = dataclasses.replace(one, peak=float(measured.peak), compiled=True)
        done.append(one)
    return done
