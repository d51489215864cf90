"""What a run will need on devices that you do not have: its own train step, compiled for them, and read.

    python -m itjax.plan --config=configs/sft_llama31_8b.py --devices=v5p:4x4x4

Exit 0 when it fits, 3 when not, and then the last line says why. docs/plan.md says where each number is from.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from itjax import cli
from itjax.base import freeze
from itjax.base.files import write_whole
from itjax.base.schema import Run

if TYPE_CHECKING:
    from rich.console import Console

    from itjax.parallel.topology import Target
    from itjax.planning.made import Plan

DOES_NOT_FIT = 3
STEPS = 1000  # of a run without data: the number is in the program, as the schedule ends there

HELP = """Say what a run will need, on devices that you do not have.

    python -m itjax.plan --config=configs/sft_llama31_8b.py --devices=v5p:4x4x4

  --devices=D   v5e:16x16, v5p:4x4x4, v6e:16x16; 2*v5e:16x16 (slices); h100:8, h200:8x16 (nodes x GPUs); cpu:8
  --json=OUT    write the plan there, as data
  --fit         look for the fastest micro-batches, remat and mesh that fit, and print them as settings
  --advise      compile what is suggested, instead of computing its effect from shapes
  --minutes=N   begin no further program after N minutes of --fit or --advise (8)
  --price=P     dollars for a device and an hour
  --no_data     do not read data: full rows, and the vocabulary of the model itself

Exit 3 when it does not fit, when nothing is trained, when an axis of the mesh does not divide.
"""


def command(argv: Sequence[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(HELP)
        return 0
    values = _flags()
    run = freeze.load(argv, values, needs_data=False)
    if not values.devices:
        raise freeze.Fault("--devices: missing; say for what, e.g. --devices=v5p:4x4x4, h100:8 or cpu:8")
    from rich.console import Console  # here and below, so that --help and mistakes in the config answer at once

    from itjax.parallel import topology

    topology.prepare(values.devices)  # before jax looks for devices of its own
    from itjax.planning import page
    from itjax.planning.made import refused

    console, notes = Console(highlight=False), Console(stderr=True, highlight=False)
    target = topology.target(values.devices)
    if reasons := untrained(run):
        console.print(f"No: {'; '.join(reasons)}", style="bold red", soft_wrap=True)
        found, fits = refused(target, reasons), False
    else:
        plan = made(run, target, values, notes)
        page.show(plan, console)
        found, fits = plan.as_json(), plan.fits
    if values.json:
        write_whole(Path(values.json), json.dumps(found, indent=2) + "\n")
    return 0 if fits else DOES_NOT_FIT


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("devices", "", "for what", flag_values=values)
    flags.DEFINE_string("json", None, "write the plan there", flag_values=values)
    flags.DEFINE_boolean("fit", False, "look for the fastest that fits", flag_values=values)
    flags.DEFINE_boolean("advise", False, "compile what is suggested", flag_values=values)
    flags.DEFINE_float("minutes", 8.0, "begin no further program after", lower_bound=0.0, flag_values=values)
    flags.DEFINE_float("price", None, "dollars for a device and an hour", lower_bound=0.0, flag_values=values)
    flags.DEFINE_boolean("no_data", False, "do not read data", flag_values=values)
    return values


def untrained(run: Run) -> list[str]:
    """Why nothing of the run's model would be trained; empty where something is."""
    from itjax import parts
    from itjax.planning import refusals

    folder = parts.model_folder(run)
    config = parts.model_config(run, folder.config.vocab if folder else 1, folder)
    return list(refusals.untrained(parts.with_adapter(run, config), config))


def made(run: Run, target: "Target", values: flags.FlagValues, notes: "Console") -> "Plan":
    """The plan of a run for devices. Raises ValueError for what a user can mend."""
    from itjax import parts
    from itjax.planning import making
    from itjax.planning.case import case_of

    parts.check_model(run)
    data = loader = None
    if not values.no_data and (run.files or run.sources):
        data = parts.prepare_data(run, console=notes)
        loader = making.whole_loader(run, data)
    num_steps = loader.num_steps if loader else run.steps or STEPS
    case = case_of(run, data.tokenizer.size if data else None, target, num_steps=num_steps)
    wishes = making.Wishes(values.fit, values.advise, 60 * values.minutes, values.price)
    return making.make(case, loader, wishes, notes)


if __name__ == "__main__":
    cli.run(command)
