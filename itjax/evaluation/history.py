"""A run as its directory tells it: settings, steps, scores, what became of the data, sample answers.

Scores are read by what they measure, and by step. A run that goes on can be read at any time.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from itjax.data.tasks import FAMILIES
from itjax.evaluation.tasks import PRIMARY

LOSS = "loss"


class Key(NamedTuple):
    """What an evaluation line measures."""

    task: str
    template_split: str | None
    metric: str


@dataclass(frozen=True)
class History:
    """A run as its directory tells it."""

    path: Path
    config: Mapping[str, Any]
    train: Sequence[Mapping[str, Any]]
    scores: Mapping[Key, Mapping[int, float]]  # by step, in the order of the steps
    counts: Mapping[Key, int]
    manifest: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]

    @property
    def num_steps(self) -> int | None:
        """Steps that the whole run will have, where that is known."""
        return self.manifest.get("plan", {}).get("num_steps") or self.config.get("steps") or None

    def family(self, task: str) -> str | None:
        """The embedded family behind a source's name."""
        family = (self.config.get("sources") or {}).get(task, {}).get("task") or task
        return family if family in FAMILIES else None

    def tasks(self) -> list[str]:
        """Sources whose answers were scored."""
        return list(dict.fromkeys(key.task for key in self.scores if key.metric != LOSS))

    def primary(self, task: str) -> str:
        """The metric that speaks for a task."""
        return PRIMARY.get(self.family(task) or "", "exact_match")

    def losses(self) -> dict[Key, Mapping[int, float]]:
        return {key: values for key, values in self.scores.items() if key.metric == LOSS}


def read(run_dir: str | Path) -> History:
    """The history of a run, finished or not. Raises ValueError where the folder holds no run, or a damaged one."""
    path = Path(run_dir)
    if not (path / "config.json").is_file() and not (path / "metrics.jsonl").is_file():
        raise ValueError(f"{path}: no config.json and no metrics.jsonl; give the run_dir of a training run")
    lines = lines_of(path / "metrics.jsonl")
    scores: dict[Key, dict[int, float]] = {}
    counts: dict[Key, int] = {}
    for line in sorted((line for line in lines if line["kind"] == "eval"), key=lambda line: line["step"]):
        if line["value"] is not None:
            key = Key(line["task"], line["template_split"], line["metric"])
            scores.setdefault(key, {})[line["step"]] = line["value"]
            counts[key] = line["count"]
    return History(
        path=path,
        config=_json(path / "config.json"),
        train=sorted((line for line in lines if line["kind"] == "train"), key=lambda line: line["step"]),
        scores=scores,
        counts=counts,
        manifest=_json(path / "data_manifest.json"),
        samples=lines_of(path / "samples.jsonl"),
    )


def _json(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); the file is damaged, remove it") from error


def lines_of(path: Path) -> list[dict[str, Any]]:
    """All whole lines; the last one may be half written by a run that goes on, and will be there next time."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    found = []
    for number, line in enumerate(whole.split("\n") if whole else [], start=1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error}); the file is damaged, remove the line") from error
    return found


def average(run: History, split: str | None, metric: str | None) -> dict[int, float]:
    """Mean over tasks of a metric (None: the primary one of each), for each step at which all of them were scored."""
    keys = [Key(task, split, metric or run.primary(task)) for task in run.tasks()]
    found = [run.scores[key] for key in keys if key in run.scores]
    return mean(found)


def mean(found: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Mean over several, for each step that all of them have."""
    steps = [step for step in (found[0] if found else ()) if all(step in values for values in found)]
    return {step: statistics.fmean(values[step] for values in found) for step in steps}


def ends(values: Mapping[int, float]) -> tuple[float, float]:
    """The first value and the last."""
    numbers = list(values.values())
    return numbers[0], numbers[-1]
