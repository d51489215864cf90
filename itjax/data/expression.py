"""Values made from a row by a closed list of operations: nothing can be called, and nothing reached but the row.

An expression is a nested tuple, the operation first:

    row         {"choices": {"text": ["red", "blue"], "label": ["A", "B"]}, "answer": "B"}
    expression  ("item", ("item", ("name", "choices"), ("is", "text")),
                         ("position", ("item", ("name", "choices"), ("is", "label")), ("name", "answer")))
    value       "blue"

Families that come from elsewhere (`itjax/data/promptsource.py`) are translated into these.
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Expression = tuple[Any, ...]
Draw = Callable[[int, int], int]  # (number of the draw, of how many things) -> which

LONGEST_RANGE = 1000
LONGEST_TEXT = 1 << 20


def evaluate(expression: Expression, names: Mapping[str, Any], draw: Draw) -> Any:
    """The value. Raises ValueError for what the row does not have or cannot give."""
    operation, *operands = expression
    if operation in _SPECIAL:
        return _SPECIAL[operation](operands, names, draw)
    values = [evaluate(operand, names, draw) for operand in operands]
    try:
        return _PLAIN[operation](*values)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{operation} cannot be had of {_words(values)} ({type(error).__name__})") from None


def text(value: Any) -> str:
    """A value that reads as text; a list or nothing at all does not."""
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)):
        return str(value)
    raise ValueError(f"{type(value).__name__} is not a text")


def _is(operands: list[Any], names: Mapping[str, Any], draw: Draw) -> Any:
    return operands[0]


def _name(operands: list[Any], names: Mapping[str, Any], draw: Draw) -> Any:
    if operands[0] not in names:
        raise ValueError(f"{operands[0]!r} is not in the row; known: {sorted(names)}")
    return names[operands[0]]


def _if(operands: list[Any], names: Mapping[str, Any], draw: Draw) -> Any:
    test, then, otherwise = operands
    return evaluate(then if evaluate(test, names, draw) else otherwise, names, draw)


def _draw(operands: list[Any], names: Mapping[str, Any], draw: Draw) -> Any:
    """One of a list; the same one wherever the draw of this number stands."""
    number, things = operands[0], evaluate(operands[1], names, draw)
    if not isinstance(things, (list, tuple, str)) or not things:
        raise ValueError(f"there is nothing to choose from in {_words([things])}")
    return things[draw(number, len(things))]


def _for(operands: list[Any], names: Mapping[str, Any], draw: Draw) -> str:
    """The body once for each thing, one behind the other; `loop.index` counts from 1."""
    targets, things, body = operands
    parts = []
    for index, thing in enumerate(_things(evaluate(things, names, draw))):
        bound = dict(zip(targets, thing, strict=True)) if len(targets) > 1 else {targets[0]: thing}
        loop = {"index": index + 1, "index0": index}
        parts.append(text(evaluate(body, {**names, **bound, "loop": loop}, draw)))
    return "".join(parts)


def _things(value: Any) -> Iterator[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{_words([value])} is not a list")
    return iter(value)


def _item(value: Any, key: Any) -> Any:
    if not isinstance(value, (Mapping, list, tuple, str)):
        raise TypeError
    return value[key]


def _position(things: Any, thing: Any) -> int:
    if thing not in _things(things):
        raise ValueError(f"{_words([thing])} is not in the list")
    return list(things).index(thing)


def _concatenated(*parts: Any) -> str:
    return "".join(map(text, parts))


def _joined(things: Any, between: str) -> str:
    return between.join(text(thing) for thing in _things(things))


def _stripped(things: Any) -> list[str]:
    return [text(thing).strip() for thing in _things(things)]


def _replaced(whole: str, old: str, new: str) -> str:
    if len(whole) * max(1, len(new)) > LONGEST_TEXT * max(1, len(old)):
        raise ValueError("the text would be too long")
    return text(whole).replace(old, new)


def _range(*bounds: int) -> list[int]:
    numbers = range(*bounds)
    if len(numbers) > LONGEST_RANGE:
        raise ValueError(f"range of {len(numbers)}; at most {LONGEST_RANGE}")
    return list(numbers)


def _negated(value: Any) -> Any:
    if isinstance(value, (int, float)):
        return -value
    raise TypeError


def _added(first: Any, second: Any) -> Any:
    if isinstance(first, str) != isinstance(second, str):
        raise TypeError
    return first + second


def _words(values: list[Any]) -> str:
    return ", ".join(repr(value)[:40] for value in values)


_SPECIAL: dict[str, Callable[[list[Any], Mapping[str, Any], Draw], Any]] = {
    "is": _is,
    "name": _name,
    "if": _if,
    "draw": _draw,
    "for": _for,
}
_PLAIN: dict[str, Callable[..., Any]] = {
    "item": _item,
    "slice": lambda value, start, stop: value[slice(start, stop)],
    "list": lambda *things: list(things),
    "pairs": lambda *things: dict(zip(things[::2], things[1::2], strict=True)),
    "position": _position,
    "text": _concatenated,
    "join": _joined,
    "strip each": _stripped,
    "replace": _replaced,
    "strip": lambda whole, characters: text(whole).strip(characters),
    "lower": lambda whole: text(whole).lower(),
    "upper": lambda whole: text(whole).upper(),
    "capitalize": lambda whole: text(whole).capitalize(),
    "title": lambda whole: text(whole).title(),
    "length": len,
    "number": int,
    "range": _range,
    "zip": lambda *lists: [list(things) for things in zip(*lists, strict=False)],
    "add": _added,
    "sub": operator.sub,
    "negative": _negated,
    "not": operator.not_,
    "and": lambda first, second: first and second,
    "or": lambda first, second: first or second,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda thing, things: thing in things,
    "not in": lambda thing, things: thing not in things,
}
