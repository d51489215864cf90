"""What a run says while it goes: metrics.jsonl, TensorBoard, the progress line; and when it must stop.

Numbers are read from the device one step late, so that the next step is already on its way when the host waits.
"""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from itjax.base.chips import chip_of
from itjax.base.schema import Log
from itjax.train.step import Metrics


class Aborted(RuntimeError):
    """The loss was not finite more often in a row than the config allows."""


@dataclass(frozen=True)
class Facts:
    """What the host knows of a step without asking the device."""

    epoch: float
    num_tokens: int  # positions of the global batch that hold data
    num_positions: int  # all positions of the global batch
    flops: float  # useful FLOPs: real tokens only, attention inside own segments only
    example_ids: str  # digest of the (source, index, epoch) of every example, in row order
    input_wait_seconds: float


class Journal:
    """metrics.jsonl: one JSON object a line, appended. A resumed run repeats steps after its checkpoint; their lines are there.

    A line is known by what it measures; the second one of the same is not written, but compared with the first.
    """

    TIMES = ("step_seconds", "input_wait_seconds", "tokens_per_second", "mfu")

    def __init__(self, path: Path):
        self.path = path
        self.written: dict[tuple, dict] = {}
        if path.exists():
            whole = self._drop_torn_line()
            for number, line in enumerate(whole.splitlines(), start=1):
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{path}:{number}: not JSON ({error}); the file is damaged. Move it away to begin a new one"
                    ) from error
                self.written[self._key(entry)] = entry
        self._file = path.open("a", encoding="utf-8")

    def _drop_torn_line(self) -> str:
        """A kill can leave half a line; it will be written again."""
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))
        return whole.decode()

    def _key(self, entry: Mapping[str, Any]) -> tuple:
        return tuple(entry.get(name) for name in ("kind", "step", "task", "split", "template_split", "metric"))

    def write(self, entry: dict[str, Any]) -> bool:
        """Appends the entry, or returns False where a resumed run comes to a result that differs from the line on disk."""
        entry = {name: _finite(value) for name, value in entry.items()}
        key = self._key(entry)
        if key in self.written:
            return all(self.written[key].get(name) == value for name, value in entry.items() if name not in self.TIMES)
        self.written[key] = entry
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        return True

    def close(self) -> None:
        self._file.close()


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


OF_EXPERTS = ("router_balance", "router_z", "expert_load", "dropped")  # metrics that only a mixture of experts has


class Watch:
    """Notes every step and every evaluation of one run, on the process that writes."""

    def __init__(
        self, run_dir: Path, log: Log, *, start: int, num_steps: int, max_skips: int, writes: bool, console: Console
    ):
        self._log, self._num_steps, self._max_skips, self._console = log, num_steps, max_skips, console
        self._journal = Journal(run_dir / "metrics.jsonl") if writes else None
        self._tensorboard = _tensorboard(run_dir / "tensorboard", start) if writes and log.tensorboard else None
        self._wandb = _wandb(log.wandb, run_dir) if writes and log.wandb else None
        self._progress = _progress(console) if writes and log.progress else None
        self._task = self._progress.add_task("", total=num_steps, completed=start, note="") if self._progress else None
        self._pending: tuple[int, Metrics, Facts] | None = None
        chip = chip_of(jax.devices()[0].device_kind)
        self._peak = chip.flops if chip else None  # FLOP/s of one device, where they are known
        self._last_read = time.perf_counter()
        self._last_line = -math.inf
        self._skips = 0
        if self._progress and console.is_terminal:
            self._progress.start()

    def note(self, step: int, metrics: Metrics, facts: Facts) -> None:
        """Takes the numbers of a step that has been sent off, and writes those of the step before."""
        self.flush()
        self._pending = (step, metrics, facts)

    def flush(self) -> None:
        """Waits for the step noted last and writes its line. Raises Aborted after too many skipped steps in a row."""
        if self._pending is None:
            return
        step, metrics, facts = self._pending
        self._pending = None
        numbers = {name: value.item() for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self._last_read = now - self._last_read, now
        entry = self._entry(step, numbers, facts, seconds)
        if step % self._log.every == 0 or step in (1, self._num_steps) or entry["skipped"]:
            self._write(entry)
        self._show(entry)
        self._skips = self._skips + 1 if entry["skipped"] else 0
        if self._skips > self._max_skips:
            raise Aborted(
                f"step {step}: loss {numbers['loss']}, gradient norm {numbers['grad_norm']}: not finite for {self._skips} steps "
                f"in a row (config.optimizer.max_skips={self._max_skips}). Parameters are as before step {step - self._skips + 1}; "
                "lower config.optimizer.learning_rate or look at these rows with itjax.show"
            )

    def _entry(self, step: int, numbers: dict[str, Any], facts: Facts, seconds: float) -> dict[str, Any]:
        num_devices = jax.device_count()
        return {
            "kind": "train",
            "step": step,
            "loss": numbers["loss"],
            "grad_norm": numbers["grad_norm"],
            "learning_rate": numbers["learning_rate"],
            "tokens": numbers["tokens"],
            "trained_tokens": numbers["trained_tokens"],
            "fill": facts.num_tokens / facts.num_positions,
            "step_seconds": seconds,
            "input_wait_seconds": facts.input_wait_seconds,
            "tokens_per_second": numbers["tokens"] / seconds,
            "mfu": facts.flops / seconds / (self._peak * num_devices) if self._peak else None,
            "epoch": facts.epoch,
            "skipped": bool(numbers["skipped"]),
            "example_ids": facts.example_ids,
            **{name: numbers[name] for name in OF_EXPERTS if name in numbers},
        }

    def _write(self, entry: dict[str, Any]) -> None:
        if self._journal and not self._journal.write(entry):
            self.say(
                f"step {entry['step']}: repeated after a resume with another result than {self._journal.path} holds"
            )
        numbers = {name: value for name, value in entry.items() if isinstance(value, float | int) and name != "step"}
        if self._tensorboard:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(f"train/{name}", value, entry["step"])
        if self._wandb:
            self._wandb.log({f"train/{name}": value for name, value in numbers.items()}, step=entry["step"])

    def scores(self, step: int, entries: Sequence[dict[str, Any]]) -> None:
        """Writes evaluation lines: task, split, template_split, metric, value, count."""
        for entry in entries:
            entry = {"kind": "eval", "step": step, **entry}
            if self._journal and not self._journal.write(entry):
                self.say(f"step {step}: evaluation of {entry['task']} repeated with another {entry['metric']}")
            name = "/".join(str(entry[key]) for key in ("task", "template_split", "metric") if entry[key])
            if self._tensorboard:
                self._tensorboard.add_scalar(f"eval/{name}", entry["value"], step)
            if self._wandb:
                self._wandb.log({f"eval/{name}": entry["value"]}, step=step)
        self._last_read = time.perf_counter()  # the time went into evaluation, not into a step

    def _show(self, entry: dict[str, Any]) -> None:
        if self._progress is None or self._task is None:
            return
        loss = "not finite" if entry["skipped"] else f"{entry['loss']:.4f}"
        note = f"loss {loss}  {entry['tokens_per_second']:,.0f} tokens/s"
        self._progress.update(self._task, completed=entry["step"], note=note)
        if not self._console.is_terminal and (
            time.monotonic() - self._last_line > 10 or entry["step"] == self._num_steps
        ):
            self._last_line = time.monotonic()
            left = self._progress.tasks[0].time_remaining
            self.say(f"step {entry['step']}/{self._num_steps}  {note}" + (f"  {left:.0f} s left" if left else ""))

    def say(self, text: str) -> None:
        """One line for the person at the terminal."""
        if self._journal:
            self._console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
        for sink in (self._journal, self._tensorboard):
            if sink:
                sink.close()
        if self._wandb:
            self._wandb.finish()


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
        transient=False,
        auto_refresh=console.is_terminal,
    )


def _tensorboard(folder: Path, start: int) -> Any:
    from tensorboardX import SummaryWriter  # only where it is wanted: the import takes a while

    return SummaryWriter(str(folder), purge_step=start + 1 if start else None)


def _wandb(project: str, run_dir: Path) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"config.log.wandb={project!r}: wandb is not installed; pip install 'itjax[wandb]'") from error
    wandb.init(project=project, name=run_dir.name, dir=str(run_dir), resume="allow")
    return wandb
