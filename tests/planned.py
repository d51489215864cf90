"""Small runs on eight fake devices, to plan."""

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from itjax.base.schema import Architecture, Parallel, Run, Source
from itjax.parallel import topology
from itjax.planning import making
from itjax.planning.case import Case, case_of, changed
from itjax.planning.made import Plan
from itjax.planning.making import Wishes
from tests.contract import runs

SILENT = Console(quiet=True)
FSDP, DATA = Parallel(data=1, fsdp=-1), Parallel(data=-1)
SMALL = Architecture(layers=1, dim=32, heads=2, kv_heads=2, head_size=16, ffn=64)


def case(*, devices: str = "cpu:8", memory: int | None = None, parallel: Parallel = FSDP, **settings: Any) -> Case:
    """A decoder of one layer on eight devices, each with this much memory."""
    target = topology.target(devices)
    if memory is not None:
        target = dataclasses.replace(target, chip=dataclasses.replace(target.chip, memory=memory))
    run = Run(steps=10, rows=8, length=64, architecture=SMALL, parallel=parallel)
    return case_of(changed(run, settings), 512, target, num_steps=10)


def plan(here: Case, wishes: Wishes = Wishes(), *, cache_dir: Path) -> Plan:  # noqa: B008 (frozen)
    here = dataclasses.replace(here, run=dataclasses.replace(here.run, cache_dir=str(cache_dir)))
    return making.make(here, None, wishes, SILENT)


def quickstart(**settings: Any) -> Run:
    """The run that `tests.contract.runs.arguments` says."""
    given = {**runs.SMALL, **{name.replace("__", "."): value for name, value in settings.items()}}
    sources = {name: Source(task=name, examples=12) for name in ("triage", "arithmetic", "functions", "support")}
    of_run = {name.replace(".", "__"): value for name, value in given.items() if not name.startswith("sources.")}
    return changed(Run(sources=sources, split_digits=False), of_run)
