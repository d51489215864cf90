"""The train step of a run on devices that may be absent: the loop's own, from shapes, and what the compiler says of it."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import jax
from jax.sharding import Mesh

from itjax import parts
from itjax.base import files
from itjax.base.schema import Parallel, Run
from itjax.kernels import cudnn
from itjax.models.config import ModelConfig
from itjax.models.model import Model
from itjax.parallel import layout, program
from itjax.parallel.mesh import mesh_for
from itjax.parallel.topology import Target
from itjax.train import loop
from itjax.train.loop import Compiled

VERSIONS = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")
FORMAT = 1  # of the files that keep what a compiler said


@dataclass(frozen=True)
class Case:
    """A run on devices: everything that its train step is made of, and no numbers."""

    run: Run  # with the adapters that a PEFT folder says
    config: ModelConfig
    model: Model
    mesh: Mesh
    target: Target
    num_steps: int

    @property
    def platform(self) -> str:
        return self.target.devices[0].platform

    @property
    def dtype(self) -> str:
        return parts.dtype(self.run, self.platform)

    @property
    def num_devices(self) -> int:
        return len(self.target.devices)

    @property
    def micro_rows(self) -> int:
        """Rows of a micro-batch, on all devices."""
        return self.run.rows // self.run.accumulate

    @cached_property
    def compiled(self) -> Compiled:
        """The step, not yet compiled, with the shapes of its state and where they lie."""
        with self.scope():
            return loop.compile_step(self.run, self.model, self.mesh, num_steps=self.num_steps)

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """The mesh, for tracing only: nothing is ever put on its devices."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            yield

    def but(self, **settings: Any) -> "Case":
        """The same with other settings of the run, by their paths with two underscores for a dot: `optimizer__moments`."""
        run = changed(self.run, settings)
        model = parts.model_of(run, self.config, platform=self.platform)
        return dataclasses.replace(self, run=run, model=model)

    def on(self, parallel: Parallel) -> "Case":
        """The same on another mesh of the same devices."""
        run = dataclasses.replace(self.run, parallel=parallel)
        return dataclasses.replace(self, run=run, mesh=mesh_for(parallel, self.target.devices))


def case_of(run: Run, num_ids: int | None, target: Target, *, num_steps: int) -> Case:
    """`num_ids` is how many ids the run's tokenizer has; None: as many as the published model.

    Raises ValueError naming the setting that does not fit the others.
    """
    network = parts.network_of(run, num_ids, target.devices)
    return Case(network.run, network.config, network.model, network.mesh, target, num_steps)


def changed(run: Any, settings: Mapping[str, Any]) -> Any:
    """`changed(run, {"optimizer__moments": "int8"})`."""
    for path, value in settings.items():
        name, _, below = path.partition("__")
        run = dataclasses.replace(run, **{name: changed(getattr(run, name), {below: value}) if below else value})
    return run


# --- what the compiler says -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What a compiled step needs on one device, and what it sends. Of a step that does not fit only how much it needs."""

    peak: int
    limit: int | None  # that the compiler itself keeps to
    compiles: bool
    arguments: int = 0
    temporaries: int = 0
    host: int = 0
    flops: float | None = None
    received: Mapping[str, int] = field(default_factory=dict)  # kind of collective -> bytes in a step
    crossing: int = 0  # of them, over the network
    notes: Sequence[str] = ()
    remade: Sequence[str] = ()  # arrays that are laid out anew by way of a whole copy
    seconds: float = 0.0  # to trace and compile


def measure(case: Case, *, folder: Path) -> Measured:
    """Compiles the step, or finds in `folder` what compiling the same program said before."""
    began = time.monotonic()
    with case.scope(), _absent(case.target):
        shapes = layout.batch_shapes(case.mesh, rows=case.run.rows, length=case.run.length)
        lowered = cast(jax.stages.Wrapped, case.compiled.step).lower(case.compiled.abstract, shapes)
    options: dict[str, Any] = dict(program.compile_options(case.platform))
    path = folder / f"{_name(case, lowered.as_text(), options)}.json"
    if path.exists():
        return Measured(**json.loads(path.read_text()))
    with program.warnings() as said, _uncached():
        try:
            executable = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if (exceeded := program.exceeded(error)) is None:
                raise
            executable, (needed, limit) = None, exceeded
    if executable is None:
        measured = Measured(needed, limit, compiles=False, seconds=time.monotonic() - began)
    else:
        found = program.read(executable, case.mesh, unknown_trips=_chunks(case))
        memory = found.memory
        measured = Measured(
            peak=memory.peak,
            limit=None,
            compiles=True,
            arguments=memory.arguments,
            temporaries=memory.temporaries,
            host=memory.host_arguments + memory.host_temporaries,
            flops=found.flops,
            received=found.received(),
            crossing=found.crossing(),
            notes=found.notes,
            remade=tuple(program.involuntary(said.text)),
            seconds=time.monotonic() - began,
        )
    files.write_private(folder, path.name, json.dumps(dataclasses.asdict(measured)).encode())
    return measured


def _absent(target: Target) -> contextlib.AbstractContextManager[None]:
    """Within, GPUs that are not here are asked about as if they were."""
    silicon = target.chip.silicon
    return cudnn.absent(f"{silicon.capability}.0") if silicon else contextlib.nullcontext()


def _chunks(case: Case) -> int:
    """How often the head is gone through in a micro-batch when every position has a loss: only data knows a smaller number."""
    positions = case.micro_rows * case.run.length
    shards = math.prod(case.mesh.shape[axis] for axis in layout.RULES["shards"])
    return -(-positions // shards // case.run.loss.chunk) or 1


def _name(case: Case, text: str, options: Mapping[str, Any]) -> str:
    """Of everything that a compiler's answer depends on."""
    facts = [FORMAT, case.target.name, sorted(options.items()), versions(), os.environ.get("XLA_FLAGS", ""), text]
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


def versions() -> dict[str, str]:
    """Of what compiles, as far as it is installed."""
    installed = {name.metadata["Name"]: name.version for name in importlib.metadata.distributions()}
    return {name: installed[name] for name in VERSIONS if name in installed}


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Without jax's own cache of programs: it keeps those for absent devices and then cannot read them."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
