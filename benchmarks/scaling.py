"""The same step on more and more devices that are absent: bytes of a device, bytes that it is sent, the bound of its time.

python -m benchmarks.scaling --chip=v5p --chips=16,64,256,1024 --config=configs/sft_llama31_8b.py
python -m benchmarks.scaling --chip=v5p --chips=16 --config=configs/sft_llama32_1b.py --rows=2 -- --config.parallel.tensor=2
python -m benchmarks.scaling --presets

Each number of devices is a plan of its own, `python -m itjax.plan --no_data`, with so many rows for each. Writes what was found
to benchmarks/results/scaling.json, beside what was there for other chips and configs, and the table of all to docs/scaling.md.
With --presets: presets on the machines that they are for, to benchmarks/results/plans.json and the first table of the page.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "scaling.md"
RESULTS, PLANS = FOLDER / "scaling.json", FOLDER / "plans.json"
PRESETS = [  # config, devices, settings
    ("sft_llama31_8b", "v5e:16x16", ["rows=256"]),
    ("sft_llama31_8b", "v6e:16x16", ["rows=256"]),
    ("sft_llama31_8b", "v5p:4x4x4", ["rows=64"]),
    ("sft_llama31_8b", "v5p:4x4x4", ["rows=64", "parallel.data=4"]),
    ("sft_llama31_8b", "h200:8", []),
    ("sft_llama31_70b", "v5p:8x8x8", ["rows=512", "parallel.data=8"]),
    ("sft_llama31_70b", "h100:16x8", ["rows=128"]),
    ("sft_qwen3_30b_a3b", "v5p:4x4x4", []),
    ("sft_qwen3_30b_a3b", "h100:2x8", ["rows=32"]),
    ("sft_llama31_8b_128k", "v5p:4x4x4", []),
    ("sft_llama31_8b_128k", "h200:8x8", []),
]
FITS, DOES_NOT = 0, 3
SLICES = {  # devices -> shape of the slice they come in
    "flat": {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "cube": {
        8: "2x2x2",
        16: "2x2x4",
        32: "2x4x4",
        64: "4x4x4",
        128: "4x4x8",
        256: "4x8x8",
        512: "8x8x8",
        1024: "8x8x16",
    },
}
LARGEST_FLAT, NODE = 256, 8
SHORT = {"all-gather": "gather", "all-reduce": "reduce", "reduce-scatter": "scatter", "all-to-all": "all to all",
         "collective-permute": "permute"}  # fmt: skip

TEXT = """# Scaling

What a device needs and is sent as there are more of them, the rows of each staying as they are. Nothing here ran: each line is
the train step of a config, compiled for so many devices by `itjax.plan`, which [plan.md](plan.md) explains. Time is the
roofline's, so a bound and not a promise. This page is written by

    python -m benchmarks.scaling --chip=v5p --chips=16,64,256,1024 --config=configs/sft_llama31_8b.py

    python -m benchmarks.scaling --presets

from `benchmarks/results/scaling.json` and `plans.json`.

{tables}
A device that is sent the same bytes per token whatever their number scales; what it is sent per step over its link's rate is
the time below which no step can be. Next: [plan.md](plan.md), one run on one machine.
"""


def devices(chip: str, count: int) -> str:
    """How `--devices` names so many of a chip."""
    if chip[0] != "v":
        return f"{chip}:{count}" if count <= NODE else f"{chip}:{count // NODE}x{NODE}"
    kind = "flat" if chip in ("v5e", "v6e") else "cube"
    slices = max(1, count // LARGEST_FLAT) if kind == "flat" else 1
    shapes = SLICES[kind]
    if count // slices not in shapes:
        raise SystemExit(f"--chips={count}: {chip} comes in {', '.join(map(str, shapes))}")
    return f"{slices}*{chip}:{shapes[count // slices]}" if slices > 1 else f"{chip}:{shapes[count]}"


def planned(name: str, config: str, more: Sequence[str]) -> dict[str, Any]:
    """One line of a table: a config with some settings on devices of this name."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "itjax.plan", f"--config={config}", f"--devices={name}", "--no_data"]
        command += [f"--json={out}", *more]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
        if done.returncode not in (FITS, DOES_NOT):
            raise SystemExit(done.returncode)
        return line(json.loads(out.read_text()), config=config, more=more)


def line(plan: Mapping[str, Any], *, config: str, more: Sequence[str]) -> dict[str, Any]:
    """What of a plan is kept."""
    names = ("target", "devices", "device_kind", "mesh", "fits", "bytes_per_device", "step_seconds_at_least", "bound_by",
             "mfu_at_most", "compile_seconds", "versions")  # fmt: skip
    per_token = {kind: size / plan["tokens_per_step"] for kind, size in plan["collective_bytes_per_step"].items()}
    return {
        "config": config,
        "settings": list(more),
        **{name: plan[name] for name in names},
        "tokens_per_step": plan["tokens_per_step"],
        "received_per_token": per_token,
    }


def merged(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """New lines take the place of old ones of the same config, settings and devices."""

    def key(entry: Mapping[str, Any]) -> tuple[Any, ...]:
        return entry["config"], tuple(entry["settings"]), entry["device_kind"], entry["devices"]

    return [
        lines for _, lines in sorted({key(entry): entry for entry in (*old, *new)}.items(), key=lambda pair: pair[0])
    ]


def written() -> None:
    """docs/scaling.md from all that was found so far."""
    presets, entries = (json.loads(path.read_text()) if path.exists() else [] for path in (PLANS, RESULTS))
    PAGE.write_text(page(entries, presets))


def page(entries: Sequence[Mapping[str, Any]], presets: Sequence[Mapping[str, Any]]) -> str:
    """A table of presets, and one for each config and chip."""
    titles = dict.fromkeys((entry["config"], tuple(entry["settings"]), entry["device_kind"]) for entry in entries)
    tables = []
    for config, settings, kind in titles:
        lines = [
            e for e in entries if (e["config"], tuple(e["settings"]), e["device_kind"]) == (config, settings, kind)
        ]
        tables.append(table(f"{config} on {kind}" + (f", {' '.join(settings)}" if settings else ""), lines))
    if presets:
        tables.insert(0, table("Presets on the machines that they are for", presets, named=True))
    return TEXT.format(tables="\n".join(tables))


def table(title: str, entries: Sequence[Mapping[str, Any]], *, named: bool = False) -> str:
    """`named`: each line begins with its config, settings and devices."""
    kinds = sorted({kind for entry in entries for kind in entry["received_per_token"]})
    head = [
        *(["config", "settings", "target"] if named else []),
        "devices",
        "mesh",
        "state",
        "peak",
        "of",
        *(f"{SHORT[kind]}" for kind in kinds),
        "step ≥",
        "by",
        "MFU ≤",
        "compiled in",
    ]
    lines = [f"## {title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join([*(_name(entry) if named else []), *_cells(entry, kinds)])} |" for entry in entries]
    return (
        "\n".join(lines)
        + "\n\nState, peak and limit are GiB of a device; then bytes that all devices together are sent per token, by kind.\n"
    )


def _name(entry: Mapping[str, Any]) -> list[str]:
    settings = [setting.removeprefix("--config.") for setting in entry["settings"]]
    return [f"`{Path(entry['config']).stem}`", ", ".join(settings), entry["target"]]


def _cells(entry: Mapping[str, Any], kinds: Sequence[str]) -> list[str]:
    sizes = entry["bytes_per_device"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in entry["mesh"].items() if size > 1)
    state = sizes["parameters"] + sizes["optimizer"] + sizes["frozen"]
    step = entry["step_seconds_at_least"]
    return [
        str(entry["devices"]),
        mesh,
        _gib(state),
        _gib(sizes["peak"]) + ("" if entry["fits"] else " (no)"),
        _gib(sizes["limit"]),
        *(f"{entry['received_per_token'].get(kind, 0) * entry['devices']:,.0f}" for kind in kinds),
        f"{step:.3g} s" if step else "",
        entry["bound_by"] or "",
        f"{entry['mfu_at_most']:.0%}" if entry["mfu_at_most"] else "",
        f"{entry['compile_seconds']:.0f} s" if entry["compile_seconds"] else "",
    ]


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--presets", action="store_true", help="the presets, instead of one config on more and more devices"
    )
    parser.add_argument("--chip")
    parser.add_argument("--chips", help="how many, separated by commas")
    parser.add_argument("--config")
    parser.add_argument("--rows", type=int, default=1, help="rows for each device in a step (1)")
    parser.add_argument("more", nargs="*", help="further settings, behind --")
    arguments = parser.parse_args()
    if arguments.presets:
        plans: list[dict[str, Any]] = []
        for config, name, settings in PRESETS:
            plans.append(planned(name, f"configs/{config}.py", [f"--config.{setting}" for setting in settings]))
            PLANS.write_text(json.dumps(plans, indent=2) + "\n")
            written()
        return
    if not (arguments.chip and arguments.chips and arguments.config):
        parser.error("give --chip, --chips and --config, or --presets")
    for count in map(int, arguments.chips.split(",")):
        more = [f"--config.rows={arguments.rows * count}", *arguments.more]
        found = planned(devices(arguments.chip, count), arguments.config, more) | {"settings": arguments.more}
        old = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        RESULTS.write_text(json.dumps(merged(old, [found]), indent=2) + "\n")
        written()


if __name__ == "__main__":
    main()
