"""The story of a run: begin or resume, step by step, held-out scores when due, checkpoints when due."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from itjax.base import freeze, tree
from itjax.base.files import write_whole
from itjax.base.records import DataPosition, PackedBatch
from itjax.base.schema import Run
from itjax.data.loader import Loader
from itjax.models import lora
from itjax.models.model import Model, Params, join
from itjax.objectives.sft import sft
from itjax.parallel import cluster, flags, layout, memory, stopping
from itjax.train import checkpoint, optimizer
from itjax.train.checkpoint import Checkpoints, steps
from itjax.train.state import TrainState, abstract, evaluated, fresh, state_axes
from itjax.train.step import Metrics, make_train_step
from itjax.train.watch import Facts, Watch

Weights = Callable[[Params], Params]  # shapes with shardings -> those of the parameters that a folder has, there
Evaluator = Callable[[int, Params], list[dict[str, Any]]]  # (step, parameters) -> lines of metrics.jsonl


class Stopped(Exception):
    """SIGTERM came; the checkpoint of the current step is committed."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The step of a run on a mesh, with everything that says where its state lies."""

    step: Callable[[TrainState, PackedBatch], tuple[TrainState, Metrics]]
    tx: optax.GradientTransformation
    abstract: TrainState  # ShapeDtypeStructs with shardings
    moves: Params  # the tree of parameters with True where the optimizer moves them
    refused: Mapping[str, str]  # options of XLA that this version of it does not take, and why


def compile_step(run: Run, model: Model, mesh: Mesh, *, num_steps: int) -> Compiled:
    """The jitted train step: state donated, every array where the rules table puts it."""
    tx = optimizer.make(run.optimizer, seed=run.seed)
    moves = lora.moving(model.abstract, run.lora)
    shapes, still = lora.split(model.abstract, moves)
    axes, still_axes = lora.split(model.axes, moves)
    state = abstract(shapes, still, tx, average=run.optimizer.average)
    shardings = layout.shardings(state_axes(axes, shapes, tx, still_axes, average=run.optimizer.average), mesh, state)
    if run.optimizer.offload:
        shardings = dataclasses.replace(shardings, opt_state=memory.on_host(shardings.opt_state, state.opt_state))
    multiplier = run.lora.learning_rate_multiplier if run.lora.rank else 1.0
    step = make_train_step(
        sft(model, loss=run.loss),
        tx,
        learning_rate=optimizer.learning_rate(run.optimizer, num_steps=num_steps, multiplier=multiplier),
        accumulate=run.accumulate,
        seed=run.seed if run.lora.dropout else None,
        average=run.optimizer.average,
        offload=run.optimizer.offload,
    )
    device = flags.device_of(mesh)
    options = flags.options(device.platform, device, extra=run.parallel.flags)
    jitted = jax.jit(
        step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=dict(options.accepted) or None
    )
    return Compiled(jitted, tx, layout.located(state, shardings), moves, options.refused)


def begin(
    run: Run, model: Model, compiled: Compiled, saved: Checkpoints, loader: Loader, weights: Weights | None, base: str
) -> tuple[TrainState, DataPosition]:
    """Resumes from the newest checkpoint if there is one, else begins with published weights or numbers from the seed.

    What is frozen is in no checkpoint: it is read or drawn again. Raises Fault where `base`, the fingerprint of the folder
    that it is read from, is not the one that the checkpoint was saved with.
    """
    latest = saved.latest()
    if latest is None:
        return first(run, model, compiled, weights), loader.get_state()
    frozen: Params = {}
    if compiled.abstract.frozen:
        if not run.allow_change:
            way_out = "use another --config.run_dir, or go on regardless with --config.allow_change=True"
            checkpoint.check_base(saved.folder, latest, base, way_out=way_out)
        frozen = first_frozen(run, model, compiled, weights)
    state, position = saved.restore(latest, dataclasses.replace(compiled.abstract, frozen={}))
    if run.allow_change:
        position = dataclasses.replace(position, plan=loader.plan_at(position.step))
    loader.set_state(position)
    return dataclasses.replace(state, frozen=frozen), position


def first(run: Run, model: Model, compiled: Compiled, weights: Weights | None) -> TrainState:
    """The state before the first step."""
    params, frozen = lora.split(first_parameters(run, model, compiled, weights), compiled.moves)
    shardings = jax.tree.map(lambda x: x.sharding, compiled.abstract)
    start = jax.jit(
        lambda params: fresh(params, {}, compiled.tx, average=run.optimizer.average),
        out_shardings=dataclasses.replace(shardings, frozen={}),
        donate_argnums=0,
    )
    return dataclasses.replace(start(params), frozen=frozen)


def first_frozen(run: Run, model: Model, compiled: Compiled, weights: Weights | None) -> Params:
    """What no step changes, as it was at the start."""
    return lora.split(first_parameters(run, model, compiled, weights), compiled.moves)[1]


def first_parameters(run: Run, model: Model, compiled: Compiled, weights: Weights | None) -> Params:
    """Every parameter where it belongs on the mesh: those of the folder, with adapters from the seed, or all from the seed."""
    like = join(compiled.abstract.params, compiled.abstract.frozen)

    def draw(names: Collection[str]) -> Params:
        wanted = {path: leaf for path, leaf in tree.flatten(like).items() if path in names}
        shardings = tree.unflatten({path: leaf.sharding for path, leaf in wanted.items()})

        def some(key: jax.Array) -> Params:
            drawn = tree.flatten(model.init(key))
            return tree.unflatten({path: drawn[path] for path in wanted})

        return jax.jit(some, out_shardings=shardings)(jax.random.key(run.seed))

    flat = tree.flatten(like)
    if weights is None:
        return lora.begin(draw(flat), run.lora)
    read = tree.flatten(weights(like))
    drawn = tree.flatten(draw(flat.keys() - read.keys()))  # adapters, unless the run starts from some
    params = tree.unflatten({path: read[path] if path in read else drawn[path] for path in flat})
    return lora.begin(params, run.lora) if drawn else params


def train(
    run: Run,
    *,
    model: Model,
    mesh: Mesh,
    loader: Loader,
    weights: Weights | None,
    base: str,
    evaluators: Sequence[Evaluator],
    flops: Callable[[int], float],
    data_manifest: Mapping[str, Any],
    console: Any,
) -> TrainState:
    """Trains until the last step and returns the final state. Call inside `jax.set_mesh(mesh)`.

    `weights` reads the published parameters that training begins with, of a folder with the fingerprint `base`; None: they
    are drawn from the seed.
    `data_manifest` says what the run is trained on and goes into every checkpoint.

    Raises Stopped after SIGTERM, once a checkpoint of the current step is committed; Aborted on a loss that stays
    not finite; ValueError for what the user can mend.
    """
    run_dir = Path(run.run_dir)
    num_steps = loader.num_steps
    compiled = compile_step(run, model, mesh, num_steps=num_steps)
    saved = Checkpoints(run_dir / "checkpoints", run.checkpoint)
    state, position = begin(run, model, compiled, saved, loader, weights, base)
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
    for name, why in compiled.refused.items():
        watch.say(f"{name} is left out: {why}")
    if start:
        watch.say(f"resuming {run_dir} at step {start} of {num_steps}")
    config = dataclasses.asdict(run) | {checkpoint.BASE: base}
    with (
        contextlib.closing(watch),
        contextlib.closing(saved),
        contextlib.closing(loader),
        stopping.on_sigterm(start) as stop,
    ):
        if start == 0 and evaluators:
            watch.scores(0, _scores(run, evaluators, 0, state))
        for number, batch, waited in _batches(loader, start, num_steps):
            state, metrics = compiled.step(state, layout.place(batch, mesh, rows=run.rows))
            watch.note(number, metrics, _facts(loader, number, waited, flops))
            is_last = number == num_steps
            is_due = run.evaluation.every and number % run.evaluation.every == 0
            if evaluators and (is_last or is_due):
                watch.flush()
                watch.scores(number, _scores(run, evaluators, number, state))
            stops = stop.after(number)
            if is_last or stops or number % run.checkpoint.every == 0:
                watch.flush()  # the lines up to a checkpoint are on disk before the checkpoint is
                saved.save(dataclasses.replace(state, frozen={}), loader.get_state(), config, data_manifest)
            if stops:
                saved.wait()
                watch.say(f"SIGTERM: step {number} is saved; the same command goes on from there")
                raise Stopped
        watch.flush()
        saved.wait()
    return state


def _scores(run: Run, evaluators: Sequence[Evaluator], number: int, state: TrainState) -> list[dict[str, Any]]:
    params = join(evaluated(state, run.optimizer), state.frozen)
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


def check_run_dir(run: Run) -> None:
    """Writes the frozen config into a new run_dir, or refuses one that belongs to a run with other settings.

    A run that came to no first line of metrics has left nothing that could be mixed up.
    """
    path = Path(run.run_dir) / "config.json"
    if path.exists():
        changed = freeze.differences(freeze.from_json(path.read_text(), path=str(path)), run)
        if changed and not run.allow_change and _has_begun(path.parent):
            raise freeze.Fault(
                f"{run.run_dir}: holds a run with other settings ({'; '.join(changed)}). Use another --config.run_dir, "
                "go back to those settings, or go on regardless with --config.allow_change=True"
            )
        if not changed:
            return
    if cluster.writes():
        write_whole(path, freeze.to_json(run))


def _has_begun(run_dir: Path) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return (metrics.exists() and metrics.stat().st_size > 0) or bool(steps(run_dir / "checkpoints"))
