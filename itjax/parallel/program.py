"""What a compiled program will do: bytes per device by kind, and what devices send each other."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jax.sharding import Mesh


@dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    arguments: int
    outputs: int
    aliased: int  # outputs that take the place of arguments
    temporaries: int  # the most that intermediate values take at one time
    code: int
    host_arguments: int
    host_outputs: int
    host_temporaries: int
    peak: int  # the most that the program needs at one time, all kinds together


@dataclass(frozen=True)
class Collective:
    """One instruction by which devices exchange something."""

    kind: str  # all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute
    bytes: int  # that a device receives in one execution
    crossing: int  # of them, those that come over the network between slices or nodes, at the least
    times: int  # executions in one run of the program
    group: int  # devices that take part together
    axes: tuple[str, ...]  # axes of the mesh that the group spans
    name: str  # where in the model: op_name


@dataclass(frozen=True)
class Program:
    """A compiled program, read."""

    memory: Memory
    collectives: tuple[Collective, ...]
    flops: float | None  # of products and convolutions, one device, loops counted as often as they run
    notes: tuple[str, ...]  # what could not be known and was assumed

    def received(self) -> dict[str, int]:
        """Bytes that a device receives in one run, by kind."""
        total: dict[str, int] = {}
        for one in self.collectives:
            total[one.kind] = total.get(one.kind, 0) + one.bytes * one.times
        return total

    def crossing(self) -> int:
        """Bytes that a device receives over the network between slices or nodes in one run."""
        return sum(one.crossing * one.times for one in self.collectives)


@dataclass
class Said:
    """What XLA wrote to stderr; complete when the `with` is left."""

    text: str = ""
    lines: list[str] = field(default_factory=list)  # those of interest


def read(compiled: Any, mesh: Mesh, *, unknown_trips: int = 1) -> Program:
    """Reads what `jit(f).lower(...).compile()` gives. A loop whose count only its data knows counts as `unknown_trips`."""
    raise NotImplementedError


@contextlib.contextmanager
def warnings() -> Iterator[Said]:
    """Captures what is written to the process's stderr, and gives it back there afterwards."""
    raise NotImplementedError
    yield Said()


def involuntary(text: str) -> list[str]:
    """The arrays that XLA could only lay out anew by making them whole on every device first."""
    raise NotImplementedError


def exceeded(error: BaseException) -> tuple[int, int] | None:
    """(bytes needed, bytes there are) of the error by which a compiler says that a program does not fit; else None."""
    raise NotImplementedError


def compile_options(platform: str) -> dict[str, Any]:
    """Compiler options that make compiling faster and change neither memory nor collectives."""
    raise NotImplementedError
