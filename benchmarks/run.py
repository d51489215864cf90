"""Run a suite of benchmarks, show its table and keep the numbers with the machine and versions they belong to.

python -m benchmarks.run --suite data
python -m benchmarks.run --suite data --out benchmarks/results/data.json
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import SEED

SUITES = {  # name -> modules whose results it has
    "attention": ("attention",),
    "audit": ("audit", "audit_rows"),
    "cpu": ("cpu",),
    "data": ("data",),
    "files": ("files",),
    "gpu": ("gpu",),
    "tokenizer": ("tokenizer",),
}
WIDTH = 110  # of the table
PACKAGES = ("numpy", "jax", "jaxlib", "flax", "grain", "optax", "sentencepiece", "tokenizers")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    started = time.perf_counter()
    modules = [importlib.import_module(f"benchmarks.{name}") for name in SUITES[arguments.suite]]
    results = ratios_first([result for module in modules for result in module.results()])
    record = {
        "suite": arguments.suite,
        "git": git_revision(),
        "seed": SEED,
        "seconds": round(time.perf_counter() - started, 1),
        "machine": machine(),
        "versions": versions(),
        "results": results,
    }
    Console(width=WIDTH).print(table(record))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(rounded(record), indent=2) + "\n")


def ratios_first(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ratios survive a change of machine; the absolute numbers below them do not."""
    return sorted(results, key=lambda result: result["unit"] != "ratio")


def machine() -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_revision() -> str:
    """The commit that was measured, marked when files had been changed since."""
    here = Path(__file__).parent
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.stdout.strip()


def table(record: dict[str, Any]) -> Table:
    about = record["machine"]
    shown = Table(
        title=f"{record['suite']}: {about['cpu']}, {about['cores']} cores, revision {record['git']}",
        caption=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    )
    for column in ("what", "unit", "median", "p10", "p90", "n"):
        shown.add_column(column, justify="left" if column in ("what", "unit") else "right")
    for result in record["results"]:
        numbers = (f"{result[name]:.4g}" for name in ("median", "p10", "p90"))
        shown.add_row(result["name"], result["unit"], *numbers, str(result["n"]))
    return shown


def rounded(value: Any) -> Any:
    """Floats to six significant digits, so that a kept result can be read."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
