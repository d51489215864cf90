"""Attention of packed rows on this CPU, forward and backward: streamed blocks against blocks of whole prefixes.

Both are run in turns, because the speed of a shared machine drifts, and are measured in processor time, which other work on
the machine changes less than it changes seconds. Lengths of documents are lognormal, as those of conversations are.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import SEED, measured
from itjax.kernels import attention
from itjax.kernels.case import Scores, Segments

TURNS = 3
POSITIONS = 4096  # of all rows, where rows are shorter
SIZES = {"8 heads of 32": (8, 32), "16 heads of 64": (16, 64)}
CASES = {  # (positions of a row, mean length of its documents; None: one document in a row)
    "8 heads of 32": (
        *((512, 140), (512, 620), (512, None), (1024, 140), (1024, 620), (1024, None)),
        *((4096, 140), (4096, 620), (4096, None), (8192, 140), (8192, 620)),
    ),
    "16 heads of 64": ((512, 140), (1024, 620), (1024, None), (4096, 620)),
}


def results() -> list[dict[str, Any]]:
    return [line for size, cases in CASES.items() for case in cases for line in measure(size, *case)]


def measure(size: str, length: int, mean: int | None) -> Iterator[dict[str, Any]]:
    """How many times the processor time of the one the other takes, and the times."""
    heads, head_size = SIZES[size]
    rows = max(1, POSITIONS // length)
    rng = np.random.default_rng(SEED)
    q, k, v, mix = (jnp.asarray(rng.normal(size=(rows, length, heads, head_size)), jnp.float32) for _ in range(4))
    segments_BT = jnp.asarray([packed_row(rng, length, mean) for _ in range(rows)])
    steps = {name: gradients(name, head_size) for name in ("blockwise", "streamed")}
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(1 + TURNS):
        for name, step in steps.items():
            seconds = processor_seconds(partial(step, q, k, v, mix, segments_BT))
            if turn > 0:  # before, it is compiled
                spent[name].append(seconds)
    about = f"{size}, {rows} x {length}, " + (f"documents of {mean}" if mean else "one document")
    ratios = [a / b for a, b in zip(spent["blockwise"], spent["streamed"], strict=True)]
    yield measured(f"{about}: blockwise / streamed", "ratio", ratios)
    for name, seconds in spent.items():
        yield measured(f"{about}: {name}", "ms", [1e3 * one for one in seconds])


def gradients(name: str, head_size: int) -> Callable[..., Any]:
    """By queries, keys and values."""

    def total(q, k, v, mix, segments_BT):
        segments = Segments(segments_BT, segments_BT)
        return (attention.attend(q, k, v, segments, implementation=name, scores=Scores(head_size**-0.5)) * mix).sum()

    return jax.jit(jax.grad(total, argnums=(0, 1, 2)))


def packed_row(rng: np.random.Generator, length: int, mean: int | None) -> np.ndarray:
    """Segments of a row without padding; the last document is cut."""
    if mean is None:
        return np.ones(length, np.int32)
    lengths = np.maximum(1, rng.lognormal(np.log(mean) - 0.5, 1.0, length)).astype(int)
    return np.repeat(np.arange(1, length + 1, dtype=np.int32), lengths)[:length]


def processor_seconds(work: Callable[[], Any]) -> float:
    started = time.process_time()
    jax.block_until_ready(work())
    return time.process_time() - started
