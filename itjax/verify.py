"""Prove the invariances on your own config and devices: same loss and gradient, however the work is cut.

    python -m itjax.verify --config=configs/quickstart.py

Exit 0 when all hold, 4 when one fails. The batch is the first rows of the run's real data, the model is the run's own.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from itjax import alike, cli, parts
from itjax.base import freeze, tree
from itjax.base.records import PackedBatch
from itjax.base.schema import REMAT, Lora, Parallel, Run
from itjax.data.loader import Loader
from itjax.data.prepare import Data
from itjax.models import attending, lora
from itjax.models.config import ModelConfig
from itjax.models.model import Model, build
from itjax.objectives.sft import sft
from itjax.objectives.sums import LossSums
from itjax.parallel import cluster, layout
from itjax.parallel.mesh import AXES, mesh_for
from itjax.text import chat
from itjax.train.state import TrainState
from itjax.train.step import grad_sums

CONTRACT_BROKEN = 4
MICRO_BATCHES = (1, 2, 4)
# Relative, of the loss and of the whole gradient's norm: rounding differs with the order of sums, meaning does not.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}
EXAMPLES = 1000  # of every source whose stop tokens are looked at


@dataclass(frozen=True)
class Check:
    """One claim: `value` is how far it is from holding exactly."""

    name: str
    value: float
    tolerance: float
    ok: bool


def check(name: str, value: float, tolerance: float) -> Check:
    return Check(name, float(value), tolerance, bool(value <= tolerance))  # NaN fails


@dataclass(frozen=True)
class Outcome:
    """A loss and its gradient, on the host in float64."""

    loss: float
    grads: Any


def verify(run: Run, data: Data) -> Iterator[Check]:
    """All checks, one by one as they are done."""
    mesh = mesh_for(run.parallel)
    config = parts.model_config(run, data.tokenizer.size, parts.model_folder(run))
    run = parts.with_adapter(run, config)
    dtype = parts.dtype(run)
    rows = math.lcm(max(MICRO_BATCHES), jax.device_count())  # every mesh and number of micro-batches divides it
    loader = parts.loader_for(run, data, mesh)
    batch = first_rows(loader, rows)
    yield from data_checks(run, data, loader)
    if run.lora.rank:
        yield from adapter_checks(run, config, batch, mesh)
    if config.experts:
        yield check("experts: every choice of a token is answered", unanswered(run, config, batch, mesh), 0)

    def outcome(
        batch: PackedBatch,
        *,
        accumulate: int = 1,
        mesh: Mesh = mesh,
        chunk: int = run.loss.chunk,
        attention: str = run.attention,
        remat: str = run.remat,
    ) -> Outcome:
        model = parts.model_of(run, config, attention=attention, remat=remat)
        return gradient(run, model, batch, mesh=mesh, accumulate=accumulate, chunk=chunk)

    base = outcome(batch)

    def same(name: str, other: Outcome) -> Check:
        return check(name, distance(base, other), TOLERANCE[dtype])

    alone = unpacked(batch, rows)
    num_examples = int((alone.segments_BT.max(axis=1) > 0).sum())
    yield same(
        f"unpacked: the {num_examples} examples of {rows} rows, each alone",
        outcome(alone, accumulate=micros(alone, rows)),
    )
    for accumulate in MICRO_BATCHES[1:]:
        yield same(f"{accumulate} micro-batches", outcome(batch, accumulate=accumulate))
    axes = [axis for axis in AXES if axis != "expert" or config.experts]
    for parallel in meshes(jax.device_count(), axes, length=run.length):
        words = " x ".join(f"{axis} {getattr(parallel, axis)}" for axis in axes)
        yield same(f"mesh {words}", outcome(batch, mesh=mesh_for(parallel)))
    yield same("rows in another order", outcome(jax.tree.map(lambda x: x[::-1].copy(), batch)))
    step = mesh.shape["context"] ** 2  # rows are cut into a multiple of so many stripes
    yield same("a quarter more padding", outcome(padded(batch, -(-run.length // (4 * step)) * step)))
    for chunk in sorted({max(1, run.loss.chunk // 4), run.loss.chunk // 3 + 1} - {run.loss.chunk}):
        yield same(f"head in chunks of {chunk} tokens", outcome(batch, chunk=chunk))
    for remat in REMAT:
        if remat != run.remat:
            yield same(f"remat {remat}", outcome(batch, remat=remat))
    platform = mesh.devices.flat[0].platform
    with jax.set_mesh(mesh):
        names = attending.possible(config, platform=platform, length=run.length, dtype=dtype)
    for name in names:
        yield same(f"attention {name}", outcome(batch, attention=name))
        model = parts.model_of(run, config, attention=name)
        yield check(f"attention {name}: none across segments", leak(run, model, config, batch, mesh), 0.0)


# --- the loss and gradient of a batch ---------------------------------------------------------------------------------


def gradient(run: Run, model: Model, batch: PackedBatch, *, mesh: Mesh, accumulate: int, chunk: int) -> Outcome:
    """Loss and gradient by the train step's own function, of parameters drawn from the run's seed."""
    with jax.set_mesh(mesh):
        loss_fn = sft(model, loss=dataclasses.replace(run.loss, chunk=chunk))
        whole = NamedSharding(mesh, PartitionSpec())

        moves = lora.moving(model.abstract, run.lora)

        def sums(whole: Any, batch: PackedBatch) -> tuple[jax.Array, Any]:
            params, frozen = lora.split(whole, moves)
            state = TrainState(jnp.zeros((), jnp.int32), params, frozen, ())
            grads, total = grad_sums(loss_fn, state, batch, accumulate)
            return total.loss / total.weight, jax.tree.map(lambda g: g / total.weight, grads)

        placed = place(batch, mesh)
        loss, grads = jax.jit(sums, out_shardings=whole)(parameters(run, model, mesh), placed)
        return Outcome(float(loss), jax.tree.map(lambda g: np.asarray(g, np.float64), grads))


def place(batch: PackedBatch, mesh: Mesh) -> PackedBatch:
    """A whole batch, which every process has, as global arrays."""
    rows = len(batch.tokens_BT)
    held = layout.local_rows(mesh, rows)
    return layout.place(jax.tree.map(lambda x: x[held], batch), mesh, rows=rows)


def parameters(run: Run, model: Model, mesh: Mesh, *, noise: float = 0.02) -> Any:
    """Drawn from the seed, laid out for the mesh. With noise no scale is zero and no two are equal: nothing hides."""

    def draw(key: jax.Array) -> Any:
        flat = tree.flatten(model.init(key))
        keys = jax.random.split(jax.random.fold_in(key, 1), len(flat))
        return tree.unflatten(
            {path: _noisy(path, x, k, noise) for (path, x), k in zip(flat.items(), keys, strict=True)}
        )

    return jax.jit(draw, out_shardings=layout.shardings(model.axes, mesh, model.abstract))(jax.random.key(run.seed))


def _noisy(path: str, x: jax.Array, key: jax.Array, noise: float) -> jax.Array:
    """Quantised kernels stay as they are: on scales the noise would be many times what they are."""
    if path.endswith(("kernel/codes", "kernel/scales")):
        return x
    return x + noise * jax.random.normal(key, x.shape, x.dtype)


def distance(a: Outcome, b: Outcome) -> float:
    """The larger of the relative differences of the losses and of the gradients (norm of difference over norm)."""
    difference = sum(
        float(((x - y) ** 2).sum()) for x, y in zip(*map(jax.tree.leaves, (a.grads, b.grads)), strict=True)
    )
    size = sum(float((x**2).sum()) for x in jax.tree.leaves(a.grads))
    return max(abs(a.loss - b.loss) / abs(a.loss), math.sqrt(difference / size))


def leak(run: Run, model: Model, config: ModelConfig, batch: PackedBatch, mesh: Mesh) -> float:
    """Changes the first document of every row and returns how far any logit of the other documents moves."""
    segments = batch.segments_BT
    changed = np.where(segments == 1, (batch.tokens_BT + 1) % config.vocab, batch.tokens_BT).astype(np.int32)
    with jax.set_mesh(mesh):
        params = parameters(run, model, mesh)
        whole = NamedSharding(mesh, PartitionSpec())
        logits = jax.jit(
            lambda params, batch: model.unembed(params, model.features(params, batch).x_BTD), out_shardings=whole
        )

        def run_on(tokens: np.ndarray) -> np.ndarray:
            return np.asarray(logits(params, place(batch._replace(tokens_BT=tokens), mesh)), np.float64)

        before, after = run_on(batch.tokens_BT), run_on(changed)
    assert np.abs(before - after)[segments == 1].max() > 0, "the change must be seen in its own document"
    others = segments > 1
    return float(np.abs(before - after)[others].max()) if others.any() else 0.0


# --- what adapters and experts must satisfy ---------------------------------------------------------------------------


def adapter_checks(run: Run, config: ModelConfig, batch: PackedBatch, mesh: Mesh) -> Iterator[Check]:
    """Adapters say nothing at first, and say the same as a part of the kernels."""
    model, tolerance = parts.model_of(run, config), TOLERANCE[parts.dtype(run)]

    def apart(with_adapters: Any, without: Any, *, base: str) -> float:
        other = build(
            config, dtype=parts.dtype(run), attention=run.attention, remat=run.remat, lora=Lora(also=run.lora.also),
            base=base,
        )  # fmt: skip
        ours, theirs = (mean_loss(run, m, p, batch, mesh) for m, p in ((model, with_adapters), (other, without)))
        return abs(ours - theirs) / abs(theirs)

    with jax.set_mesh(mesh):
        first = lora.begin(parameters(run, model, mesh, noise=0.0), run.lora)
        base = tree.unflatten({path: x for path, x in tree.flatten(first).items() if not lora.is_adapter(path)})
        begins = apart(first, base, base=parts.base(run))
        moved, wide = parameters(run, model, mesh), jax.tree.map(_wide, parameters(run, model, mesh))
        merges = apart(moved, lora.merge(wide, run.lora, dtype="float32"), base="float32")
    yield check("adapters: the first step is the base", begins, tolerance)
    yield check("adapters: merged is unmerged", merges, tolerance)


def _wide(x: jax.Array) -> jax.Array:
    """So that a kernel is not rounded when it takes its adapters in; scales and codes of quantised ones stay right."""
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x


def mean_loss(run: Run, model: Model, params: Any, batch: PackedBatch, mesh: Mesh) -> float:
    """The loss that the step divides: without a gradient, and nothing is drawn."""
    sums = _forward(run, model, params, batch, mesh)
    return float(sums.loss / sums.weight)


def unanswered(run: Run, config: ModelConfig, batch: PackedBatch, mesh: Mesh) -> float:
    """Choices of all tokens in all layers that were not counted, or that a capacity left without an answer."""
    assert config.experts is not None
    model = parts.model_of(run, config)
    with jax.set_mesh(mesh):
        aux = _forward(run, model, parameters(run, model, mesh), batch, mesh).aux
    choices = config.layers * config.experts.chosen * int((batch.segments_BT > 0).sum())
    return abs(choices - float(aux["expert_tokens"].sum())) + float(aux["dropped"].sum())


def _forward(run: Run, model: Model, params: Any, batch: PackedBatch, mesh: Mesh) -> LossSums:
    loss_fn, whole = sft(model, loss=run.loss), NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda params, batch: loss_fn(params, {}, batch), out_shardings=whole)(params, place(batch, mesh))


# --- the same examples, laid out otherwise ----------------------------------------------------------------------------


def first_rows(loader: Loader, rows: int) -> PackedBatch:
    """The first rows of the run, all of the global batch."""
    batches: list[PackedBatch] = []
    for step in range(loader.num_steps):
        batches.append(loader.batch(step, all_rows=True))
        if sum(len(batch.tokens_BT) for batch in batches) >= rows:
            break
    joined = PackedBatch(*(np.concatenate(arrays)[:rows] for arrays in zip(*batches, strict=True)))
    missing = rows - len(joined.tokens_BT)
    return jax.tree.map(lambda x: np.pad(x, ((0, missing), (0, 0))), joined)


def unpacked(batch: PackedBatch, multiple: int) -> PackedBatch:
    """Every segment alone at the start of a row of its own; empty rows up to a multiple.

    segments_BT  [[1, 1, 2, 0]]   ->   [[1, 1, 0, 0], [1, 0, 0, 0]]
    """
    found = [(row, number) for row, line in enumerate(batch.segments_BT) for number in range(1, line.max() + 1)]
    size = (math.ceil(len(found) / multiple) * multiple, batch.tokens_BT.shape[1])
    alone = PackedBatch(*(np.zeros(size, x.dtype) for x in batch))
    for place, (row, number) in enumerate(found):
        here = batch.segments_BT[row] == number
        for array, original in zip(alone, batch, strict=True):
            array[place, : here.sum()] = original[row, here]
        alone.segments_BT[place, : here.sum()] = 1
    return alone


def micros(batch: PackedBatch, rows: int) -> int:
    """Into how many micro-batches of `rows` a batch divides."""
    return len(batch.tokens_BT) // rows


def padded(batch: PackedBatch, extra: int) -> PackedBatch:
    """The same rows, longer by `extra` positions that hold nothing."""
    return jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, extra))), batch)


def meshes(num_devices: int, axes: Sequence[str], *, length: int) -> list[Parallel]:
    """Every way to write the number of devices as a product of these axes, of which rows of this length can be cut."""
    divisors = [size for size in range(1, num_devices + 1) if num_devices % size == 0]
    shapes = [shape for shape in itertools.product(divisors, repeat=len(axes)) if math.prod(shape) == num_devices]
    found = [Parallel(**{"data": 1, **dict(zip(axes, shape, strict=True))}) for shape in shapes]  # type: ignore[arg-type]
    return [parallel for parallel in found if length % parallel.context**2 == 0]


# --- what the data itself must satisfy --------------------------------------------------------------------------------


def data_checks(run: Run, data: Data, loader: Loader) -> Iterator[Check]:
    """Claims about tokens and weights, checked on packed rows against the encoded examples they came from."""
    yield check("no target across examples", crossings(run, data, loader), 0)
    if run.truncation == "drop":
        yield check("stop token supervised in every trained turn", unstopped(run, data), 0)


def crossings(run: Run, data: Data, loader: Loader) -> int:
    """Positions of the first step's rows that differ from the example that should be there, alone."""
    batch, encoded, wrong = loader.batch(0, all_rows=True), {source.name: source for source in data.train}, 0
    for number in range(run.rows):
        for placed in loader.row(number):
            here = batch.segments_BT[number] == placed.segment
            example = encoded[placed.source].example(placed.index)
            wrong += int((batch.tokens_BT[number, here] != example.tokens_T).sum())
            wrong += int((batch.targets_BT[number, here] != example.targets_T).sum())
            wrong += int(((batch.weights_BT[number, here] > 0) != (example.weights_T > 0)).sum())
            wrong += int((batch.positions_BT[number, here] != np.arange(len(example.tokens_T))).sum())
    return wrong + int((batch.weights_BT[batch.segments_BT == 0] != 0).sum())


def unstopped(run: Run, data: Data) -> int:
    """Trained turns, of the first examples of every source, whose last target is no stop token."""
    stops = np.array(sorted(chat.stop_ids(data.format, data.tokenizer)))
    wrong = 0
    for source in data.train:
        for index in range(min(len(source), EXAMPLES)):
            example = source.example(index)
            learned = np.append(example.weights_T > run.loss.prompt_weight, False)
            last = np.flatnonzero(learned[:-1] & ~learned[1:])
            wrong += int((~np.isin(example.targets_T[last], stops)).sum())
    return wrong


# --- the command ------------------------------------------------------------------------------------------------------


def command(argv: Sequence[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(f"--json=OUT  write the checks there\n\n{__doc__}")
        return 0
    values = flags.FlagValues()
    flags.DEFINE_string("json", None, "write the checks there", flag_values=values)
    run = freeze.load(argv, values)
    return cluster.together(lambda: proven(run, values.json), explain=cli.explain)


def proven(run: Run, json_file: str | None) -> int:
    """The whole command, inside `cluster.together`: prints the checks, writes them where asked to, returns the exit code."""
    cluster.agree(alike.settings(run), seconds=alike.SETTINGS_WAIT)
    console = Console(quiet=not cluster.writes())
    parts.check_model(run)
    data = parts.prepare_data(run, console=console)
    checks = shown(verify(run, data), console)
    if json_file and cluster.writes():
        result = {"ok": all(item.ok for item in checks), "checks": [asdict(item) for item in checks]}
        Path(json_file).write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(item.ok for item in checks) else CONTRACT_BROKEN


def shown(checks: Iterator[Check], console: Console) -> list[Check]:
    """Prints every check as it is done, then the sum of them."""
    done = []
    for item in checks:
        done.append(item)
        mark = "[green]holds[/]" if item.ok else "[red]FAILS[/]"
        console.print(
            f"{mark}  {item.name}  [dim]{item.value:.1e} of {item.tolerance:.0e} allowed[/]",
            highlight=False,
            soft_wrap=True,
        )
    failed = [item.name for item in done if not item.ok]
    console.print(f"{len(done) - len(failed)} of {len(done)} hold" + (f"; not: {', '.join(failed)}" if failed else ""))
    return done


if __name__ == "__main__":
    cli.run(command)
