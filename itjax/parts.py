"""From a config to the parts of a run: data, mesh, model, loader. Every command begins here, so all see the same run."""

import hashlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from itjax.base import tree
from itjax.base.freeze import Fault
from itjax.base.schema import Run
from itjax.data import cache, prepare
from itjax.data.loader import Loader
from itjax.data.prepare import Data
from itjax.models import families
from itjax.models.families import ModelConfig
from itjax.models.model import Model, build
from itjax.parallel import cluster, layout
from itjax.parallel.mesh import mesh_for

VOCAB_MULTIPLE = 64  # embeddings are padded to it, so that they divide over devices


@dataclass(frozen=True)
class Parts:
    """What a run is made of, besides its data."""

    config: ModelConfig
    model: Model
    mesh: Mesh
    loader: Loader

    def flops(self, step: int) -> float:
        """Useful FLOPs of a step of the loader: real tokens only, attention inside own segments only."""
        return families.train_flops(self.config, self.loader.lengths(step))

    def summary(self, run: Run) -> str:
        """A few lines that say what will be trained, on what, where."""
        report = self.loader.report()
        copies = layout.batch_copies(self.mesh, run.rows // run.accumulate)
        waste = (
            f"; {copies} devices compute the same rows, as they do not divide: see config.rows" if copies > 1 else ""
        )
        shape = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1) or "one device"
        size = tree.num_elements(self.model.abstract)
        return (
            f"model  {run.model}: {size / 1e6:.2f} M parameters, vocabulary {self.config.vocab}\n"
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


def prepare_data(run: Run, *, console: Console) -> Data:
    """The data of the run, encoded. One process fills the cache, the others then find it (or fill their own disk's)."""
    keep_compiled(run)
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
    mesh = mesh_for(run.parallel)
    config = model_config(run, data)
    model = build(config, dtype=dtype(run), attention=run.attention, remat=run.remat)
    return Parts(config, model, mesh, loader_for(run, data, mesh))


def dtype(run: Run) -> str:
    """The dtype of activations: bfloat16 where it is fast, float32 on CPU."""
    if run.dtype != "auto":
        return run.dtype
    return "float32" if jax.devices()[0].platform == "cpu" else "bfloat16"


def model_config(run: Run, data: Data) -> ModelConfig:
    """The preset with its overrides, and a vocabulary that holds every id of the tokenizer."""
    size = data.tokenizer.size
    vocab = run.architecture.vocab or -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if vocab < size:
        raise Fault(
            f"config.architecture.vocab: {vocab} is smaller than the tokenizer's {size} ids; "
            f"set it to {size} or more, or leave it out"
        )
    return families.resolve(run.model, run.architecture, vocab=vocab)


def loader_for(run: Run, data: Data, mesh: Mesh) -> Loader:
    """The loader of this process: the rows that its devices hold."""
    return prepare.loader(run, data, local_rows=layout.local_rows(mesh, run.rows), workers=run.workers)


def eval_rows(run: Run) -> int:
    """Rows of an evaluation batch: those of a micro-batch, which fit for certain."""
    return run.rows // run.accumulate
