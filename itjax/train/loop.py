"""The story of a run: begin or resume, step by step, held-out scores when due, checkpoints when due."""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from itjax.base import freeze
from itjax.base.files import write_whole
from itjax.base.records import DataPosition, PackedBatch
from itjax.base.schema import Run
from itjax.data.loader import Loader
from itjax.models.model import Model, Params, join
from itjax.objectives.sft import sft
from itjax.parallel import cluster, layout
from itjax.train import optimizer
from itjax.train.checkpoint import Checkpoints
from itjax.train.state import TrainState, abstract, fresh, state_axes
from itjax.train.step import Metrics, make_train_step
from itjax.train.watch import Facts, Watch

Evaluator = Callable[[int, Params], list[dict[str, Any]]]  # (step, parameters) -> lines of metrics.jsonl


class Stopped(Exception):
    """SIGTERM came; the checkpoint of the current step is committed."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The step of a run on a mesh, with everything that says where its state lies."""

    step: Callable[[TrainState, PackedBatch], tuple[TrainState, Metrics]]
    tx: optax.GradientTransformation
    abstract: TrainState  # ShapeDtypeStructs with shardings
    shardings: TrainState


def compile_step(run: Run, model: Model, mesh: Mesh, *, num_steps: int) -> Compiled:
    """The jitted train step: state donated, every array where the rules table puts it."""
    tx = optimizer.adamw(run.optimizer)
    shapes = abstract(model, tx)
    shardings = layout.shardings(state_axes(model.axes, model.abstract, tx, {}), mesh, shapes)
    step = make_train_step(
        sft(model, z_loss=run.loss.z_loss, chunk=run.loss.chunk),
        tx,
        learning_rate=optimizer.learning_rate(run.optimizer, num_steps=num_steps),
        accumulate=run.accumulate,
    )
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return Compiled(jitted, tx, placed, shardings)


def begin(
    run: Run, model: Model, compiled: Compiled, saved: Checkpoints, loader: Loader
) -> tuple[TrainState, DataPosition]:
    """Resumes from the newest checkpoint if there is one, else draws parameters from the seed."""
    latest = saved.latest()
    if latest is None:
        draw = jax.jit(lambda key: fresh(model.init(key), {}, compiled.tx), out_shardings=compiled.shardings)
        return draw(jax.random.key(run.seed)), loader.get_state()
    state, position = saved.restore(latest, compiled.abstract)
    if run.allow_change:
        position = dataclasses.replace(position, plan=loader.plan_at(position.step))
    loader.set_state(position)
    return state, position


def train(
    run: Run,
    *,
    model: Model,
    mesh: Mesh,
    loader: Loader,
    evaluators: Sequence[Evaluator],
    flops: Callable[[int], float],
    data_manifest: Mapping[str, Any],
    console: Any,
) -> TrainState:
    """Trains until the last step and returns the final state. Call inside `jax.set_mesh(mesh)`.

    `data_manifest` says what the run is trained on and goes into every checkpoint.

    Raises Stopped after SIGTERM, once a checkpoint of the current step is committed; Aborted on a loss that stays
    not finite; ValueError for what the user can mend.
    """
    run_dir = Path(run.run_dir)
    num_steps = loader.num_steps
    compiled = compile_step(run, model, mesh, num_steps=num_steps)
    saved = Checkpoints(run_dir / "checkpoints", run.checkpoint)
    state, position = begin(run, model, compiled, saved, loader)
    start = position.step
    watch = Watch(
        run_dir,
        run.log,
        start=start,
        num_steps=num_steps,
        max_skips=run.optimizer.max_skips,
        writes=cluster.writes(),
        console=console,
    )
    if start:
        watch.say(f"resuming {run_dir} at step {start} of {num_steps}")
    config = dataclasses.asdict(run)
    with contextlib.closing(watch), contextlib.closing(saved), contextlib.closing(loader), _sigterm() as stop:
        if start == 0 and evaluators:
            watch.scores(0, _scores(evaluators, 0, state))
        for number, batch, waited in _batches(loader, start, num_steps):
            state, metrics = compiled.step(state, layout.place(batch, mesh, rows=run.rows))
            watch.note(number, metrics, _facts(loader, number, waited, flops))
            is_last = number == num_steps
            is_due = run.evaluation.every and number % run.evaluation.every == 0
            if evaluators and (is_last or is_due):
                watch.flush()
                watch.scores(number, _scores(evaluators, number, state))
            if is_last or stop.is_set or number % run.checkpoint.every == 0:
                watch.flush()  # the lines up to a checkpoint are on disk before the checkpoint is
                saved.save(state, loader.get_state(), config, data_manifest)
            if stop.is_set:
                saved.wait()
                watch.say(f"SIGTERM: step {number} is saved; the same command goes on from there")
                raise Stopped
        watch.flush()
        saved.wait()
    return state


def _scores(evaluators: Sequence[Evaluator], number: int, state: TrainState) -> list[dict[str, Any]]:
    params = join(state.params, state.frozen)
    return [line for evaluate in evaluators for line in evaluate(number, params)]


def _batches(loader: Loader, start: int, num_steps: int) -> Iterator[tuple[int, PackedBatch, float]]:
    """(number of the step, its batch, seconds waited for it), for the steps that are left."""
    for number in range(start + 1, num_steps + 1):
        before = time.perf_counter()
        batch = next(loader)
        yield number, batch, time.perf_counter() - before


def _facts(loader: Loader, number: int, waited: float, flops: Callable[[int], float]) -> Facts:
    step = number - 1  # the loader counts from 0
    return Facts(
        epoch=loader.epoch(number),
        num_tokens=int(loader.lengths(step).sum()),
        num_positions=loader.num_positions,
        flops=flops(step),
        example_ids=loader.digest(step),
        input_wait_seconds=waited,
    )


@dataclasses.dataclass
class _Stop:
    is_set: bool = False


@contextlib.contextmanager
def _sigterm() -> Iterator[_Stop]:
    """Within, the first SIGTERM asks for a stop after the current step; a second one ends the process at once."""
    stop = _Stop()

    def ask(*_: object) -> None:
        stop.is_set = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    try:
        before = signal.signal(signal.SIGTERM, ask)
    except ValueError:  # not the main thread: nobody sends us signals there
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def check_run_dir(run: Run) -> None:
    """Writes the frozen config into a new run_dir, or refuses one that belongs to a run with other settings."""
    path = Path(run.run_dir) / "config.json"
    if path.exists():
        changed = freeze.differences(freeze.from_json(path.read_text(), path=str(path)), run)
        if changed and not run.allow_change:
            raise freeze.Fault(
                f"{run.run_dir}: holds a run with other settings ({'; '.join(changed)}). Use another --config.run_dir, "
                "go back to those settings, or go on regardless with --config.allow_change=True"
            )
        if not changed:
            return
    if cluster.writes():
        write_whole(path, freeze.to_json(run))
