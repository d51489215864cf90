"""The text of a compiled program: its instructions, and how often each of them runs.

XLA prints a program as computations that call each other; the entry is one of them.

    %body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
      %p = (s32[], f32[4]) parameter(0)
      %i = s32[] get-tuple-element(%p), index=0
      ...
    }
    ENTRY %main (x: f32[4]) -> f32[4] {
      %loop = (s32[], f32[4]) while(%start), condition=%cond, body=%body

What stands in the body of a loop runs as often as the loop does, and so on for loops in loops.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

LONGEST = 100_000  # trips that are followed before a loop counts as unknown

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BITS = {"pred": 8, "token": 0, "opaque": 0}  # where the name does not say it


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line: `%name = type opcode(operands), rest`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    text: str  # between the parentheses: of a constant its value, of a parameter its number
    rest: str

    def attribute(self, name: str) -> str | None:
        """A short one: `index=0`, `direction=LT`, `dimensions={0}`."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.rest)
        return found[1] if found else None

    @property
    def op_name(self) -> str:
        """Where in the model's code it is from."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """Of a custom call: what it calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""


@dataclass(slots=True)
class Computation:
    """Instructions by name, in the order in which they run."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""


@dataclass(slots=True)
class Module:
    """A program."""

    computations: dict[str, Computation]
    entry: str
    header: str

    @property
    def partitions(self) -> int:
        """Devices that run it together; of several slices of TPUs those of one."""
        found = re.search(r"num_partitions=(\d+)", self.header)
        return int(found[1]) if found else 1


def parse(text: str) -> Module:
    """Reads the text of `compiled.as_text()`."""
    module = Module({}, "", text[: text.find("\n")])
    current = Computation("")
    for line in text.splitlines():
        if line[:1].isspace():
            if found := _INSTRUCTION.match(line):
                root, name, kind, opcode, inside, rest = found.groups()
                operands = tuple(re.findall(r"%([\w.\-]+)", inside))
                current.instructions[name] = Instruction(name, kind, opcode, operands, inside, rest)
                if root:
                    current.root = name
        elif found := _COMPUTATION.match(line):
            current = module.computations.setdefault(found[2], Computation(found[2]))
            if found[1]:
                module.entry = found[2]
    if not module.entry:
        raise ValueError("the text of a compiled program has no ENTRY computation")
    return module


def shapes(kind: str) -> list[tuple[str, tuple[int, ...]]]:
    """The arrays of a type: "(f32[4,2]{1,0}, s32[])" -> [("f32", (4, 2)), ("s32", ())]."""
    return [(dtype, tuple(map(int, dims.split(","))) if dims else ()) for dtype, dims in _ARRAY.findall(kind)]


def size(kind: str) -> int:
    """Bytes of all arrays of a type."""
    return sum(-(-math.prod(dims) * _bits(dtype) // 8) for dtype, dims in shapes(kind))


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    return int(re.findall(r"\d+", dtype)[0])  # f32, bf16, s4, f8e4m3fn, c64


def operand(computation: Computation, instruction: Instruction, number: int) -> Instruction:
    """What makes an operand."""
    return computation.instructions[instruction.operands[number]]


@dataclass(frozen=True, slots=True)
class Run:
    """An instruction, and how often it runs in one run of the program."""

    computation: Computation
    instruction: Instruction
    times: int


class Walk:
    """All instructions of a program with how often they run. Of a conditional all branches count."""

    def __init__(self, module: Module, *, unknown_trips: int):
        self.module, self.unknown_trips = module, unknown_trips
        self.unknown: list[str] = []  # loops whose trips only the data knows

    def runs(self) -> Iterator[Run]:
        yield from self._visit(_Frame(self.module, self.module.computations[self.module.entry], ()), 1)

    def _visit(self, frame: "_Frame", times: int) -> Iterator[Run]:
        for instruction in frame.computation.instructions.values():
            yield Run(frame.computation, instruction, times)
            if instruction.opcode == "while":
                yield from self._loop(frame, instruction, times)
                continue
            if instruction.opcode in ("fusion", "call", "conditional", "custom-call") or instruction.opcode.endswith(
                "-start"
            ):
                for name in _called(instruction):
                    if name in self.module.computations and not _combines(instruction):
                        yield from self._visit(frame.call(name, instruction), times)

    def _loop(self, frame: "_Frame", instruction: Instruction, times: int) -> Iterator[Run]:
        trips = frame.trips(instruction)
        if trips is None:
            self.unknown.append(instruction.op_name or instruction.name)
            trips = self.unknown_trips
        body = self.module.computations[frame.attribute(instruction, "body")]
        yield from self._visit(_Frame(self.module, body, (frame.unchanged(instruction),)), times * trips)


def _called(instruction: Instruction) -> list[str]:
    names = _CALLED.findall(instruction.rest)
    for several in _BRANCHES.findall(instruction.rest):
        names += [name.strip().lstrip("%") for name in several.split(",")]
    return names


def _combines(instruction: Instruction) -> bool:
    """Whether what it calls is how two numbers become one, as in an all-reduce."""
    return instruction.opcode not in ("fusion", "call", "conditional", "custom-call", "async-start")


class _Frame:
    """A computation with what is known of its arguments: works out the integers that decide how often loops run.

    A value is an int, a sequence of values for a tuple, or None for what is not known without data.
    """

    def __init__(self, module: Module, computation: Computation, arguments: Sequence[Any]):
        self.module, self.computation, self.arguments = module, computation, arguments
        self._known: dict[str, Any] = {}

    def attribute(self, instruction: Instruction, name: str) -> str:
        return (instruction.attribute(name) or "").lstrip("%")

    def call(self, name: str, instruction: Instruction) -> "_Frame":
        return _Frame(self.module, self.module.computations[name], _Lazy(self, instruction.operands))

    def root(self) -> Any:
        return self.value(self.computation.root)

    def value(self, name: str) -> Any:
        if name not in self._known:
            self._known[name] = None  # whatever refers to itself
            self._known[name] = self._evaluate(self.computation.instructions[name])
        return self._known[name]

    def _evaluate(self, instruction: Instruction) -> Any:
        opcode, kind = instruction.opcode, instruction.type
        if not (kind.startswith("(") or re.match(r"(?:[su]\d+|pred)\[\]", kind)):
            return None
        if opcode == "constant":
            return _number(instruction.text)
        if opcode == "parameter":
            number = int(instruction.text)
            return self.arguments[number] if number < len(self.arguments) else None
        if opcode == "tuple":
            return _Lazy(self, instruction.operands)
        if opcode == "get-tuple-element":
            whole = self.value(instruction.operands[0])
            return None if whole is None else whole[int(instruction.attribute("index") or 0)]
        if opcode in ("copy", "bitcast", "reshape", "convert", "optimization-barrier", "copy-start", "copy-done"):
            return self.value(instruction.operands[0])
        if opcode in ("fusion", "call"):
            return self.call(_called(instruction)[0], instruction).root()
        if opcode == "while":
            return self.unchanged(instruction)
        return self._compute(instruction)

    def _compute(self, instruction: Instruction) -> int | None:
        compute: Callable[..., int] | None = _ARITHMETIC.get(instruction.opcode)
        if instruction.opcode == "compare":
            compute = _COMPARISONS.get(instruction.attribute("direction") or "")
        if compute is None:
            return None
        numbers = [self.value(name) for name in instruction.operands]
        if any(not isinstance(number, int) for number in numbers):
            return None
        return _wrapped(compute(*numbers), instruction.type)

    def trips(self, loop: Instruction) -> int | None:
        """How often a loop runs: as XLA says, else by following what its condition looks at; None where that is data."""
        if said := _TRIPS.search(loop.rest):
            return int(said[1])
        condition = self.module.computations[self.attribute(loop, "condition")]
        body = self.module.computations[self.attribute(loop, "body")]
        state = self.value(loop.operands[0])
        for trip in range(LONGEST):
            goes_on = _Frame(self.module, condition, (state,)).root()
            if not goes_on:
                return None if goes_on is None else trip
            state = _Frame(self.module, body, (state,)).root()
        return None

    def unchanged(self, loop: Instruction) -> list[Any] | None:
        """The values that every trip of a loop hands on as they are; None for the others."""
        body = self.module.computations[self.attribute(loop, "body")]
        start, root = self.value(loop.operands[0]), body.instructions[body.root]
        if start is None or root.opcode != "tuple":
            return None
        return [start[index] if _hands_on(body, name, index) else None for index, name in enumerate(root.operands)]


def _hands_on(body: Computation, name: str, index: int) -> bool:
    """Whether this instruction of a loop's body is element `index` of what the body was given."""
    instruction = body.instructions[name]
    while instruction.opcode in ("copy", "bitcast"):
        instruction = operand(body, instruction, 0)
    return (
        instruction.opcode == "get-tuple-element"
        and instruction.attribute("index") == str(index)
        and operand(body, instruction, 0).opcode == "parameter"
    )


class _Lazy(Sequence[Any]):
    """The values of instructions, each worked out when it is asked for."""

    def __init__(self, frame: _Frame, names: tuple[str, ...]):
        self.frame, self.names = frame, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        return self.frame.value(self.names[index])


def _number(text: str) -> int | None:
    if text in ("true", "false"):
        return int(text == "true")
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _wrapped(number: int, kind: str) -> int:
    """As integers of this type wrap around."""
    dtype = shapes(kind)[0][0]
    if dtype == "pred":
        return int(bool(number))
    span = 1 << _bits(dtype)
    number %= span
    return number - span if dtype.startswith("s") and number >= span // 2 else number


_ARITHMETIC: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: int(a / b) if b else 0,
    "remainder": lambda a, b: math.fmod(a, b).__int__() if b else 0,
    "minimum": min,
    "maximum": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: not a,
    "negate": lambda a: -a,
    "select": lambda choice, a, b: a if choice else b,
}
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
}


def flops(run: Run) -> int:
    """FLOPs of one execution of a product or convolution; 0 for everything else."""
    count = {"dot": _dot, "convolution": _convolution, "custom-call": _library}.get(run.instruction.opcode)
    return count(run.computation, run.instruction) if count else 0


def _dot(computation: Computation, instruction: Instruction) -> int:
    (_, out), (_, left) = shapes(instruction.type)[0], shapes(operand(computation, instruction, 0).type)[0]
    return 2 * math.prod(out) * math.prod(left[axis] for axis in _numbers(instruction, "lhs_contracting_dims"))


def _numbers(instruction: Instruction, name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", instruction.attribute(name) or "")]


def _library(computation: Computation, instruction: Instruction) -> int:
    """cuBLAS: contracted dimensions are in its config."""
    found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.rest)
    if not instruction.target.startswith("__cublas") or not found:
        return 0
    (_, out), (_, left) = shapes(instruction.type)[0], shapes(operand(computation, instruction, 0).type)[0]
    return 2 * math.prod(out) * math.prod(left[int(axis)] for axis in re.findall(r"\d+", found[1]))


def _convolution(computation: Computation, instruction: Instruction) -> int:
    """TPUs write every product as a convolution; positions of padding and between dilated ones do no work.

    dim_labels=bf01_oi01->bf01: of the input b batch, f features, 0 1 .. space; of the kernel o outputs, i inputs.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    assert labels, instruction
    (_, left), (_, right), (_, out) = (
        shapes(kind)[0]
        for kind in (operand(computation, instruction, 0).type, operand(computation, instruction, 1).type, instruction.type)
    )  # fmt: skip
    batch, features = out[labels[3].index("b")], out[labels[3].index("f")]
    inputs = right[labels[2].index("i")]
    spatial = sorted(label for label in labels[1] if label.isdigit())
    window = _window(instruction, len(spatial))
    work = 2 * batch * features * inputs
    for axis, label in enumerate(spatial):
        work *= _meetings(
            left[labels[1].index(label)],
            right[labels[2].index(label)],
            out[labels[3].index(label)],
            **{name: values[axis] for name, values in window.items()},
        )
    groups = int(instruction.attribute("batch_group_count") or 1)
    return work // groups if groups > 1 else work


def _window(instruction: Instruction, dims: int) -> dict[str, list[int]]:
    """window={size=4x1 stride=3x1 pad=1_0x0_0 lhs_dilate=2x1}; what is not written is 1, pads are 0."""
    inside = (re.search(r"window=\{([^}]*)\}", instruction.rest) or ["", ""])[1]
    said = dict(part.split("=") for part in inside.split())
    pads = [int(pad.split("_")[0]) for pad in said["pad"].split("x")] if "pad" in said else [0] * dims
    others = {
        name: [int(number) for number in said[name].split("x")] if name in said else [1] * dims
        for name in ("stride", "lhs_dilate", "rhs_dilate")
    }
    return {"pad": pads, **others}


def _meetings(
    left: int, right: int, out: int, *, pad: int, stride: int, lhs_dilate: int, rhs_dilate: int
) -> int:  # fmt: skip
    """How many pairs of output and kernel positions along one dimension fall on an element of the input."""
    span = (left - 1) * lhs_dilate
    return sum(
        0 <= place <= span and place % lhs_dilate == 0
        for o in range(out)
        for place in range(o * stride - pad, o * stride - pad + right * rhs_dilate, rhs_dilate)
    )
