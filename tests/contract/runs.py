"""Real runs of the training command, in processes of their own, small enough for a test."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMES = ("step_seconds", "input_wait_seconds", "tokens_per_second", "mfu")

SMALL = {
    "steps": 12,
    "rows": 4,
    "length": 128,
    "vocab_size": 512,
    "architecture.layers": 2,
    "architecture.dim": 32,
    "architecture.heads": 2,
    "architecture.kv_heads": 1,
    "architecture.head_size": 16,
    "architecture.ffn": 64,
    "checkpoint.every": 4,
    "evaluation.every": 5,
    "evaluation.examples": 4,
    "evaluation.generate": 0,
    "log.tensorboard": False,
    **{f"sources.{name}.examples": 12 for name in ("triage", "arithmetic", "functions", "support")},
}


def arguments(run_dir: Path, **settings: object) -> list[str]:
    """The quickstart, as small as SMALL says, with other settings by name (`checkpoint__every=2`)."""
    given = {name.replace("__", "."): value for name, value in settings.items()}
    overrides = [f"--config.{name}={value}" for name, value in {**SMALL, **given}.items()]
    return [f"--config={ROOT / 'configs' / 'quickstart.py'}", f"--config.run_dir={run_dir}", *overrides]


def environment(*, devices: int = 1, **more: str) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **more}


def start(
    run_dir: Path, *, devices: int = 1, module: str = "itjax.main", more: Sequence[str] = (), **settings: object
) -> subprocess.Popen:
    """The command, started."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments(run_dir, **settings), *more],
        env=environment(devices=devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, *, code: int = 0) -> str:
    """Waits, checks the exit code and returns all that was printed."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
    return out + err


def metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def num_lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
