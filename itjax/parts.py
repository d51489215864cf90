"""From a config to the parts of a run: data, mesh, model, loader. Every command begins here, so all see the same run."""

import dataclasses
import hashlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from itjax.base import tree
from itjax.base.freeze import Fault, nearest
from itjax.base.schema import Run
from itjax.data import cache, prepare
from itjax.data.loader import Loader
from itjax.data.prepare import Data
from itjax.hub import adapters
from itjax.hub.folder import Folder, check_vocabulary
from itjax.models import families, lora
from itjax.models.config import ModelConfig
from itjax.models.model import Model, Params, build
from itjax.parallel import cluster, layout
from itjax.parallel.mesh import mesh_for
from itjax.train import optimizer
from itjax.train.loop import Weights

VOCAB_MULTIPLE = 64  # embeddings are padded to it, so that they divide over devices


@dataclass(frozen=True)
class Parts:
    """What a run is made of, besides its data."""

    run: Run  # with the adapters that a PEFT folder says, if the config names one
    config: ModelConfig
    model: Model
    mesh: Mesh
    loader: Loader
    folder: Folder | None  # of the published model that the run begins with
    weights: Weights | None  # what reads the parameters of that folder; None: they are drawn from the seed

    def flops(self, step: int) -> float:
        """Useful FLOPs of a step of the loader: real tokens only, attention inside own segments only."""
        moving = 0.0 if self.run.lora.rank else 1.0  # frozen kernels need no gradient of their own
        return families.train_flops(self.config, self.loader.lengths(step), moving=moving)

    def summary(self) -> str:
        """A few lines that say what will be trained, on what, where."""
        run = self.run
        report = self.loader.report()
        copies = layout.batch_copies(self.mesh, run.rows // run.accumulate)
        waste = (
            f"; {copies} devices compute the same rows, as they do not divide: see config.rows" if copies > 1 else ""
        )
        shape = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1) or "one device"
        size = lora.num_parameters(self.model.abstract)
        moves, _ = lora.split(self.model.abstract, lora.moving(self.model.abstract, run.lora))
        trained = lora.num_parameters(moves)
        share = f", {trained / 1e6:.2f} M of them trained ({trained / size:.2%})" if trained < size else ""
        start = f"the weights of {self.folder.path}" if self.folder else "numbers from the seed: nothing is pretrained"
        return (
            f"model  {run.model}: {size / 1e6:.2f} M parameters{share}, vocabulary {self.config.real_ids:,} "
            f"in {self.config.vocab:,} rows\n"
            f"start  {start}\n"
            f"data   {report['examples']:,} examples of {len(report['sources'])} sources in {report['num_rows']:,} rows of "
            f"{run.length}; fill {report['fill']:.1%}, trained {report['trained_share']:.1%}, {report['epochs']:.2f} epochs\n"
            f"steps  {self.loader.num_steps:,} of {run.rows} rows in {run.accumulate} micro-batch"
            f"{'es' if run.accumulate > 1 else ''}\n"
            f"mesh   {shape}, {jax.device_count()} {jax.devices()[0].device_kind}, {jax.process_count()} process"
            f"{'es' if jax.process_count() > 1 else ''}{waste}"
        )


def keep_compiled(run: Run) -> None:
    """Keeps compiled programs on disk, so that a run that starts again does not compile again.

    Beside the tokenised data, per kind of processor: a home folder may be shared by machines that differ. Left alone
    where the user has set JAX_COMPILATION_CACHE_DIR.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        folder = Path(run.cache_dir) if run.cache_dir else cache.default_dir()
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled" / _processor()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _processor() -> str:
    """A short name for what this processor can execute."""
    facts = Path("/proc/cpuinfo")
    flags = (
        {line for line in facts.read_text().splitlines() if line.startswith(("flags", "Features"))}
        if facts.exists()
        else set()
    )
    return hashlib.blake2b(f"{platform.machine()} {sorted(flags)}".encode(), digest_size=8).hexdigest()


def check_model(run: Run) -> None:
    """Raises ValueError for what does not fit the model, before data is read: its name or folder, patterns of parameters.

    Only headers are read and only shapes are made; a preset has fewer ids than with any tokenizer.
    """
    folder = model_folder(run)
    if folder is not None:
        folder.check()
    config = model_config(run, folder.config.vocab if folder else 1, folder)
    run = with_adapter(run, config)
    abstract = model_of(run, config).abstract
    moves, _ = lora.split(abstract, lora.moving(abstract, run.lora))
    jax.eval_shape(optimizer.make(run.optimizer).init, moves)


def prepare_data(run: Run, *, console: Console) -> Data:
    """The data of the run, encoded. One process fills the cache, the others then find it (or fill their own disk's).

    A model that the run cannot have is told before: data may take hours.
    """
    keep_compiled(run)
    model_folder(run)
    with _bars(console) as progress:
        if cluster.writes():
            data = prepare.prepare(run, progress=progress)
        cluster.barrier("itjax: data encoded")
        if not cluster.writes():
            data = prepare.prepare(run, progress=progress)
    return data


class _bars:
    """A progress bar for each thing that the data stage does."""

    def __init__(self, console: Console):
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console,
            transient=True,
        )  # fmt: skip
        self._tasks: dict[str, int] = {}

    def __enter__(self) -> Callable[[str, int, int], None]:
        self._progress.start()
        return self._update

    def _update(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done, total=total)  # type: ignore[arg-type]

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def set_up(run: Run, data: Data) -> Parts:
    """Mesh, model and loader of the run. Raises ValueError naming the setting that does not fit the others."""
    network, num_ids = network_of(run, data.tokenizer.size), data.tokenizer.size
    run, config, model, mesh, folder = network
    read = None if folder is None else weights(run, folder, config, mesh, num_ids=num_ids)
    return Parts(run, config, model, mesh, loader_for(run, data, mesh), folder, read)


class Network(NamedTuple):
    """What the train step of a run is made of: all but numbers."""

    run: Run  # with the adapters that a PEFT folder says
    config: ModelConfig
    model: Model
    mesh: Mesh
    folder: Folder | None


def network_of(run: Run, num_ids: int | None, devices: Sequence[jax.Device] | None = None) -> Network:
    """The run's model on a mesh of the devices that there are, or of others, which may be absent.

    `num_ids` is how many ids the run's tokenizer has; None: as many as the published model.
    """
    folder = model_folder(run)
    if num_ids is None:
        num_ids = folder.config.vocab if folder else families.PRESETS[run.model].vocab
    config = model_config(run, num_ids, folder)
    run = with_adapter(run, config)
    mesh = mesh_for(run.parallel, devices)
    return Network(run, config, model_of(run, config, platform=mesh.devices.flat[0].platform), mesh, folder)


def model_of(
    run: Run,
    config: ModelConfig,
    *,
    attention: str | None = None,
    remat: str | None = None,
    platform: str | None = None,
) -> Model:
    """The run's model; verification asks for another attention or rematerialisation, a plan for another platform."""
    return build(
        config,
        dtype=dtype(run, platform),
        attention=attention or run.attention,
        remat=remat or run.remat,
        lora=run.lora,
        base=base(run, platform),
        capacity_factor=run.parallel.capacity_factor,
        platform=platform,
    )


def dtype(run: Run, platform: str | None = None) -> str:
    """The dtype of activations: bfloat16 where it is fast, float32 on CPU. `platform` None: that of the devices there are."""
    if run.dtype != "auto":
        return run.dtype
    return "float32" if (platform or jax.devices()[0].platform) == "cpu" else "bfloat16"


def base(run: Run, platform: str | None = None) -> str:
    """How parameters are kept that are not trained."""
    if not run.lora.rank:
        return "float32"
    return dtype(run, platform) if run.lora.base == "auto" else run.lora.base


def model_folder(run: Run) -> Folder | None:
    """The published model that the run begins with, if it names one. Raises ValueError where the run cannot have it."""
    if run.model in families.PRESETS:
        return None
    if run.model and Path(run.model).is_dir():
        try:
            folder = Folder.open(run.model)
        except ValueError as error:
            raise Fault(f"config.model: {error}") from None
        _check_settings(run, folder)
        return folder
    if "/" in run.model:
        raise Fault(
            f"config.model: {run.model!r}: there is no such folder; give one of a published model. Where a run began with "
            "it and it was moved, leave a link to it in its old place"
        )
    known = list(families.PRESETS)
    raise Fault(
        f"config.model: {run.model!r} is neither a folder nor a preset.{nearest(run.model, known)} "
        f"Presets: {', '.join(known)}"
    )


def _check_settings(run: Run, folder: Folder) -> None:
    given = [name for name, value in dataclasses.asdict(run.architecture).items() if value is not None]
    if given:
        raise Fault(f"config.architecture.{given[0]}: {folder.path} says what its model is made of; leave it out")
    if folder.config.max_length and run.length > folder.config.max_length:
        raise Fault(
            f"config.length: {run.length} positions, and {folder.path} was made for {folder.config.max_length}; "
            f"set config.length to {folder.config.max_length} or less"
        )


def with_adapter(run: Run, config: ModelConfig) -> Run:
    """The run with the adapters of the PEFT folder that it starts from, if it names one."""
    if not run.lora.adapter:
        return run
    read, _ = adapters.read_peft(run.lora.adapter, config)
    kept = {name: getattr(run.lora, name) for name in ("adapter", "base", "dropout", "learning_rate_multiplier")}
    return dataclasses.replace(run, lora=dataclasses.replace(read, **kept))


def model_config(run: Run, num_ids: int, folder: Folder | None) -> ModelConfig:
    """The folder's decoder, or the preset with its overrides, with a vocabulary that holds every id of the tokenizer."""
    if folder is not None:
        return _published(run, folder, num_ids)
    vocab = run.architecture.vocab or _rounded(num_ids)
    if vocab < num_ids:
        raise Fault(
            f"config.architecture.vocab: {vocab} is smaller than the tokenizer's {num_ids} ids; "
            f"set it to {num_ids} or more, or leave it out"
        )
    return dataclasses.replace(families.resolve(run.model, run.architecture, vocab=vocab), ids=num_ids)


def _published(run: Run, folder: Folder, size: int) -> ModelConfig:
    config = folder.config
    if run.new_tokens and size > config.vocab:
        config = dataclasses.replace(config, vocab=_rounded(size))
    check_vocabulary(size, config.vocab, place=f"config.tokenizer with model {folder.path}")
    return dataclasses.replace(config, ids=size)


def _rounded(size: int) -> int:
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def weights(run: Run, folder: Folder, config: ModelConfig, mesh: Mesh, *, num_ids: int) -> Weights:
    """What reads the folder's parameters onto the mesh, and those of the adapters that the run starts from.

    `num_ids` is how many ids the run's tokenizer has: those that are new begin as the mean of the others.
    """
    # The same network as its folder has it: without adapters, and with whole kernels.
    plain = build(config, dtype=dtype(run), attention=run.attention, remat=run.remat)

    def read(kept: Params) -> Params:
        own = {path: leaf for path, leaf in tree.flatten(kept).items() if not lora.is_adapter(path)}
        whole = layout.located(plain.abstract, layout.shardings(plain.axes, mesh, plain.abstract))
        like = {path: own.get(path, leaf) for path, leaf in tree.flatten(whole).items()}
        convert = adapters.quantiser(config, base(run))
        params = folder.load(tree.unflatten(like), num_ids=num_ids, convert=convert, kept=tree.unflatten(own))
        if not run.lora.adapter:
            return params
        places = tree.flatten(kept)
        _, leaves = adapters.read_peft(run.lora.adapter, config)
        return tree.unflatten(tree.flatten(params) | {path: _placed(x, places[path]) for path, x in leaves.items()})

    return read


def _placed(x: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    """An array that every process has, laid out as `like` is."""
    assert x.shape == like.shape, (x.shape, like.shape)
    return jax.make_array_from_callback(x.shape, like.sharding, lambda box: x[box].astype(like.dtype))


def loader_for(run: Run, data: Data, mesh: Mesh) -> Loader:
    """The loader of this process: the rows that its devices hold."""
    return prepare.loader(run, data, local_rows=layout.local_rows(mesh, run.rows), workers=run.workers)


def eval_rows(run: Run) -> int:
    """Rows of an evaluation batch: those of a micro-batch, which fit for certain."""
    return run.rows // run.accumulate
