"""The fastest way to run a step that fits: rows x micro-batches x rematerialisation x mesh, ordered by shapes, proved by compiling.

Rows of a step, and so what is learned, stay as the config has them.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itjax import cli
from itjax.base.schema import REMAT, Parallel
from itjax.parallel.mesh import AXES
from itjax.planning.advice import Estimate, config_lines, estimate
from itjax.planning.case import Case, Measured, measure
from itjax.planning.refusals import undivided
from itjax.planning.roofline import Load

MOST_TENSOR = 8  # ways to split the inside of layers: beyond, devices wait for each other at every product


@dataclass(frozen=True)
class Tried:
    """A candidate that was compiled."""

    case: Case
    estimate: Estimate
    measured: Measured

    def settings(self) -> Mapping[str, Any]:
        """What to say for it on the command line."""
        run = self.case.run
        mesh = {f"parallel__{axis}": size for axis, size in self.case.mesh.shape.items()}
        return {"rows": run.rows, "accumulate": run.accumulate, "remat": run.remat, **mesh}

    @property
    def lines(self) -> str:
        return config_lines(self.settings())


def search(
    case: Case, load: Load, *, limit: float, folder: Path, seconds: float, told: Callable[[str], None]
) -> tuple[Tried | None, list[Tried]]:
    """The fastest candidate that compiles within the limit, by its roofline, and all that were compiled.

    After each compile the estimates of the others are corrected by what it showed. None is begun when `seconds` are over.
    """
    began = time.monotonic()
    left = sorted(((one, estimate(one, load)) for one in candidates(case)), key=lambda pair: pair[1].order)
    told(f"{len(left)} ways to run it divide evenly")
    tried: list[Tried] = []
    while left and (not tried or time.monotonic() - began < seconds):
        chosen = _next(left, tried, limit)
        if chosen is None:
            break
        left.remove(chosen)
        one, expected = chosen
        told(f"compiling {config_lines(_short(one))}")
        try:
            tried.append(Tried(one, expected, measure(one, folder=folder)))
        except ValueError as error:  # a kernel that is asked for refuses this mesh
            if not cli.is_message(error):
                raise
            told(f"not possible: {error}")
            continue
        if fits(tried[-1].measured, limit):
            return tried[-1], tried
    return None, tried


def fits(measured: Measured, limit: float) -> bool:
    return measured.compiles and measured.peak <= limit and not measured.remade


def candidates(case: Case) -> Iterator[Case]:
    """Every mesh and number of micro-batches that divides evenly, with every rematerialisation."""
    for parallel in meshes(case):
        try:
            there = case.on(parallel)
        except (NotImplementedError, ValueError):  # no such mesh on this torus
            continue
        for accumulate in _divisors(case.run.rows):
            one = dataclasses.replace(there, run=dataclasses.replace(there.run, accumulate=accumulate))
            if not any(undivided(one.run, one.config, dict(one.mesh.shape))):
                yield from (one if name == one.run.remat else one.but(remat=name) for name in REMAT)


def meshes(case: Case) -> Iterator[Parallel]:
    """Sizes of axes that multiply to the number of devices. Positions are only split where rows are fewer than devices, or
    where the config does it; experts and the inside of layers in as many ways as there are, within bounds."""
    config, sizes = case.config, dict(case.mesh.shape)
    experts = config.experts.number if config.experts else 1
    contexts = _divisors(case.num_devices) if case.run.rows < case.num_devices else [sizes["context"]]
    choices = {
        "expert": [size for size in _divisors(experts) if size in (1, sizes["expert"]) or size == min(experts, 8)],
        "context": contexts,
        "tensor": [size for size in _divisors(config.heads) if size <= MOST_TENSOR],
    }
    for expert, context, tensor in itertools.product(*choices.values()):
        rest, odd = divmod(case.num_devices, expert * context * tensor)
        if odd or not rest:
            continue
        for fsdp in _divisors(rest):
            made: dict[str, Any] = dict(zip(AXES, (rest // fsdp, fsdp, expert, context, tensor), strict=True))
            yield dataclasses.replace(case.run.parallel, **made)


def _next(left: Sequence[tuple[Case, Estimate]], tried: Sequence[Tried], limit: float) -> tuple[Case, Estimate] | None:
    """The fastest that should fit; of none that should, the smallest, once."""
    for one, expected in left:
        if expected.total + beyond(tried, one) <= limit:
            return one, expected
    smallest = min(left, key=lambda pair: pair[1].total)
    known_too_large = [one for one in tried if one.measured.peak > limit and one.estimate.total <= smallest[1].total]
    return None if known_too_large else smallest


def beyond(tried: Sequence[Tried], case: Case) -> float:
    """What the compiler needed more than the shapes say, of the tried candidate that is most like this one."""
    if not tried:
        return 0.0

    def likeness(one: Tried) -> tuple[bool, bool]:
        return one.case.run.remat == case.run.remat, dict(one.case.mesh.shape) == dict(case.mesh.shape)

    nearest = max(tried, key=likeness)
    return nearest.measured.peak - nearest.estimate.total


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _short(case: Case) -> dict[str, Any]:
    mesh = {f"parallel__{axis}": size for axis, size in case.mesh.shape.items() if size > 1}
    return {"accumulate": case.run.accumulate, "remat": case.run.remat, **mesh}
