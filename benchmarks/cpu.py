"""The real train step on this CPU, as a share of what its own matrix products can reach here.

The ceiling is measured in the same process and in turns with the step, because the speed of a shared machine drifts;
numbers from a machine that does other work say little even so (`load_before` in the results). Useful FLOPs are those of
real tokens and of attention within examples; in the rows that give the ratio every token is trained, so that skipping
untrained ones cannot flatter it.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import SEED, measured
from itjax.base.records import PackedBatch
from itjax.base.schema import Loss, Optimizer
from itjax.models import families
from itjax.models.families import ModelConfig
from itjax.models.model import build
from itjax.objectives.sft import sft
from itjax.train import optimizer, state
from itjax.train.step import make_train_step

TURNS = 4
TOY = dataclasses.replace(
    families.PRESETS["small"], layers=4, dim=512, heads=8, kv_heads=8, head_size=64, ffn=1408, vocab=8192
)
WORKLOADS = {  # name: (model, rows, positions, steps a turn)
    "toy, 4 layers of 512": (TOY, 4, 512, 1),
    "small, 8 x 512": (families.PRESETS["small"], 8, 512, 1),
    "tiny, 8 x 256": (families.PRESETS["tiny"], 8, 256, 4),
}
MEAN_LENGTH = 140  # of the examples in a row


def results() -> list[dict[str, Any]]:
    return [line for name, workload in WORKLOADS.items() for line in measure(name, *workload)]


def measure(name: str, config: ModelConfig, rows: int, length: int, steps: int) -> Iterator[dict[str, Any]]:
    """Share of the ceiling with every token trained, then tokens a second with all and with half of them trained."""
    ceiling = best_product(config, rows * length)
    whole, lengths = full_rows(config.vocab, rows, length)
    half = whole._replace(weights_BT=whole.weights_BT * (np.arange(length) % 2))
    step = train_step(config)
    flops = families.train_flops(config, lengths)
    seconds(step, whole, steps)  # the first steps of a program are slow
    share, tokens, tokens_half, reached = [], [], [], []
    for _ in range(TURNS):
        reached.append(ceiling())
        spent = seconds(step, whole, steps)
        share.append(flops / spent / reached[-1])
        tokens.append(rows * length / spent)
        tokens_half.append(rows * length / seconds(step, half, steps))
    yield measured(f"{name}: useful FLOPs of the step / ceiling", "ratio", share)
    yield measured(f"{name}: ceiling, its best matrix product", "GFLOP/s", [one / 1e9 for one in reached])
    yield measured(f"{name}: every token trained", "tokens/s", tokens)
    yield measured(f"{name}: every second token trained", "tokens/s", tokens_half)


def train_step(config: ModelConfig) -> Callable[[PackedBatch], None]:
    """The step that training runs, with its own state."""
    model = build(config, dtype="float32", attention="auto", remat="none")
    settings = Optimizer(learning_rate=1e-3)
    tx = optimizer.make(settings)
    step = jax.jit(
        make_train_step(
            sft(model, loss=Loss(chunk=512)),
            tx,
            learning_rate=optimizer.learning_rate(settings, num_steps=1000),
            accumulate=1,
        ),
        donate_argnums=0,
    )
    now = state.fresh(model.init(jax.random.key(SEED)), {}, tx)

    def advance(batch: PackedBatch) -> None:
        nonlocal now
        now, _ = step(now, batch)
        jax.block_until_ready(now)

    return advance


def seconds(step: Callable[[PackedBatch], None], batch: PackedBatch, steps: int) -> float:
    """Seconds a step takes, the quickest of a few: what else runs on the machine only ever adds."""
    spent = []
    for _ in range(steps):
        started = time.perf_counter()
        step(batch)
        spent.append(time.perf_counter() - started)
    return min(spent)


def full_rows(vocab: int, rows: int, length: int) -> tuple[PackedBatch, list[int]]:
    """Rows without padding, every token trained, and the lengths of the examples in them."""
    rng = np.random.default_rng(SEED)
    starts_BT = rng.random((rows, length)) < 1 / MEAN_LENGTH
    starts_BT[:, 0] = True
    segments_BT = starts_BT.cumsum(axis=1, dtype=np.int32)
    places_T = np.arange(length, dtype=np.int32)
    positions_BT = places_T - np.maximum.accumulate(np.where(starts_BT, places_T, 0), axis=1).astype(np.int32)
    tokens_BT, targets_BT = (rng.integers(0, vocab, (rows, length), dtype=np.int32) for _ in range(2))
    weights_BT = np.ones((rows, length), np.float32)
    lengths = [count for row_T in segments_BT for count in np.bincount(row_T)[1:].tolist()]
    return PackedBatch(tokens_BT, targets_BT, segments_BT, positions_BT, weights_BT, 0 * tokens_BT), lengths


def best_product(config: ModelConfig, tokens: int) -> Callable[[], float]:
    """A function that measures the ceiling: FLOP/s of the fastest matrix product among the model's own, forward and back.

    Random numbers, because zeros are multiplied faster than real weights.
    """
    wide, narrow = config.heads * config.head_size, config.kv_heads * config.head_size
    kernels = {(config.dim, size) for size in (wide, narrow, config.ffn, config.vocab)} | {(config.ffn, config.dim)}
    shapes = {shape for d, f in kernels for shape in ((tokens, d, f), (tokens, f, d), (d, tokens, f))}
    product = jax.jit(lambda a, b: a @ b)
    rng = np.random.default_rng(SEED)

    def speed(shape: tuple[int, int, int]) -> float:
        m, k, n = shape
        a, b = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((m, k), (k, n)))
        jax.block_until_ready(product(a, b))
        return 2 * m * k * n / min(_clock(lambda: product(a, b)) for _ in range(3))

    promising = sorted(shapes, key=speed)[-3:]
    return lambda: max(speed(shape) for shape in promising)


def _clock(work: Callable[[], jax.Array]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - started
