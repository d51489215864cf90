"""What is measured on one GPU, item by item; gpu.py runs them.

B rows, T positions, N query heads, K key/value heads, H head size.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import SEED, measured
from itjax.base import chips
from itjax.base.records import DataPosition, PackedBatch
from itjax.base.schema import Checkpoint, Lora, Optimizer, Parallel, Run
from itjax.kernels import attention, cudnn
from itjax.kernels.attention import Case, Scores, Segments
from itjax.models import families
from itjax.models.config import ModelConfig
from itjax.models.model import build
from itjax.objectives.sft import sft
from itjax.parallel import layout
from itjax.parallel.mesh import mesh_for
from itjax.train import loop
from itjax.train.checkpoint import Checkpoints

TURNS = 5
Lines = Iterator[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured."""

    models: Mapping[str, str]  # what an item calls it -> preset
    length: int
    tokens: int  # of the products that the ceiling is taken from
    lengths: tuple[int, ...]  # of rows of attention
    heads: tuple[tuple[int, int, int], ...]  # N, K, H
    copied: int  # bytes
    turn: float  # seconds of one turn of a short measurement


REAL = Size(
    models={"1b": "llama32_1b", "8b": "llama31_8b", "small": "small"},
    length=4096,
    tokens=8192,
    lengths=(4096, 8192),
    heads=((32, 8, 128), (32, 8, 64)),
    copied=2**31,
    turn=0.5,
)
DRY = Size(
    models={"1b": "tiny", "8b": "tiny", "small": "tiny"},
    length=64,
    tokens=64,
    lengths=(64,),
    heads=((4, 2, 8),),
    copied=2**20,
    turn=0.01,
)

# What a workload is run with: the settings that fit one H200, by the plan.
TRAINS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "train 1b dots": ("1b", {"rows": 4, "remat": "dots"}),
    "train 1b attention": ("1b", {"rows": 8, "remat": "attention"}),
    "train 8b lora attention": ("8b", {"rows": 4, "remat": "attention", "lora": Lora(rank=16)}),
    "train 8b lora full": ("8b", {"rows": 8, "remat": "full", "lora": Lora(rank=16)}),
    "train 8b full": ("8b", {"rows": 1, "remat": "full"}),
    "train 8b moments": ("8b", {"rows": 2, "remat": "full", "optimizer": Optimizer(moments="bfloat16")}),
}


@dataclasses.dataclass(frozen=True)
class Asked:
    name: str  # of the item
    size: Size
    record: Path  # what was measured before
    until: float  # by time.monotonic()

    @property
    def dry_run(self) -> bool:
        return self.size is DRY

    @property
    def platform(self) -> str:
        return jax.default_backend()

    def has_time(self, seconds: float) -> bool:
        return time.monotonic() + seconds < self.until


# --- 1: what the device reaches ---------------------------------------------------------------------------------------


def ceiling(asked: Asked) -> Lines:
    """Products of the model's own shapes, forward and both backward, sustained; bytes a second on the device and off it."""
    size = asked.size
    for name in ("1b", "8b"):
        speeds = products(families.PRESETS[size.models[name]], size)
        for shape, reached in sorted(speeds.items(), key=lambda item: -np.median(item[1])):
            yield measured(f"{name}: product {'x'.join(map(str, shape))}", "TFLOP/s", reached)
    x = jnp.ones(size.copied // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    spent = paced(lambda: add(x), turn=size.turn)
    yield measured("copy on the device, read and written", "GB/s", [2 * size.copied / one / 1e9 for one in spent])
    spent = []
    for _ in range(TURNS):
        y = jax.block_until_ready(add(x))  # an array that was read keeps its copy, so a new one each time
        started = time.perf_counter()
        jax.device_get(y)
        spent.append(time.perf_counter() - started)
    yield measured("device to host, not pinned", "GB/s", [size.copied / one / 1e9 for one in spent])


def products(config: ModelConfig, size: Size) -> dict[tuple[int, int, int], list[float]]:
    """TFLOP/s of bfloat16 products; of random numbers, because zeros are multiplied faster."""
    wide, narrow = config.heads * config.head_size, config.kv_heads * config.head_size
    kernels = {(config.dim, f) for f in (wide, narrow, config.ffn)} | {(config.ffn, config.dim)}
    shapes = {shape for d, f in kernels for shape in ((size.tokens, d, f), (size.tokens, f, d), (d, size.tokens, f))}
    return {shape: reached(shape, turn=size.turn) for shape in sorted(shapes)}


def reached(shape: tuple[int, int, int], *, turn: float) -> list[float]:
    """TFLOP/s of one product."""
    m, k, n = shape
    keys = jax.random.split(jax.random.key(SEED))
    a, b = (jax.random.normal(key, size, jnp.bfloat16) for key, size in zip(keys, ((m, k), (k, n)), strict=True))
    product = jax.jit(lambda a, b: a @ b)
    return [2 * m * k * n / one / 1e12 for one in paced(lambda: product(a, b), turn=turn)]


def paced(call: Callable[[], Any], *, turn: float) -> list[float]:
    """Seconds that a call takes, in turns of about `turn` seconds; calls of a turn are queued, as those of a step are."""
    jax.block_until_ready(call())
    started = time.perf_counter()
    jax.block_until_ready(call())
    count = max(1, round(turn / (time.perf_counter() - started)))
    spent = []
    for _ in range(TURNS):
        started = time.perf_counter()
        for _ in range(count):
            last = call()
        jax.block_until_ready(last)
        spent.append((time.perf_counter() - started) / count)
    return spent


# --- 2, 3: attention --------------------------------------------------------------------------------------------------


def packed(rows: int, length: int, *, median: float, fill: float = 1.0) -> tuple[np.ndarray, list[int]]:
    """Segments of rows of documents with lognormal lengths, and those lengths."""
    rng = np.random.default_rng(SEED)
    segments_BT, lengths = np.zeros((rows, length), np.int32), []
    for row_T in segments_BT:
        start, number = 0, 0
        while start < int(length * fill):
            count = min(max(1, int(rng.lognormal(np.log(median), 0.7))), int(length * fill) - start)
            number += 1
            row_T[start : start + count] = number
            lengths.append(count)
            start += count
    return segments_BT, lengths


def implementations(asked: Asked, case: Case) -> Iterator[tuple[str, str, dict[str, int]]]:
    """Title, name, and settings of `kernels/cudnn.py`."""
    for name in attention.available(case):
        yield name, name, {}
    if "cudnn" in attention.available(case):
        for most in (16, 32, 64):
            yield f"cudnn, {most} slots", "cudnn", {"MOST_SLOTS": most}


def reading(name: str, segments: jax.Array, *, scores: Scores, platform: str) -> Callable[..., Any]:
    """Values and gradients of attention, jitted: (q, k, v, mix) -> (o, dq, dk, dv)."""
    both = Segments(segments, segments)

    def read(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention.attend(q, k, v, both, implementation=name, scores=scores, platform=platform)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, mix: jax.Array) -> tuple[jax.Array, ...]:
        o, pull = jax.vjp(read, q, k, v)
        return o, *pull(mix)

    return jax.jit(run)


def arrays(rows: int, length: int, heads: tuple[int, int, int]) -> list[jax.Array]:
    """Queries, keys, values and what gradients are taken of."""
    N, K, H = heads
    keys = jax.random.split(jax.random.key(SEED), 4)
    sizes = [(rows, length, n, H) for n in (N, K, K, N)]
    return [jax.random.normal(key, size, jnp.bfloat16) for key, size in zip(keys, sizes, strict=True)]


def agreement(asked: Asked) -> Lines:
    """How far each implementation is from the definition in float32, where positions are real; bfloat16 itself is 2e-3."""
    length = min(1024, asked.size.lengths[0])
    for heads in asked.size.heads:
        q, k, v, mix = arrays(2, length, heads)
        kinds = (("long", length / 3, 0), ("short", length / 40, 0), ("window", length / 3, 17))
        for kind, median, window in kinds[: 1 if asked.dry_run else None]:
            segments, _ = packed(2, length, median=median, fill=0.9)
            real = (segments != 0)[:, :, None, None]
            scores = Scores(heads[2] ** -0.5, window=window)
            wide = [x.astype(jnp.float32) for x in (q, k, v, mix * real)]
            with jax.default_matmul_precision("highest"):
                exact = reading("reference", jnp.asarray(segments), scores=scores, platform=asked.platform)(*wide)
            case = Case(asked.platform, length, heads[0], heads[1], heads[2], "bfloat16", scores)
            for title, name, changes in implementations(asked, case):
                with mock.patch.dict(vars(cudnn), changes):
                    run = reading(name, jnp.asarray(segments), scores=scores, platform=asked.platform)
                    ours = run(q, k, v, (mix * real).astype(mix.dtype))
                errors = [distance(one, reference, real) for one, reference in zip(ours, exact, strict=True)]
                what = f"{title}: {kind} documents, heads of {heads[2]}"
                yield measured(f"{what}, values", "relative error", errors[:1], finite=bool(np.isfinite(errors[0])))
                yield measured(
                    f"{what}, gradients", "relative error", errors[1:], finite=bool(np.isfinite(errors[1:]).all())
                )
    yield from parity(asked)


def distance(one: jax.Array, reference: jax.Array, real: np.ndarray) -> float:
    a, b = (np.where(real, np.asarray(x, np.float64), 0.0) for x in (one, reference))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def parity(asked: Asked) -> Lines:
    """The loss of one batch on this device, relative to the loss on the CPU in float32 by the definition."""
    config = dataclasses.replace(families.PRESETS["tiny"], vocab=512)
    batch, _ = full_batch(2, 64, config.vocab)

    def loss(device: jax.Device, dtype: str, wanted: str) -> float:
        model = build(config, dtype=dtype, attention=wanted, remat="none", platform=device.platform)
        with jax.default_device(device):
            params = model.init(jax.random.key(SEED))
            sums = jax.jit(sft(model, loss=Run().loss))(params, {}, jax.device_put(batch, device), None)
            return float(sums.loss / sums.weight)

    expected = loss(jax.devices("cpu")[0], "float32", "reference")
    for dtype in ("float32", "bfloat16"):
        error = abs(loss(jax.devices()[0], dtype, "auto") / expected - 1)
        yield measured(f"loss of one batch in {dtype}, against the CPU", "relative error", [error])


def attention_speed(asked: Asked) -> Lines:
    """Forward and backward, useful FLOPs a second: 12·N·H for each pair of positions that causality leaves in a segment."""
    size = asked.size
    for heads in size.heads:
        for length in size.lengths:
            for median in (length / 40, length / 8, length * 100):
                segments, lengths = packed(2, length, median=median)
                flops = 12.0 * heads[0] * heads[2] * sum(one**2 / 2 for one in lengths)
                scores = Scores(heads[2] ** -0.5)
                case = Case(asked.platform, length, heads[0], heads[1], heads[2], "bfloat16", scores)
                inputs = arrays(2, length, heads)
                for title, name, changes in implementations(asked, case):
                    if not asked.has_time(20):
                        return
                    with mock.patch.dict(vars(cudnn), changes):
                        run = reading(name, jnp.asarray(segments), scores=scores, platform=asked.platform)
                        yield from tried(
                            f"{title}: 2 x {length}, heads of {heads[2]}, {len(lengths)} documents",
                            run,
                            inputs,
                            flops,
                            size,
                        )


def tried(title: str, run: Callable[..., Any], inputs: list[jax.Array], flops: float, size: Size) -> Lines:
    """One that does not fit is said, and others go on."""
    try:
        spent = paced(lambda: run(*inputs), turn=size.turn / 2)
    except jax.errors.JaxRuntimeError as error:
        yield measured(f"{title}: {str(error).splitlines()[0][:150]}", "failed", [1.0])
        return
    yield measured(title, "TFLOP/s", [flops / one / 1e12 for one in spent], milliseconds=1e3 * float(np.median(spent)))


# --- 4: the train step ------------------------------------------------------------------------------------------------


def full_batch(rows: int, length: int, vocab: int) -> tuple[PackedBatch, list[int]]:
    """Rows without padding, every token trained."""
    segments_BT, lengths = packed(rows, length, median=min(400, length / 4))
    rng = np.random.default_rng(SEED)
    starts_BT = np.diff(segments_BT, axis=1, prepend=0) != 0
    places_T = np.arange(length, dtype=np.int32)
    positions_BT = places_T - np.maximum.accumulate(np.where(starts_BT, places_T, 0), axis=1).astype(np.int32)
    tokens_BT, targets_BT = (rng.integers(0, vocab, (rows, length), dtype=np.int32) for _ in range(2))
    weights_BT = np.ones((rows, length), np.float32)
    return PackedBatch(tokens_BT, targets_BT, segments_BT, positions_BT, weights_BT, 0 * tokens_BT), lengths


class Training:
    """A run's own step and state, on one device."""

    def __init__(self, run: Run, config: ModelConfig):
        base = "bfloat16" if run.lora.rank else "float32"
        self.mesh = mesh_for(Parallel(), jax.devices()[:1])
        model = build(
            config, dtype="bfloat16", attention=run.attention, remat=run.remat, lora=run.lora, base=base
        )  # fmt: skip
        with jax.set_mesh(self.mesh):
            compiled = loop.compile_step(run, model, self.mesh, num_steps=1000)
            self.state = loop.first(run, model, compiled, None)
            batch, self.lengths = full_batch(run.rows, run.length, config.vocab)
            self.batch = layout.place(batch, self.mesh, rows=run.rows)
        self._step = compiled.step

    def step(self) -> dict[str, jax.Array]:
        with jax.set_mesh(self.mesh):
            self.state, metrics = self._step(self.state, self.batch)
        return metrics


def asked_run(asked: Asked, name: str) -> tuple[Run, ModelConfig]:
    model, settings = TRAINS[name]
    run = Run(model=asked.size.models[model], length=asked.size.length, dtype="bfloat16", **settings)
    return run, families.PRESETS[run.model]


def train(asked: Asked) -> Lines:
    """Tokens a second, the share of what products reach in the same minute, and the peak of memory."""
    run, config = asked_run(asked, asked.name)
    training = Training(run, config)
    flops = families.train_flops(config, training.lengths, moving=0.0 if run.lora.rank else 1.0)
    shape = (asked.size.tokens, config.dim, config.ffn)
    top = reached(shape, turn=asked.size.turn)
    spent = paced(training.step, turn=3.0 if not asked.dry_run else 0.01)
    top += reached(shape, turn=asked.size.turn)
    facts = {"rows": run.rows, "remat": run.remat, "moments": run.optimizer.moments, "rank": run.lora.rank}
    best = float(np.median(top)) * 1e12
    yield measured("useful FLOPs of the step / ceiling", "ratio", [flops / one / best for one in spent], **facts)
    yield measured("step", "s", spent)
    yield measured("real tokens", "tokens/s", [run.rows * run.length / one for one in spent])
    yield measured("ceiling in the same minute", "TFLOP/s", top)
    chip = chips.chip_of(jax.devices()[0].device_kind)
    if chip is not None and chip.flops:
        yield measured("model FLOPs / the chip's peak", "ratio", [flops / one / chip.flops for one in spent])
    if used := jax.devices()[0].memory_stats():
        yield measured("peak_bytes_in_use", "GiB", [used["peak_bytes_in_use"] / 2**30])
    yield measured("loss after the steps", "nats", [float(training.step()["loss"])])


# --- 6, 7, 8, and verify: the commands --------------------------------------------------------------------------------


def command(asked: Asked, *words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *words],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=max(1.0, asked.until - time.monotonic()),
    )


def quickstart(asked: Asked, folder: Path) -> list[str]:
    """Settings of the quickstart that need nothing but its embedded tasks, little of them in a dry run."""
    few = [f"--config.sources.{task}.examples=200" for task in ("triage", "arithmetic", "functions", "support")]
    return [
        "--config=configs/quickstart.py",
        f"--config.run_dir={folder / 'run'}",
        f"--config.model={asked.size.models['small']}",
        "--config.evaluation.examples=0",
        "--config.evaluation.generate=0",
        *(few if asked.dry_run else []),
        *(["--config.vocab_size=400"] if asked.dry_run else []),
    ]


def verify(asked: Asked) -> Lines:
    """The invariance contract on this device: packed is not packed, for every implementation of attention that it offers."""
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch) / "checks.json"
        dtype = asked.name.split()[-1]
        ran = command(
            asked, "itjax.verify", *quickstart(asked, Path(scratch)), f"--config.dtype={dtype}", f"--json={found}"
        )
        if not found.exists():
            raise RuntimeError(ran.stdout[-600:])
        checks = json.loads(found.read_text())["checks"]
    failed = {check["name"]: check["value"] for check in checks if not check["ok"]}
    yield measured(f"checks that hold, of {len(checks)}", "checks", [len(checks) - len(failed)], failed=failed)


def cold_start(asked: Asked) -> Lines:
    """Process start to the first step in the metrics, without and with programs compiled before; data is prepared."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, programs = Path(scratch), Path(scratch) / "programs"
        spent: dict[str, list[float]] = {"first": [], "cold": [], "warm": []}
        for kind in ("first",) if asked.dry_run else ("first", "cold", "warm", "warm"):
            if kind == "cold":
                shutil.rmtree(programs, ignore_errors=True)
            shutil.rmtree(folder / "run", ignore_errors=True)
            if asked.has_time(5):
                spent[kind].append(first_step(asked, folder, programs))
        for kind, times in spent.items():
            if times:
                yield measured(f"process start to first step, {kind}", "s", times)


def first_step(asked: Asked, folder: Path, programs: Path) -> float:
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "itjax.main", *quickstart(asked, folder), "--config.steps=2", "--config.log.every=1"],
        env={
            **os.environ,
            "XDG_CACHE_HOME": str(folder / "cache"),
            "JAX_COMPILATION_CACHE_DIR": str(programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while process.poll() is None and not has_stepped(folder / "run"):
            if not asked.has_time(0):
                raise TimeoutError("no step in the time there is")
            time.sleep(0.02)
        spent = time.perf_counter() - started
        said, _ = process.communicate(timeout=max(1.0, asked.until - time.monotonic()))
        if process.returncode:
            raise RuntimeError(said[-600:])
        return spent
    finally:
        process.kill()


def has_stepped(run_dir: Path) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() and '"loss"' in metrics.read_text()


def checkpoint(asked: Asked) -> Lines:
    """What a save that runs behind the steps costs them, and how fast it writes."""
    run, config = asked_run(asked, "train 1b attention")
    training = Training(run, config)
    size = sum(x.nbytes for x in jax.tree.leaves(training.state))
    quiet = [timed(training.step) for _ in range(6)][2:]
    with tempfile.TemporaryDirectory() as scratch:
        saved = Checkpoints(Path(scratch) / "checkpoints", Checkpoint())
        blocked, during, whole = [], [], []
        for number in range(1, 3 if asked.has_time(60) else 2):
            started = time.perf_counter()
            saved.save(training.state, DataPosition(number, "benchmark"), {}, {})
            blocked.append(time.perf_counter() - started)
            during.append([timed(training.step) for _ in range(4)])
            saved.wait()
            whole.append(time.perf_counter() - started)
        saved.close()
    usual = float(np.median(quiet))
    yield measured("seconds that save() blocks", "s", blocked, bytes=size)
    yield measured("excess of the next four steps", "s", [sum(steps) - 4 * usual for steps in during])
    yield measured("step without a save", "s", quiet)
    yield measured("written", "GB/s", [size / one / 1e9 for one in whole])


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - started


def plan(asked: Asked) -> Lines:
    """The plan of what was measured before, against it."""
    items = json.loads(asked.record.read_text())["items"] if asked.record.exists() else {}
    for name in TRAINS:
        found = {line["name"]: line["median"] for line in items.get(name, {}).get("results", ())}
        if "step" in found and asked.has_time(10):
            yield from planned(asked, name, found)


def planned(asked: Asked, name: str, found: Mapping[str, float]) -> Lines:
    run, _ = asked_run(asked, name)
    chip = chips.chip_of(jax.devices()[0].device_kind)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "plan.json"
        ran = command(
            asked,
            "itjax.plan",
            "--config=configs/sft_llama31_8b.py",
            f"--devices={chip.name if chip else 'cpu'}:1",
            "--no_data",
            f"--json={out}",
            f"--config.model={run.model}",
            f"--config.length={run.length}",
            f"--config.rows={run.rows}",
            "--config.accumulate=1",
            "--config.dtype=bfloat16",
            f"--config.remat={run.remat}",
            f"--config.lora.rank={run.lora.rank}",
            f"--config.optimizer.moments={run.optimizer.moments}",
            JAX_PLATFORMS="cpu",
        )
        if not out.exists():
            raise RuntimeError(ran.stdout[-600:])
        said = json.loads(out.read_text())
    peak, step = said["bytes_per_device"]["peak"], said["step_seconds_at_least"]
    if peak and "peak_bytes_in_use" in found:
        yield measured(f"{name}: planned peak / measured", "ratio", [peak / 2**30 / found["peak_bytes_in_use"]])
    if step:
        yield measured(f"{name}: planned step, a bound from below / measured", "ratio", [step / found["step"]])


ITEMS: Mapping[str, Callable[[Asked], Lines]] = {
    "ceiling": ceiling,
    "agreement": agreement,
    "attention": attention_speed,
    **dict.fromkeys(TRAINS, train),
    "verify float32": verify,
    "verify bfloat16": verify,
    "checkpoint": checkpoint,
    "cold start": cold_start,
    "plan": plan,
}


def main() -> None:
    """One item: facts of the device, then its lines, each written when it is known."""
    name, lines, record, seconds, *dry = sys.argv[1:]
    asked = Asked(name, DRY if dry else REAL, Path(record), time.monotonic() + float(seconds))
    device = ITEMS[name] not in (verify, cold_start)  # these leave the device to the commands that they start
    facts = {"device": jax.devices()[0].device_kind} if device else {}
    with Path(lines).open("a") as file:
        print(json.dumps(facts), file=file, flush=True)
        for line in ITEMS[name](asked):
            print(json.dumps(line), file=file, flush=True)


if __name__ == "__main__":
    main()
