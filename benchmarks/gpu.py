"""One NVIDIA GPU, measured in one go: every item in a process and a time of its own, what it found written at once.

    python -m benchmarks.gpu                              # everything, about half an hour on one H200
    python -m benchmarks.gpu --items ceiling,attention    # some; what a file has of the others stays
    python -m benchmarks.gpu --dry_run                    # tiny, on a CPU: whether each kind of item runs; minutes

An item that fails, takes all memory or runs out of time is written down as such, and the next one begins. Items are in
gpu_items.py, and come as a suite too: `python -m benchmarks.run --suite gpu`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import SEED
from benchmarks.run import git_revision, machine, rounded, versions

OUT = Path(os.environ.get("OUT", "benchmarks/results")) / "gpu.json"
MEMORY = "0.95"  # of the GPU that jax may take; its own default is 0.75

SECONDS = {  # item -> seconds it may take, in the order of what a machine that goes away at any time should have measured
    "ceiling": 90,
    "agreement": 240,
    "attention": 360,
    "train 1b dots": 150,
    "train 1b attention": 150,
    "train 8b lora attention": 210,
    "train 8b lora full": 210,
    "train 8b full": 300,
    "train 8b moments": 300,
    "verify float32": 150,
    "verify bfloat16": 150,
    "checkpoint": 150,
    "cold start": 200,
    "plan": 400,
}

DRY = ("ceiling", "agreement", "attention", "train 1b dots", "train 8b lora full", "checkpoint", "cold start", "plan")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--items", help="names, with commas between them; all if not given")
    parser.add_argument("--out", type=Path, default=None, help=f"the JSON file that is written, {OUT} if not given")
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes on a CPU")
    arguments = parser.parse_args()
    names = arguments.items.split(",") if arguments.items else list(DRY if arguments.dry_run else SECONDS)
    if unknown := set(names) - set(SECONDS):
        parser.error(f"--items: {', '.join(sorted(unknown))} unknown; known: {', '.join(SECONDS)}")
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or (Path(scratch) / "gpu.json" if arguments.dry_run else OUT)
        failed = [name for name, item in measure(names, out, dry_run=arguments.dry_run) if item["error"]]
    sys.exit(f"{len(names) - len(failed)} of {len(names)} items done; not: {', '.join(failed)}" if failed else 0)


def results() -> list[dict[str, Any]]:
    """For `benchmarks.run`: the lines of all items."""
    return [line for _, item in measure(list(SECONDS), OUT, dry_run=False) for line in item["results"]]


def measure(names: Sequence[str], out: Path, *, dry_run: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Item after item; the file is complete after each of them."""
    record = begun(out)
    for name in names:
        item = run(name, out, dry_run=dry_run)
        record["items"][name] = item
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rounded(record), indent=2) + "\n")
        print(f"{name}: {item['error'] or 'done'}, {item['seconds']:.0f} s", flush=True)
        for line in item["results"]:
            print(f"    {line['name']}: {line['median']:.4g} {line['unit']} ({line['p10']:.4g} to {line['p90']:.4g})")
        yield name, item


def begun(out: Path) -> dict[str, Any]:
    """What the file has of the same commit, or a new record."""
    about = {"suite": "gpu", "git": git_revision(), "seed": SEED, "machine": machine(), "driver": driver()}
    record = {**about, "versions": versions(), "items": {}}
    if out.exists() and (before := json.loads(out.read_text()))["git"] == record["git"]:
        record["items"] = before["items"]
    return record


def driver() -> str:
    ask = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "none"


def run(name: str, record: Path, *, dry_run: bool) -> dict[str, Any]:
    """One item in a process of its own: its lines, its seconds, and what went wrong."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        lines, log = Path(scratch) / "lines.jsonl", Path(scratch) / "log"
        lines.touch()
        asked = [name, str(lines), str(record), str(SECONDS[name])] + ["dry_run"] * dry_run
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu_items", *asked],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(dry_run=dry_run),
                start_new_session=True,
            )
            error = waited(process, SECONDS[name] + 60)
        if process.returncode and not error:
            said = log.read_text(errors="replace").strip().splitlines()
            error = f"exit {process.returncode}: " + " | ".join(said[-3:])[-600:]
        found = [json.loads(line) for line in lines.read_text().splitlines()]
    facts = found.pop(0) if found else {}
    return {"seconds": time.perf_counter() - started, "error": error, **facts, "results": found}


def waited(process: subprocess.Popen, seconds: float) -> str:
    """Until the process ends; after its time it is ended, with what it started."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"not done after {seconds:.0f} s"
    return ""


def environment(*, dry_run: bool) -> dict[str, str]:
    platforms = "cpu" if dry_run else "cuda,cpu"
    return {**os.environ, "JAX_PLATFORMS": platforms, "XLA_PYTHON_CLIENT_MEM_FRACTION": MEMORY}


if __name__ == "__main__":
    main()
