"""From encoded examples to batches: how full the rows are, and how many tokens one core plans and assembles a second.

Compared with Grain's own packers on the same examples. Time is the processor time of all threads, so a busy machine
and a packer with threads are both counted fairly; both sides take turns.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grain.python as grain
import numpy as np
from grain.experimental import BestFitPackIterDataset, FirstFitPackIterDataset

from benchmarks import SEED, measured
from itjax.data import mixture, pack
from itjax.data.loader import make_loader

LENGTH = 2048
ROWS = 64
WINDOW = 1000
EXAMPLES = 50_000
COMPARED = 12_000  # examples both sides pack: 800 rows and more, or one row decides the fill
BINS = (16, 64)
REPEATS, TURNS = 5, 3
WORKLOADS = {  # log-normal lengths: (mean of the logarithm, its deviation, shortest)
    "mean 140": (4.7, 0.7, 16),
    "mean 350": (float(np.log(350) - 0.9**2 / 2), 0.9, 16),
}
PACKERS = {"first-fit": FirstFitPackIterDataset, "best-fit": BestFitPackIterDataset}


@dataclass
class Synthetic:
    """An encoded source of random ids, half of each example learned."""

    name: str
    lengths: np.ndarray
    fingerprint: str = "synthetic"

    def __post_init__(self) -> None:
        self.num_trained = self.lengths - self.lengths // 2
        self.weight_sums = self.num_trained.astype(np.float32)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths + 1, dtype=np.int64)])
        self.tokens = np.random.default_rng(SEED).integers(0, 32_000, self.offsets[-1], dtype=np.int32)
        ends = np.repeat(self.offsets[1:], self.lengths + 1)
        untrained = np.repeat(self.num_trained, self.lengths + 1)
        self.weights = (np.arange(self.offsets[-1]) >= ends - untrained).astype(np.float32)

    def __len__(self) -> int:
        return len(self.lengths)


def results() -> list[dict[str, Any]]:
    return [result for workload in WORKLOADS for result in of_workload(workload)] + [of_order()]


def of_workload(workload: str) -> list[dict[str, Any]]:
    whole = Synthetic("examples", draw_lengths(workload, EXAMPLES))
    some = Synthetic("examples", whole.lengths[:COMPARED])
    facts = {"length": LENGTH, "examples": EXAMPLES, "mean": float(whole.lengths.mean()), "window": WINDOW}
    tokens = float(whole.lengths.sum())
    planned = [tokens / seconds(lambda: plan(whole)) / 1e6 for _ in range(REPEATS)]
    served = [tokens / seconds(lambda: serve(whole)) / 1e6 for _ in range(REPEATS)]
    fill = pack.fill(plan(whole), whole.lengths, LENGTH)
    lines = [
        measured(f"{workload}: fill", "share", [fill], **facts),
        measured(f"{workload}: plan", "Mtokens/s/core", planned, **facts),
        measured(f"{workload}: plan and assemble", "Mtokens/s/core", served, **facts),
    ]
    return lines + [
        line for packer in PACKERS for bins in BINS for line in against_grain(workload, some, packer=packer, bins=bins)
    ]


def against_grain(workload: str, source: Synthetic, *, packer: str, bins: int) -> list[dict[str, Any]]:
    """The same few examples through both, taking turns."""
    tokens, grain_rows = float(source.lengths.sum()), 0
    ratios, speeds = [], []

    def theirs() -> None:
        nonlocal grain_rows
        grain_rows = grain_serve(source, packer=packer, bins=bins)

    for _ in range(TURNS):
        ours, grains = seconds(lambda: serve(source)), seconds(theirs)
        ratios.append(grains / ours)
        speeds.append(tokens / grains / 1e6)
    name, facts = f"{workload}: Grain {packer}, {bins} bins", {"length": LENGTH, "examples": len(source)}
    fill = pack.fill(plan(source), source.lengths, LENGTH)
    grain_fill = tokens / (grain_rows * LENGTH)
    return [
        measured(f"{workload}: speed over Grain {packer}, {bins} bins", "ratio", ratios, **facts),
        measured(f"{workload}: fill over Grain {packer}, {bins} bins", "ratio", [fill / grain_fill], **facts),
        measured(f"{name}, fill", "share", [grain_fill], **facts),
        measured(name, "Mtokens/s/core", speeds, **facts),
    ]


def of_order() -> dict[str, Any]:
    """A million draws from three sources whose rates never repeat their pattern."""
    sizes, rates = [400_000, 300_001, 250_007], [np.sqrt(0.2), 0.3, 0.7 - np.sqrt(0.2)]
    names = ["first", "second", "third"]
    taken = [seconds(lambda: mixture.order(sizes, rates, num=1_000_000, seed=SEED, names=names)) for _ in range(3)]
    return measured("mixture order of 1,000,000 examples", "s", taken, sources=3)


def draw_lengths(workload: str, num: int) -> np.ndarray:
    mean, deviation, shortest = WORKLOADS[workload]
    draw = np.random.default_rng(SEED).lognormal(mean, deviation, num)
    return np.clip(draw, shortest, LENGTH).astype(np.int32)


def plan(source: Synthetic) -> pack.Plan:
    window = int(WINDOW * LENGTH / source.lengths.mean())
    return pack.plan(source.lengths, length=LENGTH, window=window, epoch=len(source), seed=SEED, packing=True)


def serve(source: Synthetic) -> None:
    """One epoch as a run reads it: the plan, then every batch through the loader."""
    loader = make_loader(
        [source],
        weights=[None],
        length=LENGTH,
        rows=ROWS,
        steps=None,
        epochs=1,
        window=WINDOW,
        seed=SEED,
        packing=True,
        reduction="token",
        local_rows=range(ROWS),
        workers=0,
    )
    with loader:
        for _ in loader:
            pass


def grain_serve(source: Synthetic, *, packer: str, bins: int) -> int:
    """The same examples shuffled, shifted and packed by Grain; how many rows they took."""

    def example(number: int) -> dict[str, np.ndarray]:
        start, stop = source.offsets[number], source.offsets[number + 1]
        return {
            "tokens": source.tokens[start : stop - 1],
            "targets": source.tokens[start + 1 : stop],
            "weights": source.weights[start + 1 : stop],
        }

    stream = grain.MapDataset.range(len(source)).shuffle(seed=SEED).map(example)
    packed = PACKERS[packer](
        stream.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=64)),
        length_struct={"tokens": LENGTH, "targets": LENGTH, "weights": LENGTH},
        num_packing_bins=bins,
        seed=SEED,
    )
    return sum(1 for _ in packed)


def seconds(work: Callable[[], object]) -> float:
    """Processor seconds of all threads."""
    before = time.process_time()
    work()
    return time.process_time() - before
