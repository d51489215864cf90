"""Small Python functions from a sentence; the answer is right when it passes the row's tests.

A row's `tests` are JSON: `[[arguments, expected], ...]`. They are not in the prompt, except for one `example`.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from itjax.data.tasks.family import Family, Format, Wording, phrasings
from itjax.data.templates import fill

# fmt: off
NAMES = (
    "adjust", "apply", "change", "compute", "convert", "derive", "handle", "make", "modify", "move",
    "prepare", "process", "run", "shape", "shift", "solve", "step", "transform", "turn", "update",
)
# fmt: on
NUMBERS = ("x", "y", "k", "m")
LISTS = ("xs", "items", "values", "nums")


@dataclass(frozen=True)
class Operation:
    """What a sentence says, what the code says, and what is true. `{v}` is the variable, `{a}` a small constant."""

    says: str
    code: str
    gives: str  # type of the result
    true: Callable[[Any, int], Any]


STEPS = (
    Operation("add {a} to {v}", "{v} + {a}", "int", lambda v, a: v + a),
    Operation("subtract {a} from {v}", "{v} - {a}", "int", lambda v, a: v - a),
    Operation("multiply {v} by {a}", "{v} * {a}", "int", lambda v, a: v * a),
)
THEN = (
    Operation("add {a}", "+ {a}", "int", lambda v, a: v + a),
    Operation("subtract {a}", "- {a}", "int", lambda v, a: v - a),
    Operation("multiply by {a}", "* {a}", "int", lambda v, a: v * a),
)
CHECKS = (
    Operation("check that {v} is greater than {a}", "{v} > {a}", "bool", lambda v, a: v > a),
    Operation("check that {v} is less than {a}", "{v} < {a}", "bool", lambda v, a: v < a),
    Operation("check that {v} is divisible by {a}", "{v} % {a} == 0", "bool", lambda v, a: v % a == 0),
)
LOOPS = (
    Operation("add {a} to each of {v}", "[i + {a} for i in {v}]", "list[int]", lambda v, a: [i + a for i in v]),
    Operation("multiply each of {v} by {a}", "[i * {a} for i in {v}]", "list[int]", lambda v, a: [i * a for i in v]),
    Operation(
        "keep those of {v} greater than {a}",
        "[i for i in {v} if i > {a}]",
        "list[int]",
        lambda v, a: [i for i in v if i > a],
    ),
    Operation(
        "keep those of {v} less than {a}",
        "[i for i in {v} if i < {a}]",
        "list[int]",
        lambda v, a: [i for i in v if i < a],
    ),
    Operation(
        "sum those of {v} greater than {a}",
        "sum(i for i in {v} if i > {a})",
        "int",
        lambda v, a: sum(i for i in v if i > a),
    ),
)

DEF = "def {name}({v}):\n"
DOC = '    """{doc}."""\n'
BODY = "    return {code}"
FORMATS = (
    Format("code", "Give the code only.", DEF + BODY),
    Format("doc", "Add a docstring.", DEF + DOC + BODY),
    Format("hints", "Add type hints and a docstring.", "def {name}({v}: {takes}) -> {gives}:\n" + DOC + BODY),
    Format("test", "Add a docstring and this test: {example}", DEF + DOC + BODY + "\n\nassert {example}"),
)

WORDINGS = (
    Wording("write", "Write a Python function {name}({v}) to {task}. <how>"),
    Wording("need", "I need a function in Python. Name: {name}({v}). It should {task}. <how>"),
    Wording("labelled", "Task: {task}.\nFunction: {name}({v})\nFormat: <how>"),
    Wording("system", "Write {name}({v}) to {task}.", system="You write Python. <how>"),
    Wording("before", "<how>\n\nThe function {name}({v}) should {task}."),
    Wording("define", "Please define {name}({v}) in Python: {task}.\n<how>", system="You are a programmer."),
    Wording("want", "What I want to do: {task}.\nCall it {name}({v}). <how>"),
    Wording("help", "Help me to {task}. Use a function {name}({v}).\n\n<how>", system="You help with Python."),
    Wording("code", "Python code for {name}({v}), please. It has to {task}. <how>"),
    Wording("colleague", 'A colleague asks: "How do I {task} with {name}({v})?" <how>'),
    Wording("asks", "Please write {name}({v}) for a colleague. It has to {task}.\n<how>", heldout=True),
    Wording(
        "job", "Function: {name}({v})\nWhat it should do: {task}.\n<how>", system="You are a programmer.", heldout=True
    ),
    Wording("call", "I want to {task} in Python. Call the function {name}({v}).\nFormat: <how>", heldout=True),
)


def draw(rng: random.Random) -> dict[str, str]:
    kind = rng.choice(("one step", "two steps", "check", "loop"))
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    v = rng.choice(LISTS if kind == "loop" else NUMBERS)
    first = rng.choice({"one step": STEPS, "two steps": STEPS, "check": CHECKS, "loop": LOOPS}[kind])
    says, code = _words(first, v, a)
    true = first.true
    if kind == "two steps":
        second = rng.choice(THEN)
        more, rest = _words(second, v, b)
        says, code = f"{says}, then {more}", f"({code}) {rest}"
        true = lambda value, a: second.true(first.true(value, a), b)  # noqa: E731
    name = rng.choice(NAMES)
    shown, *hidden = _lists(rng, a) if kind == "loop" else _numbers(rng, a)
    return {
        "name": name,
        "v": v,
        "task": says,
        "doc": says[0].upper() + says[1:],
        "code": code,
        "takes": "list[int]" if kind == "loop" else "int",
        "gives": first.gives,
        "example": f"{name}({shown}) == {true(shown, a)}",
        "tests": json.dumps([[[value], true(value, a)] for value in (shown, *hidden)]),
    }


def _words(operation: Operation, v: str, a: int) -> tuple[str, str]:
    row = {"v": v, "a": str(a)}
    return fill(operation.says, row), fill(operation.code, row)


def _numbers(rng: random.Random, a: int) -> list[int]:
    """One to show, then the constant itself and both sides of it: `>` is not `>=`, `<` is not `!=`."""
    return [rng.randint(1, 9), a, a - 1, a + 1, 2 * a, -3, rng.randint(10, 30)]


def _lists(rng: random.Random, a: int) -> list[list[int]]:
    return [rng.sample(range(1, 10), 2), [], [a], [a + 1, a - 1, a], [-4, 20, 0, a + 3]]


FUNCTIONS = Family(name="functions", templates=phrasings(WORDINGS, FORMATS), draw=draw, identity=("name", "v", "task"))
