"""What a row's fields mean: the shapes that people write, each turned into the same conversation.

    {"prompt": "2 + 2?", "completion": "4"}                                      prompt
    {"instruction": "Add.", "input": "2, 2", "output": "4"}                      instruction
    {"messages": [{"role": "user", "content": "2 + 2?"}, ...]}                   messages
    {"conversations": [{"from": "human", "value": "2 + 2?"}, ...]}               sharegpt
    {"transcript": "\\n\\nHuman: 2 + 2?\\n\\nAssistant: 4"}                         transcript
    {"prompt": {"text": "2 + 2?", "replies": [...]}}                             oasst: a tree, several conversations
    {"input": "2, 2", "output": ["4", "four"]}, with a task's definition         natural_instructions

A shape is recognised by its fields. `columns` says where fields stand that are called something else.
"""

import difflib
import json
import math
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from itjax.base.records import Conversation, Message, ToolCall
from itjax.data.strict_json import RowError, parse

Row = Mapping[str, Any]
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
CALLS = ("function_call", "tool_call")  # roles whose content is what they call
OASST_ROLES = {"prompter": "user", "assistant": "assistant"}
PREFERENCES = ({"chosen", "rejected"}, {"chosen_messages", "rejected_messages"})
SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")  # opens a turn of a transcript (hh-rlhf)
TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}
SHOWN = 40  # characters of a value in an error
KNOWN = (
    '{"messages"}, {"instruction", "output"}, {"prompt", "completion"}, {"conversations"}, OASST trees '
    "or Natural-Instructions files"
)


class Shape(NamedTuple):
    """Fields that make a shape, and how they are read."""

    fields: tuple[str, ...]
    read: Callable[[Row], Iterator[Message]]


def conversation(
    row: Any,
    *,
    source: str,
    key: str,
    shape: str,
    columns: Mapping[str, str],
    task: Row | None = None,
    number: int = 0,
) -> Conversation:
    """The conversation of a row; `number` says which of a tree. Raises RowError where the row is not of its shape.

    `columns` are in the row already (`mapped`): they only decide between shapes that it has.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"the row is {kind(row)}, not an object; known shapes: {KNOWN}", "the row is not an object")
    found = recognise(row, shape=shape, columns=columns, task=task)
    if found == "natural_instructions":
        return _instance(row, task or {}, source, key)
    if found == "oasst":
        messages, tags = _path(row, number)
    else:
        messages, tags = tuple(SHAPES[found].read(row)), {}
    if not any(message.role == "assistant" for message in messages):
        raise RowError("there is no assistant turn; each row needs an answer to learn", "no assistant turn")
    return Conversation(messages, source, key, found, tags, _tools(row))


def recognise(row: Row, *, shape: str, columns: Mapping[str, str], task: Row | None = None) -> str:
    """The name of the shape that a row has; where fields were mapped, one that uses them."""
    if shape != "auto":
        return shape
    if task is not None and not _uses(columns):
        return "natural_instructions"
    if "prompt" not in columns and is_tree(row):
        return "oasst"
    given = tuple(field for field in row if row[field] is not None)
    found = _shape_of(given, tuple(columns)) or _shape_of(tuple(row), tuple(columns))
    if found == "preference" or (not columns and isinstance(row.get("label"), bool) and "messages" in row):
        raise RowError(
            "preference data: needs a preference objective; to learn one answer as it stands, name its shape or columns",
            "preference data",
        )
    if not found:
        fields = ", ".join(sorted(map(repr, row)))
        raise RowError(f"keys [{fields}] are none of the known shapes: {KNOWN}; or name columns", "unknown shape")
    return found


@lru_cache(maxsize=1024)
def _shape_of(fields: tuple[str, ...], columns: tuple[str, ...]) -> str:
    """The shape that these fields make. Two answers, or one with a verdict, are for another objective."""
    there = set(fields)
    if not columns and any(there >= pair for pair in PREFERENCES):
        return "preference"
    fits = [name for name, known in SHAPES.items() if there >= set(known.fields) and name != "text"]
    best = max(fits, key=lambda name: not set(columns).isdisjoint(SHAPES[name].fields), default="")
    return best or ("text" if "completion" in columns and "completion" in there else "")


def _uses(columns: Mapping[str, str]) -> bool:
    return any(not set(columns).isdisjoint(known.fields) for known in SHAPES.values())


def mapped(row: Any, columns: Mapping[str, str], *, positions: bool) -> Any:
    """The row with each field of `columns` added from the column that holds it: a name, a dotted path or a position."""
    if not columns or not isinstance(row, Mapping):
        return row
    return {**row, **{field: _column(row, column, field, positions=positions) for field, column in columns.items()}}


def _column(row: Row, column: str, field: str, *, positions: bool) -> Any:
    if column in row:
        return row[column]
    if positions and column.isdecimal() and int(column) < len(row):
        return list(row.values())[int(column)]
    value: Any = row
    for name in column.split("."):
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            raise RowError(f"column {column!r} (for {field}) is missing{_nearest(column, row)}", f"no column {column}")
    return value


def _nearest(column: str, row: Row) -> str:
    names = [str(name) for name in row]
    near = difflib.get_close_matches(column, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{hint} Columns there: {', '.join(names)}"


# ---------------------------------------------------------------------------------------------- turns


def _from_messages(row: Row) -> Iterator[Message]:
    messages = _list(row, "messages")
    if not (isinstance(messages[0], Mapping) and ROLES.get(messages[0].get("role", "")) == "system"):
        yield from _system(row)
    yield from _numbered(messages, "message", _message)


def _from_sharegpt(row: Row) -> Iterator[Message]:
    yield from _system(row)
    yield from _numbered(_list(row, "conversations"), "turn", _turn)


def _numbered(turns: Sequence[Any], name: str, read: Callable[[Any], Message]) -> Iterator[Message]:
    for number, turn in enumerate(turns, start=1):
        try:
            yield read(turn)
        except RowError as error:
            raise RowError(f"{name} {number}: {error}", error.reason) from None


def _message(message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise RowError(f"it is {kind(message)}, not an object with role and content", "a turn is not an object")
    role = _role(message, "role")
    calls = tuple(_tool_calls(message))
    if _text(message, "role") in CALLS and not calls:
        calls = _calls_in(_content(message, "content"))
        message = {**message, "content": None}
    return Message(
        role=role,
        content=_content(message, "content", optional=bool(calls)),
        learn=_learn(message),
        name=_text(message, "name", default="") or None,
        tool_calls=calls,
        tool_call_id=_text(message, "tool_call_id", default="") or None,
        reasoning=_reasoning(message),
    )


def _turn(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"it is {kind(turn)}, not an object with from and value", "a turn is not an object")
    if "from" not in turn and "role" in turn:
        return _message(turn)
    role = _role(turn, "from")
    value = _content(turn, "value")
    calls = _calls_in(value) if turn["from"] in CALLS else ()
    return Message(role, "" if calls else value, _learn(turn), tool_calls=calls, reasoning=_reasoning(turn))


def _role(turn: Row, field: str) -> str:
    role = _text(turn, field)
    if role not in ROLES:
        raise RowError(f"{field} {_shown(role)} is unknown; known: {', '.join(ROLES)}", f"unknown {field}")
    return ROLES[role]


def _content(turn: Row, field: str, *, optional: bool = False) -> str:
    """A text, or a list of parts that are texts."""
    content = turn.get(field)
    if not isinstance(content, list):
        return _text(turn, field, default="" if optional else None)
    return "".join(_part(part, number, field) for number, part in enumerate(content, start=1))


def _part(part: Any, number: int, field: str) -> str:
    if isinstance(part, str):
        return _whole(part, field)
    if not isinstance(part, Mapping) or part.get("type", "text") != "text":
        what = _shown(part.get("type")) if isinstance(part, Mapping) else kind(part)
        raise RowError(f"part {number} of {field} is {what}; only texts can be learned", f"{field} is not only text")
    return _text(part, "text" if part.get("text") is not None else "value")


def _learn(turn: Row) -> bool | float | None:
    learn = next((turn[name] for name in ("learn", "loss_weight", "weight") if turn.get(name) is not None), None)
    if learn is None or isinstance(learn, bool):
        return learn
    if isinstance(learn, (int, float)) and 0 <= learn < math.inf:
        return float(learn)
    raise RowError(f"learn is {_shown(learn)}; use true, false or a weight of at least 0", "learn is not a weight")


def _reasoning(turn: Row) -> str | None:
    names = ("reasoning_content", "reasoning", "thinking")
    return next((_text(turn, name) for name in names if turn.get(name) not in (None, "")), None)


def _tool_calls(message: Row) -> Iterator[ToolCall]:
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    if not isinstance(calls, list):
        raise RowError(f"tool_calls is {kind(calls)}, not a list", "tool_calls is not a list")
    yield from map(_call, calls)


def _call(call: Any) -> ToolCall:
    """`{"id", "type", "function": {"name", "arguments"}}`, or the inner object alone."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError("a tool call is not an object with name and arguments", "a tool call without a name")
    arguments: Any = next(
        (function[name] for name in ("arguments", "parameters") if function.get(name) is not None), {}
    )
    return ToolCall(_whole(function["name"], "name"), arguments, _text(call, "id", default="") or None)


def _calls_in(value: str) -> tuple[ToolCall, ...]:
    """The calls that a text spells as JSON."""
    try:
        found = parse(value.encode())
    except RowError as error:
        raise RowError(f"what it calls is {error}", "a tool call is not JSON") from None
    calls = found if isinstance(found, list) else [found]
    if not calls:
        raise RowError("it calls nothing", "a tool call without a name")
    return tuple(map(_call, calls))


def _tools(row: Row) -> tuple[Mapping[str, Any], ...]:
    """The functions that the row declares: a list, one alone, or JSON of these in a text."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = parse(tools.encode()) if tools.strip() else None
        except RowError as error:
            raise RowError(f"tools is {error}", "tools is not JSON") from None
    tools = [tools] if isinstance(tools, Mapping) else tools or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError(f"tools is {kind(tools)}, not a list of objects", "tools is not a list of objects")
    return tuple(tools)


# ---------------------------------------------------------------------------------------------- questions with answers


def _from_instruction(row: Row) -> Iterator[Message]:
    yield from _system(row)
    history = row.get("history") or ()
    if not isinstance(history, (list, tuple)):
        raise RowError("history is not a list of [question, answer]", "history is not a list of pairs")
    for pair in history:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise RowError("history is not a list of [question, answer]", "history is not a list of pairs")
        yield Message("user", _whole(pair[0], "history"))
        yield Message("assistant", _whole(pair[1], "history"))
    instruction, given = _text(row, "instruction"), _text(row, "input", default="")
    yield Message("user", f"{instruction}\n\n{given}" if given else instruction)
    yield Message("assistant", _text(row, "output"))


def _from_response(row: Row) -> Iterator[Message]:
    """The same with other names: `response` for `output`, `context` for `input`."""
    output = _text(row, "response")
    yield from _from_instruction({**row, "output": output, "input": row.get("input") or row.get("context")})


def _from_prompt(row: Row) -> Iterator[Message]:
    yield from _system(row)
    if isinstance(row.get("prompt"), list):  # turns that are asked, turns that are answered
        for message in _numbered(_list(row, "prompt"), "prompt", _message):
            is_answer = message.role == "assistant" and message.learn is None
            yield replace(message, learn=False) if is_answer else message
        completion = row.get("completion")
        yield from _numbered(completion if isinstance(completion, list) else [_answer(row)], "completion", _message)
        return
    yield Message("user", _text(row, "prompt"))
    yield Message("assistant", _text(row, "completion"))


def _answer(row: Row) -> dict[str, Any]:
    return {"role": "assistant", "content": _text(row, "completion")}


def _from_text(row: Row) -> Iterator[Message]:
    """A text without a question: all of it is learned."""
    yield from _system(row)
    yield Message("assistant", _text(row, "completion"))


def _system(row: Row) -> Iterator[Message]:
    system = _text(row, "system", default="")
    if system:
        yield Message("system", system)


def _from_transcript(row: Row) -> Iterator[Message]:
    """Turns in one text, each after a blank line and its speaker: `\\n\\nHuman: ...\\n\\nAssistant: ...`."""
    yield from _system(row)
    before, *turns = SPEAKER.split(_text(row, "transcript"))
    if before.strip() or not turns:
        raise RowError("transcript does not begin with 'Human: ' or 'Assistant: '", "transcript without a speaker")
    for speaker, content in zip(turns[::2], turns[1::2], strict=True):
        yield Message(TRANSCRIPT_ROLES[speaker], content.strip())


SHAPES: dict[str, Shape] = {
    "messages": Shape(("messages",), _from_messages),
    "instruction": Shape(("instruction", "output"), _from_instruction),
    "response": Shape(("instruction", "response"), _from_response),
    "prompt": Shape(("prompt", "completion"), _from_prompt),
    "sharegpt": Shape(("conversations",), _from_sharegpt),
    "transcript": Shape(("transcript",), _from_transcript),
    "text": Shape(("completion",), _from_text),
}
NAMES = ("auto", *SHAPES, "oasst", "natural_instructions")


# ---------------------------------------------------------------------------------------------- OASST trees


def is_tree(row: Any) -> bool:
    return isinstance(row, Mapping) and isinstance(row.get("prompt"), Mapping) and "text" in row["prompt"]


def count_paths(row: Any) -> tuple[int, int]:
    """Conversations in a tree, and how many of its last turns are questions that nobody answered.

    A path ends with an assistant's turn. Questions behind the last answer are cut off, and what remains is one path
    however many of them there were:

        user - assistant - user                     the paths are: user - assistant
                         \\ user                                    user - assistant - user - assistant
             \\ assistant - user - assistant
    """
    if not is_tree(row):
        return 0, 0
    paths = unanswered = 0
    for node, replies in _nodes(row["prompt"]):
        if not replies:
            unanswered += node.get("role") != "assistant"
        paths += _ends_here(node)
    return paths, unanswered


def _path(row: Row, number: int) -> tuple[tuple[Message, ...], dict[str, str]]:
    """The turns from the root to the `number`-th end (from 1), and what is known of the last."""
    found = [nodes for nodes in _paths(row) if _ends_here(nodes[-1])] if is_tree(row) else []
    if not found:
        raise RowError("there is no assistant turn in the tree; each row needs an answer", "no assistant turn")
    if number == 0 and len(found) > 1:
        raise RowError("a tree among rows that are none; name its shape: 'oasst'", "a tree among other rows")
    nodes = found[max(number, 1) - 1]
    messages = tuple(_numbered(nodes, "message", _oasst_turn))
    last = nodes[-1]
    return messages, {
        name: str(last[field]) for name, field in (("id", "message_id"), ("lang", "lang")) if field in last
    }


def path_fields(row: Any, number: int) -> Any:
    """One conversation of a tree as a row: what the tree says of itself, and the turns as messages."""
    messages, tags = _path(row, number)
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return {**{name: value for name, value in row.items() if name != "prompt"}, **tags, "messages": turns}


def _oasst_turn(node: Row) -> Message:
    role = _text(node, "role")
    if role not in OASST_ROLES:
        raise RowError(f"role {_shown(role)} is unknown; known: {', '.join(OASST_ROLES)}", "unknown role")
    return Message(OASST_ROLES[role], _text(node, "text"))


def _replies(node: Any) -> list[Any]:
    replies = node.get("replies") if isinstance(node, Mapping) else None
    if replies is not None and not isinstance(replies, list):
        raise RowError(f"replies is {kind(replies)}, not a list", "replies is not a list")
    if not all(isinstance(reply, Mapping) for reply in replies or ()):
        raise RowError("a reply is not an object", "a turn is not an object")
    return replies or []


def _nodes(root: Row) -> Iterator[tuple[Row, list[Any]]]:
    for path in _walk(root):
        yield path[-1], _replies(path[-1])


def _paths(row: Row) -> Iterator[list[Row]]:
    yield from _walk(row["prompt"])


def _walk(root: Row) -> Iterator[list[Row]]:
    """The way from the root to each node, in the order of the file."""
    waiting: list[list[Row]] = [[root]]
    while waiting:
        path = waiting.pop()
        yield path
        waiting += [[*path, reply] for reply in reversed(_replies(path[-1]))]


def _ends_here(node: Row) -> bool:
    """Whether it is the last answer on its way down: no reply below it is answered in turn."""
    if node.get("role") != "assistant":
        return False
    return not any(below.get("role") == "assistant" for path in _walk(node) for below in path[1:])


# ---------------------------------------------------------------------------------------------- Natural-Instructions


def with_task(row: Any, task: Row) -> Any:
    """An instance with what its task says of all of them: definition, category, examples."""
    if not isinstance(row, Mapping):
        return row
    shared = {name: value for name, value in task.items() if name not in ("type", "instances")}
    return {**shared, "definition": _definition(task), **row}


def _definition(task: Row) -> str:
    definition = task.get("definition")
    definition = definition[0] if isinstance(definition, list) and definition else definition
    if not isinstance(definition, str):
        raise RowError("the task has no definition; give it one in the file's head", "no definition")
    return _whole(definition, "definition")


def _instance(row: Row, task: Row, source: str, key: str) -> Conversation:
    """A Natural-Instructions instance, in the words of the benchmark's definition-only encoding.

    https://github.com/yizhongw/Tk-Instruct/blob/main/src/ni_collator.py
    """
    outputs = row.get("output")
    outputs = [outputs] if isinstance(outputs, str) else outputs
    if not isinstance(outputs, list) or not outputs or not all(isinstance(text, str) for text in outputs):
        raise RowError("output is not a text or a list of texts", "output is not a text or a list of texts")
    task = {**task, **{name: row[name] for name in ("task", "definition", "category") if name in row}}
    asked = (
        f"Definition: {_sentence(_definition(task))}\n\n"
        f"Now complete the following example -\nInput: {_sentence(_text(row, 'input'))}\nOutput: "
    )
    tags = {
        "task": str(task.get("task", source)),
        "category": ", ".join(map(str, task.get("category") or ())),
        "id": str(row.get("id", "")),
        "references": json.dumps(outputs, ensure_ascii=False),
    }
    messages = (Message("user", asked), Message("assistant", _whole(outputs[0], "output")))
    return Conversation(messages, source, key, "natural_instructions/definition", {k: v for k, v in tags.items() if v})


def _sentence(text: str) -> str:
    """The text without space around it, with a full stop unless punctuation ends it already."""
    text = text.strip()
    return text if text and text[-1] in string.punctuation else text + "."


# ---------------------------------------------------------------------------------------------- values


def _text(row: Row, name: str, *, default: str | None = None) -> str:
    value = row.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        if name not in row:
            raise RowError(f"{name} is missing", f"missing {name}")
        raise RowError(f"{name} is {kind(value)}, not a text", f"{name} is not a text")
    return _whole(value, name)


def _whole(text: str, name: str) -> str:
    """The text, if it is made of whole characters: JSON can spell half of a surrogate pair."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"{text[error.start]!r} at character {error.start}"
            raise RowError(f"{name} holds a lone surrogate {half}", f"{name} holds a lone surrogate") from None
    return text


def _list(row: Row, name: str) -> list[Any]:
    """A list of turns, or JSON of one in the cell of a table."""
    value = row.get(name)
    if name not in row:
        raise RowError(f"{name} is missing", f"missing {name}")
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse(value.encode())
    if not isinstance(value, list) or not value:
        what = "empty" if value == [] else f"{kind(value)}, not a list of turns"
        raise RowError(f"{name} is {what}", f"{name} is empty" if value == [] else f"{name} is not a list")
    return value


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= SHOWN else shown[: SHOWN - 3] + "..."


def kind(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, Mapping):
        return "an object"
    names = {type(None): "null", bool: "a truth value", int: "a number", float: "a number", str: "a text"}
    names |= {list: "a list", tuple: "a list", bytes: "bytes"}
    return names.get(type(value), f"a {type(value).__name__}")
