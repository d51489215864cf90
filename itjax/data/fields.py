"""What a column holds and how a phrasing may say it: texts, lists, a choice among them, JSON, turns, tools, calls.

A field is said under its own name, and under its name with an ending where there is more than one way:

    text     {question}
    list     {options}         red, blue, green
             {options_or}      red, blue or green
             {options_lines}   (A) red, each on a line of its own, behind a marker
    choice   {answer}          blue
             {answer_mark}     (B), as the marker of the lines has it
    json     {record}          {"name": "Ann", "age": 7}
             {record_indented} the same over several lines
             {record_keys}     name, age
    turns    {history}         User: Hello. and so on, a line each
    tools    {tools}           JSON, a line each
    calls    {calls}           JSON, a line each
    references  {output}       the first of several right answers; the others go to the tag `references`
    examples    {positive}     objects, each in the words of the field's own pattern `each`

A marker is written as it looks: "(A) ", "a) ", "1. ", "- ". The A, a or 1 in it counts.
"""

import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from itjax.base.records import Message, ToolCall

ENDINGS: dict[str, tuple[str, ...]] = {
    "text": ("",),
    "list": ("", "_or", "_lines"),
    "choice": ("", "_mark"),
    "json": ("", "_indented", "_keys"),
    "turns": ("",),
    "tools": ("",),
    "calls": ("",),
    "references": ("",),
    "examples": ("",),
}
STRUCTURES = ("turns", "tools", "calls")  # travel with the conversation where a phrasing does not write them as text
MARKERS = ("(A) ", "A. ", "A) ", "1. ", "(1) ", "- ")
SPEAKERS = {"user": "User", "assistant": "Assistant", "system": "System", "tool": "Tool"}
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"} | {role: role for role in SPEAKERS}
_COUNTER = re.compile(r"(?<![A-Za-z0-9])[Aa1](?![A-Za-z0-9])")
_IN_ORDER = re.compile(r"\b(above|below|both|neither|none of|all of|either|[A-E] and [A-E])\b", re.IGNORECASE)


@dataclass(frozen=True)
class Field:
    """One field of a family. Without a default, a phrasing that says an optional field needs a row that has it."""

    kind: str = "text"
    about: str = ""
    optional: bool = False
    default: Any = None
    one_of: str = ""  # of a choice: the list that it is chosen from
    shuffle: bool = False  # of a list: said in another order each time, unless the items speak of their order
    first: int = 0  # of a choice: the number that rows give to the first of the list
    column: str = ""  # that holds it, where no source says otherwise; empty: named like the field
    sentence: bool = False  # said without space around it, with a full stop unless punctuation ends it already
    each: str = ""  # of examples: how one is said, with {number} and its keys
    most: int = 0  # of examples: how many are said at most; 0: all


class Listed(NamedTuple):
    """A list, with the labels that the rows give its items, where they do."""

    items: tuple[str, ...]
    labels: tuple[str, ...] = ()


def read(value: Any, field: Field) -> Any:
    """What a row holds, as its kind wants it. Raises ValueError saying what it is instead."""
    return _READERS[field.kind](value)


def position(value: Any, listed: Listed, first: int) -> int:
    """Which item a row means: by its text, its label in the row, its number, or its letter."""
    text = as_text(value).strip()
    for known in (listed.items, listed.labels, tuple(item.lower() for item in listed.items)):
        if text in known:
            return known.index(text)
    if text.lower() in (lower := [item.lower() for item in listed.items]):
        return lower.index(text.lower())
    number = int(text) - first if re.fullmatch(r"-?\d{1,6}", text) else None
    if number is None and re.fullmatch(r"[A-Za-z]", text):
        number = ord(text.lower()) - ord("a")
    if number is None or not 0 <= number < len(listed.items):
        raise ValueError(f"{text!r} is none of {list(listed.items)}, nor the number or letter of one")
    return number


def sentence(text: str) -> str:
    text = text.strip()
    return text if text and text[-1] in string.punctuation else text + "."


def keeps_order(items: Sequence[str]) -> bool:
    """Whether items speak of each other ("none of the above"), so that another order would change what they mean."""
    return any(_IN_ORDER.search(item) for item in items)


def counts(marker: str) -> bool:
    return _COUNTER.search(marker) is not None


def marked(marker: str, number: int) -> str:
    """`marked("(A) ", 2)` is "(C) "; behind the last letter come numbers."""

    def count(match: re.Match[str]) -> str:
        return str(number + 1) if match[0] == "1" or number > 25 else chr(ord(match[0]) + number)

    return _COUNTER.sub(count, marker, count=1)


def mark(marker: str, number: int) -> str:
    """What one calls an item by: "(C)" where the marker is "(A) ", and "C" where it is "A. "."""
    text = marked(marker, number).strip()
    return text if text[:1] in "([<" else text.rstrip(".):")


def say_list(items: Sequence[str], ending: str, marker: str) -> str:
    if ending == "_lines":
        return "\n".join(marked(marker, number) + item for number, item in enumerate(items))
    if ending == "_or" and len(items) > 1:
        return f"{', '.join(items[:-1])} or {items[-1]}"
    return ", ".join(items)


def say_json(value: Any, ending: str) -> str:
    if ending == "_keys":
        rows = value if isinstance(value, list) else [value]
        if not all(isinstance(row, Mapping) for row in rows):
            raise ValueError("it has no keys: it is neither an object nor a list of objects")
        return ", ".join(dict.fromkeys(key for row in rows for key in row))
    return json.dumps(value, ensure_ascii=False, indent=2 if ending == "_indented" else None)


def say_turns(turns: Sequence[Message]) -> str:
    return "\n".join(f"{SPEAKERS[turn.role]}: {turn.content}" for turn in turns)


def say_calls(calls: Sequence[ToolCall]) -> str:
    pairs = ({"name": call.name, "arguments": _parsed(call.arguments)} for call in calls)
    return "\n".join(json.dumps(pair, ensure_ascii=False) for pair in pairs)


def as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)):
        return str(value)
    if isinstance(value, list) and len(value) == 1:  # SQuAD and others: a list of references
        return as_text(value[0])
    raise ValueError(f"it is {_kind(value)}, not a text")


def _listed(value: Any) -> Listed:
    """A list of texts, JSON of one, or two lists side by side: {"text": [...], "label": [...]}."""
    value = _parsed(value)
    if isinstance(value, Mapping) and "text" in value:
        labels = tuple(as_text(label) for label in value.get("label", ()))
        return Listed(_listed(value["text"]).items, labels)
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"it is {_kind(value)}, not a list of texts")
    if all(isinstance(item, Mapping) and {"label", "text"} <= item.keys() for item in value):
        return Listed(tuple(as_text(item["text"]) for item in value), tuple(as_text(item["label"]) for item in value))
    return Listed(tuple(as_text(item) for item in value))


def _turns(value: Any) -> tuple[Message, ...]:
    """Turns with role and content, or with from and value, or texts of which the first is the user's."""
    value = _parsed(value)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"it is {_kind(value)}, not a list of turns")
    return tuple(_turn(turn, number) for number, turn in enumerate(value))


def _turn(turn: Any, number: int) -> Message:
    if isinstance(turn, str):
        return Message(("user", "assistant")[number % 2], turn, learn=False)
    if not isinstance(turn, Mapping):
        raise ValueError(f"turn {number + 1} is {_kind(turn)}, not an object with role and content")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role not in ROLES or not isinstance(content, str):
        raise ValueError(f"turn {number + 1} has role {role!r}; known: {', '.join(ROLES)}, each with a text")
    return Message(ROLES[role], content, learn=False)


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    value = _parsed(value)
    tools = [value] if isinstance(value, Mapping) else value
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"it is {_kind(value)}, not a list of functions")
    return tuple(tools)


def _calls(value: Any) -> tuple[ToolCall, ...]:
    calls = []
    for number, call in enumerate(_tools(value), start=1):
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"call {number} has no name")
        calls.append(ToolCall(function["name"], function.get("arguments", {}), call.get("id")))
    if not calls:
        raise ValueError("there is no call in it")
    return tuple(calls)


def _references(value: Any) -> tuple[str, ...]:
    if isinstance(value, (list, tuple)) and value:
        return tuple(as_text(one) for one in value)
    return (as_text(value),)


def _examples(value: Any) -> tuple[dict[str, str], ...]:
    """Objects of texts; what else an object holds is left where it is."""
    value = _parsed(value)
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(one, Mapping) for one in value):
        raise ValueError(f"it is {_kind(value)}, not a list of objects")
    return tuple({name: _references(text)[0] for name, text in one.items() if _is_said(text)} for one in value)


def _is_said(value: Any) -> bool:
    return isinstance(value, (str, int, float)) or (isinstance(value, list) and bool(value) and _is_said(value[0]))


def _parsed(value: Any) -> Any:
    """The value that a text spells where it spells JSON of a list or an object; else the value."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _json(value: Any) -> Any:
    parsed = _parsed(value)
    if isinstance(parsed, str) and parsed.lstrip()[:1] in ("[", "{"):
        raise ValueError("it is not JSON")
    return parsed


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a truth value", int: "a number", float: "a number", str: "a text"}
    return names.get(
        type(value), "an empty list" if value == [] else "a list" if isinstance(value, list) else "an object"
    )


_READERS = {
    "text": as_text,
    "list": _listed,
    "choice": as_text,
    "json": _json,
    "turns": _turns,
    "tools": _tools,
    "calls": _calls,
    "references": _references,
    "examples": _examples,
}
