"""What a compiled program will do: bytes per device by kind, what devices send each other, and what XLA said meanwhile."""

import contextlib
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.sharding import Mesh

from itjax.parallel import hlo

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# What a device sends over the network between slices of TPUs, in libtpu's words.
BETWEEN_SLICES = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
# CPU seconds of compiling the step of a small model: on CPU 5.1 instead of 8.4. For an H200 nothing tried helps: 6.5 by default,
# 6.8 at this level, 7.7 in two threads, 9.1 without autotuning; without Triton's products 5.8, but then with other memory.
SOONER: Mapping[str, Mapping[str, bool | int]] = {"cpu": {"xla_backend_optimization_level": 0}}
KERNELS = ("tpu_custom_call", "__cudnn$", "mosaic_gpu", "__gpu$xla.gpu.triton")  # their FLOPs are nowhere in the text
# Lines of XLA's stderr that say something about the program rather than about the machine that compiles it.
TELLING = ("rematerialization", "Can't reduce memory use", "Involuntary", "out of memory", "slow operation", "OOM")


@dataclass(frozen=True)
class Memory:
    """Bytes of one device. Arguments, outputs and temporaries, less what is aliased, add up to the peak."""

    arguments: int
    outputs: int
    aliased: int  # outputs that take the place of arguments
    temporaries: int  # the most that intermediate values take at one time
    code: int
    host_arguments: int
    host_outputs: int
    host_temporaries: int
    peak: int  # the most that the program needs at one time, its code aside


@dataclass(frozen=True)
class Collective:
    """One instruction by which devices exchange something."""

    kind: str  # one of KINDS
    bytes: int  # that a device receives in one execution, done as well as it can be
    crossing: int  # of them, those that come over the network between slices or nodes
    times: int  # executions in one run of the program
    group: int  # devices that take part together
    axes: tuple[str, ...]  # axes of the mesh that the group spans
    name: str  # where in the model's code


@dataclass(frozen=True)
class Program:
    """A compiled program, read."""

    memory: Memory
    collectives: tuple[Collective, ...]
    flops: int  # of products and convolutions on one device, loops counted as often as they run; not of kernels
    kernels: int  # executions of hand-written kernels, whose FLOPs are not counted
    notes: tuple[str, ...]  # what could not be known and was assumed

    def received(self) -> dict[str, int]:
        """Bytes that a device receives in one run, by kind."""
        total = dict.fromkeys(KINDS, 0)
        for one in self.collectives:
            total[one.kind] += one.bytes * one.times
        return {kind: number for kind, number in total.items() if number}

    def crossing(self) -> int:
        """Bytes that a device receives over the network between slices or nodes in one run."""
        return sum(one.crossing * one.times for one in self.collectives)

    def over(self, axes: Sequence[str]) -> int:
        """Bytes that a device receives in one run from groups that span one of these axes of the mesh."""
        return sum(one.bytes * one.times for one in self.collectives if set(axes) & set(one.axes))


def read(compiled: Any, mesh: Mesh, *, unknown_trips: int = 1) -> Program:
    """Reads what `jit(f).lower(...).compile()` gives. A loop whose count only its data knows counts as `unknown_trips`."""
    return read_text(compiled.as_text(), memory(compiled, mesh), mesh, unknown_trips=unknown_trips)


def read_text(text: str, memory: Memory, mesh: Mesh, *, unknown_trips: int) -> Program:
    module = hlo.parse(text)
    walk, where = hlo.Walk(module, unknown_trips=unknown_trips), _Places(mesh, module.partitions)
    collectives, flops, kernels = [], 0, 0
    for run in walk.runs():
        if found := _collective(run, where):
            collectives.append(found)
        flops += hlo.flops(run) * run.times
        if run.instruction.opcode == "custom-call" and run.instruction.target.startswith(KERNELS):
            kernels += run.times
    counts = {name: walk.unknown.count(name) for name in walk.unknown}
    notes = tuple(
        f"loop {name!r}: its data decides how often it runs; counted {unknown_trips} times"
        + (f" ({count} of this name)" if count > 1 else "")
        for name, count in counts.items()
    )
    return Program(memory, tuple(collectives), flops, kernels, notes)


def memory(compiled: Any, mesh: Mesh) -> Memory:
    """What a device must have.

    XLA's own peak is the one that libtpu holds against a TPU's memory; there the size of temporaries also has the gaps
    between them, and small programs count what lies in a TPU's vector memory. On CPU its peak leaves temporaries out.
    """
    stats = compiled.memory_analysis()
    outside = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    peak = outside + stats.temp_size_in_bytes
    if mesh.devices.flat[0].platform == "tpu":
        peak = max(outside, stats.peak_memory_in_bytes)
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=peak - outside,
        code=stats.generated_code_size_in_bytes,
        host_arguments=stats.host_argument_size_in_bytes,
        host_outputs=stats.host_output_size_in_bytes,
        host_temporaries=stats.host_temp_size_in_bytes,
        peak=peak,
    )


class _Places:
    """Where the numbered partitions of a program are: coordinates in the mesh, slice or node.

    A program for several slices of TPUs is written for one of them, whose partitions are numbered by themselves.
    """

    def __init__(self, mesh: Mesh, partitions: int):
        self.mesh = mesh
        slices = np.array([_slice(device) for device in mesh.devices.flat])
        positions = np.arange(mesh.size)
        self.slices = len(set(slices.tolist()))
        if partitions < mesh.size:
            positions = positions[slices == slices[0]]
        self.slice_of = slices[positions]
        self.coordinates = np.stack(np.unravel_index(positions, mesh.devices.shape), axis=1)
        self.between = self._axes(np.stack(np.unravel_index(_first_of_each(slices), mesh.devices.shape), axis=1))

    def _axes(self, coordinates: np.ndarray) -> tuple[str, ...]:
        moves = (coordinates != coordinates[:1]).any(axis=0)
        return tuple(axis for axis, moved in zip(self.mesh.axis_names, moves, strict=True) if moved)

    def axes(self, groups: Sequence[Sequence[int]]) -> tuple[str, ...]:
        """Axes along which the members of a group differ."""
        found = {axis for group in groups for axis in self._axes(self.coordinates[list(group)])}
        return tuple(axis for axis in self.mesh.axis_names if axis in found)

    def spans(self, group: Sequence[int]) -> int:
        """How many slices or nodes a group is in."""
        return len(set(self.slice_of[list(group)].tolist()))


def _slice(device: Any) -> int:
    """The slice of a TPU, the node of a GPU (compile-only GPUs all say slice 0)."""
    if device.platform == "gpu":
        return device.process_index
    return getattr(device, "slice_index", None) or 0


def _first_of_each(slices: np.ndarray) -> np.ndarray:
    """Positions of one device of each slice, those that differ least in their coordinates."""
    return np.unique(slices, return_index=True)[1]


def _collective(run: hlo.Run, where: _Places) -> Collective | None:
    instruction = run.instruction
    if instruction.opcode == "send" and "_xla_megascale_transfer_type" in instruction.rest:
        return _between_slices(run, where)
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS or _is_repeated(run):
        return None
    sent = sum(hlo.size(hlo.operand(run.computation, instruction, at).type) for at in range(len(instruction.operands)))
    if kind == "collective-permute":
        return _permute(run, where, hlo.size(hlo.operand(run.computation, instruction, 0).type))
    if kind == "all-reduce" and _keeps_a_part(run.computation):
        kind = "reduce-scatter"
    groups = replica_groups(instruction.rest, len(where.slice_of))
    group, nodes = len(groups[0]), max(map(where.spans, groups))
    return Collective(
        kind=kind,
        bytes=_received(kind, sent, group),
        crossing=_crossing(kind, sent, group, nodes),
        times=run.times,
        group=group,
        axes=where.axes(groups),
        name=instruction.op_name,
    )


def _received(kind: str, sent: int, group: int) -> int:
    """Bytes that each member of a group receives, given the bytes that it puts in."""
    if kind == "all-gather":
        return sent * (group - 1)
    return (2 if kind == "all-reduce" else 1) * sent * (group - 1) // group


def _crossing(kind: str, sent: int, group: int, nodes: int) -> int:
    """Those that come from other slices or nodes, if the members of one share the work: first inside, then across.

    An all-to-all has nothing to share, and what is gathered or reduced comes in once per node.
    """
    inside = group // nodes
    if kind == "all-gather":
        return sent * (nodes - 1)
    if kind == "all-to-all":
        return sent * (group - inside) // group
    return (2 if kind == "all-reduce" else 1) * sent * (nodes - 1) // (nodes * inside)


def _permute(run: hlo.Run, where: _Places, sent: int) -> Collective:
    pairs = [
        (int(source), int(target))
        for source, target in re.findall(r"\{(\d+),(\d+)\}", _braces(run.instruction.rest, "source_target_pairs"))
    ]
    moved = [pair for pair in pairs if pair[0] != pair[1]]
    return Collective(
        kind="collective-permute",
        bytes=sent if moved else 0,
        crossing=sent if any(where.spans(pair) > 1 for pair in moved) else 0,
        times=run.times,
        group=_ring(moved),
        axes=where.axes(moved),
        name=run.instruction.op_name,
    )


def _ring(pairs: Sequence[tuple[int, int]]) -> int:
    """How many devices hand something around."""
    after = {source: target for source, target in pairs}
    members, at = {pairs[0][0]} if pairs else {0}, pairs[0][0] if pairs else 0
    while after.get(at, at) not in members:
        at = after[at]
        members.add(at)
    return len(members)


def _between_slices(run: hlo.Run, where: _Places) -> Collective:
    """libtpu sends over the network through the host: one send and one receive per transfer, of which the first counts."""
    instruction = run.instruction
    said = (re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest) or ["", ""])[1]
    kind = BETWEEN_SLICES.get(said, "all-reduce")  # the dearest, where libtpu has a new word
    sent = hlo.size(hlo.operand(run.computation, instruction, 0).type)
    moved = sent if kind == "collective-permute" else _received(kind, sent, where.slices)
    name = (re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.rest) or ["", ""])[1]
    return Collective(kind, moved, moved, run.times, where.slices, where.between, instruction.op_name or name)


def _is_repeated(run: hlo.Run) -> bool:
    """TPUs write a collective that other work overlaps into every fusion that it runs beside; the one that starts it counts."""
    if "async_collective_fusion_config" not in run.instruction.rest:
        return False
    others = run.computation.instructions.values()
    return not any(other.opcode == "custom-call" and other.target == "AsyncCollectiveStart" for other in others)


def _keeps_a_part(computation: hlo.Computation) -> bool:
    """Whether a fusion is an all-reduce of which each device keeps its own part: a reduce-scatter in other words."""
    root = computation.instructions.get(computation.root)
    return "all-reduce-scatter" in computation.name or (
        root is not None and root.opcode == "dynamic-slice" and hlo.operand(computation, root, 0).opcode == "all-reduce"
    )


def _braces(rest: str, name: str) -> str:
    """The value of an attribute in nested braces."""
    start = rest.find(name + "={")
    if start < 0:
        return ""
    end = rest.find("}}", start)
    return rest[start : end + 2] if end > 0 else ""


def replica_groups(rest: str, partitions: int) -> list[list[int]]:
    """Who takes part together, in the three ways in which XLA writes it.

    {{0,1},{2,3}}                     lists
    [2,4]<=[2,2,2]T(1,0,2)            numbers 0 .. 7 as (2,2,2), transposed, then as (2,4): a row per group
    mesh['a'=2,'b'=4] {'b'}           numbers 0 .. 7 as (2,4); a group per a. ['a'=8] {'a':(2)4}: a as (2,4), its second part
    """
    if found := re.search(r"replica_groups=\[([\d,]+)\](<=\S+?)(?:,\s|$)", rest):
        return _iota(found[2]).reshape([int(size) for size in found[1].split(",")]).tolist()
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", rest):
        return _along(found[1], found[2], found[3])
    groups = re.findall(r"\{([\d,]+)\}", _braces(rest, "replica_groups"))
    return [[int(member) for member in group.split(",")] for group in groups] or [list(range(partitions))]


def _iota(text: str) -> np.ndarray:
    """<=[2,4]T(1,0)"""
    found = re.fullmatch(r"<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not found:
        raise ValueError(f"devices {text!r} of a compiled program: a way of writing them that is new to itjax.parallel")
    sizes = [int(size) for size in found[1].split(",")]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose([int(axis) for axis in found[2].split(",")]) if found[2] else numbers


def _along(mesh: str, devices: str | None, axes: str) -> list[list[int]]:
    sizes = {name: int(size) for name, size in (part.rsplit("=", 1) for part in mesh.split(","))}
    if devices and "[" in devices:  # [4,2]T(1,0)
        numbers = _iota("<=" + devices[devices.index("[") :]).reshape(-1)
    else:
        numbers = (
            np.array([int(one) for one in re.findall(r"\d+", devices)])
            if devices
            else np.arange(math.prod(sizes.values()))
        )
    shape: list[int] = []  # axes of the mesh; one that is taken in part as its parts
    wanted: list[int] = []
    parts: dict[str, tuple[int, int]] = {}
    for axis in filter(None, axes.split(",")):
        name, _, part = axis.partition(":")
        before, size = re.findall(r"\d+", part) if part else (1, sizes[name])
        parts[name] = int(before), int(size)
    for name, size in sizes.items():
        before, taken = parts.get(name, (1, 1))
        if name in parts:
            wanted.append(len(shape) + 1)
        shape += [before, taken, size // before // taken] if name in parts else [size]
    others = [at for at in range(len(shape)) if at not in wanted]
    members = math.prod(shape[at] for at in wanted)
    return numbers.reshape(shape).transpose([*others, *wanted]).reshape(-1, members).tolist()


@dataclass
class Said:
    """What was written to stderr; complete when the `with` is left."""

    text: str = ""
    lines: list[str] = field(default_factory=list)  # those that say something about the program


@contextlib.contextmanager
def warnings() -> Iterator[Said]:
    """Captures what XLA writes to the process's stderr, and writes it there when the `with` is left, or an error leaves it."""
    said = Said()
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            written = file.read()
            said.text = written.decode(errors="replace")
            said.lines = [line.strip() for line in said.text.splitlines() if any(word in line for word in TELLING)]
            with os.fdopen(os.dup(2), "wb") as stderr:
                stderr.write(written)


def involuntary(text: str) -> list[str]:
    """The arrays that XLA makes whole on every device because it knows no other way from one layout to the next.

    [SPMD] Involuntary full rematerialization. The compiler cannot go from sharding {A} to {B} efficiently for HLO operation
    %x = f32[6,32,64]{2,1,0} copy(...), ..., metadata={op_name="jit(step)/loss"}      "f32[6,32,64] of jit(step)/loss: {A} to {B}"
    """
    found = []
    for line in re.findall(r"Involuntary full rematerialization\.(.*)", text):
        layouts = re.search(r"from sharding (.*?) to (.*?) efficiently", line)
        array, name = re.search(r"= ([a-z]\w*\[[\d,]*\])", line), re.search(r'op_name="([^"]*)"', line)
        if layouts and array:
            line = f"{array[1]} of {name[1] if name else 'the step'}: {layouts[1]} to {layouts[2]}"
        found.append(" ".join(line.split()))
    return found


def exceeded(error: BaseException) -> tuple[int, int] | None:
    """(bytes needed, bytes there are) of the error by which a compiler says that a program does not fit; else None."""
    found = re.search(r"([\d.]+)([KMGT]?)\)? (?:exceeds available HBM \(|of )([\d.]+)([KMGT]?)", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or not found:
        return None
    needed, there = (round(float(found[at]) * 1024 ** " KMGT".index(found[at + 1] or " ")) for at in (1, 3))
    return needed, there


def compile_options(platform: str) -> dict[str, bool | int]:
    """Options for programs that are read and never run: they compile sooner, with the same memory and collectives."""
    return dict(SOONER.get(platform, {}))
