"""How tools are written: their declaration, an assistant's calls, and what comes back, one small function each.

A format names its style. The words around names, arguments and results are the format's own; everything from the row
is data, whatever it looks like.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from itjax.base.records import Message, ToolCall
from itjax.text.pieces import CannotWrite, Part

Tools = Sequence[Mapping[str, Any]]
MISTRAL_ID = 9  # characters of a call's id


@dataclass(frozen=True)
class ToolStyle:
    """One way to write tools. `declared` says where: with the "system" prompt, before the "last" user's turn, or at the
    beginning of what the "first" user says."""

    declared: str
    declare: Callable[[Tools], list[Part]]
    calls: Callable[[Sequence[ToolCall], bool], list[Part]]  # the second: whether content stands before them
    results: Callable[[Sequence[Message]], list[Part]]  # of a run of tool messages
    role: str = ""  # whose turn the results are; empty: results stand alone
    content_and_calls: bool = True  # whether an assistant may speak and call in one turn
    announced: str = ""  # at the very beginning of the system prompt of a row with tools


def dumps(value: Any) -> str:
    """JSON as chat templates write it: one line, spaces after commas and colons, every character as it is."""
    return json.dumps(value, ensure_ascii=False)


def arguments(call: ToolCall) -> Any:
    """The arguments as a value; those that are JSON in a text are read, other text stays text."""
    if not isinstance(call.arguments, str):
        return call.arguments
    return _value(call.arguments) if call.arguments.strip() else {}


def _value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# ---------------------------------------------------------------------------------------- Qwen, Hermes

TOOLS_BEFORE = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>"""
TOOLS_AFTER = """
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


def _qwen_declare(tools: Tools) -> list[Part]:
    return [Part(TOOLS_BEFORE, own=True), *(Part("\n" + dumps(tool)) for tool in tools), Part(TOOLS_AFTER, own=True)]


def _qwen_calls(calls: Sequence[ToolCall], after_content: bool, write: Callable[[ToolCall], str]) -> list[Part]:
    parts = []
    for number, call in enumerate(calls):
        before = "\n" if number or after_content else ""
        parts += [
            Part(before + "<tool_call>\n", own=True),
            Part(f'{{"name": "{call.name}", "arguments": {write(call)}}}'),
            Part("\n</tool_call>", own=True),
        ]
    return parts


def _calls_as_objects(calls: Sequence[ToolCall], after_content: bool) -> list[Part]:
    """JSON that the row has as a text is written as it stands."""
    return _qwen_calls(calls, after_content, _object)


def _object(call: ToolCall) -> str:
    if not isinstance(call.arguments, str):
        return dumps(call.arguments)
    return call.arguments if call.arguments.strip() else "{}"


def _calls_quoted(calls: Sequence[ToolCall], after_content: bool) -> list[Part]:
    """JSON that the row has as a text is quoted once more, which no reader of such calls expects."""
    return _qwen_calls(calls, after_content, lambda call: dumps(call.arguments))


def _qwen_results(messages: Sequence[Message]) -> list[Part]:
    parts = []
    for number, message in enumerate(messages):
        parts += [
            Part(("\n" if number else "") + "<tool_response>\n", own=True),
            Part(message.content),
            Part("\n</tool_response>", own=True),
        ]
    return parts


# ---------------------------------------------------------------------------------------- Mistral


def _mistral_declare(tools: Tools) -> list[Part]:
    return [
        Part("[AVAILABLE_TOOLS]", own=True),
        Part(dumps([dict(tool) for tool in tools])),
        Part("[/AVAILABLE_TOOLS]", own=True),
    ]


def _mistral_calls(calls: Sequence[ToolCall], after_content: bool) -> list[Part]:
    written = [{"name": call.name, "arguments": arguments(call), "id": _mistral_id(call.id)} for call in calls]
    return [Part("[TOOL_CALLS]", own=True), Part(dumps(written))]


def _mistral_calls_without_id(calls: Sequence[ToolCall], after_content: bool) -> list[Part]:
    written = [{"name": call.name, "arguments": arguments(call)} for call in calls]
    return [Part("[TOOL_CALLS]", own=True), Part(dumps(written))]


def _mistral_result(value: Any) -> list[Part]:
    return [Part("[TOOL_RESULTS]", own=True), Part(dumps(value)), Part("[/TOOL_RESULTS]", own=True)]


def _mistral_v2_results(messages: Sequence[Message]) -> list[Part]:
    return [p for m in messages for p in _mistral_result([{"name": _name(m), "content": _value(m.content)}])]


def _mistral_v3_results(messages: Sequence[Message]) -> list[Part]:
    values = [{"content": _value(m.content), "call_id": _mistral_id(m.tool_call_id)} for m in messages]
    return [part for value in values for part in _mistral_result(value)]


def _mistral_v7_results(messages: Sequence[Message]) -> list[Part]:
    parts = []
    for message in messages:
        parts += [
            Part("[TOOL_RESULTS]", own=True),
            Part(_mistral_id(message.tool_call_id)),
            Part("[TOOL_CONTENT]", own=True),
            Part(message.content),
            Part("[/TOOL_RESULTS]", own=True),
        ]
    return parts


def _mistral_id(id: str | None) -> str:
    if id is None or len(id) != MISTRAL_ID:
        raise CannotWrite(
            f"a tool call's id is {id!r}, but this format needs ids of {MISTRAL_ID} characters; give each call one",
            "tool call without an id of 9 characters",
        )
    return id


def _name(message: Message) -> str:
    if not message.name:
        raise CannotWrite("a tool message has no name; give the name of the tool", "tool message without a name")
    return message.name


# ---------------------------------------------------------------------------------------- Llama 3.1

LLAMA_TOOLS = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    'answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of argument name '
    "and its value}.Do not use variables.\n\n"
)


def _llama_declare(tools: Tools) -> list[Part]:
    written = (json.dumps(tool, ensure_ascii=False, indent=4) for tool in tools)
    return [Part(LLAMA_TOOLS, own=True), *(Part(text + "\n\n") for text in written)]


def _llama_call(calls: Sequence[ToolCall], after_content: bool) -> list[Part]:
    return [Part(f'{{"name": "{calls[0].name}", "parameters": {_object(_only(calls))}}}')]


def _llama_call_quoted(calls: Sequence[ToolCall], after_content: bool) -> list[Part]:
    return [Part(f'{{"name": "{calls[0].name}", "parameters": {dumps(_only(calls).arguments)}}}')]


def _only(calls: Sequence[ToolCall]) -> ToolCall:
    if len(calls) > 1:
        raise CannotWrite(
            f"this format writes one tool call a turn, here are {len(calls)}; give each call a turn of its own",
            "several tool calls in one turn",
        )
    return calls[0]


def _llama_results(messages: Sequence[Message]) -> list[Part]:
    """Every result has a turn of its own and is quoted, as the template does with any text."""
    parts = []
    for message in messages:
        parts += [
            Part("<|start_header_id|>ipython<|end_header_id|>\n\n", own=True),
            Part(dumps(message.content)),
            Part("<|eot_id|>", own=True),
        ]
    return parts


# ---------------------------------------------------------------------------------------- others


def _deepseek_results(messages: Sequence[Message]) -> list[Part]:
    parts = [Part("<｜tool▁outputs▁begin｜>", own=True)]
    for number, message in enumerate(messages):
        parts += [
            Part(("\n" if number else "") + "<｜tool▁output▁begin｜>", own=True),
            Part(message.content),
            Part("<｜tool▁output▁end｜>", own=True),
        ]
    return [*parts, Part("<｜tool▁outputs▁end｜>", own=True)]


def _nothing(*_: Any) -> list[Part]:
    return []


STYLES: dict[str, ToolStyle] = {
    "qwen": ToolStyle("system", _qwen_declare, _calls_as_objects, _qwen_results, role="user"),
    "qwen2_published": ToolStyle("system", _qwen_declare, _calls_quoted, _qwen_results, role="user"),
    "mistral_v2": ToolStyle(
        "last", _mistral_declare, _mistral_calls_without_id, _mistral_v2_results, content_and_calls=False
    ),
    "mistral_v3": ToolStyle("last", _mistral_declare, _mistral_calls, _mistral_v3_results, content_and_calls=False),
    "mistral_v7": ToolStyle("last", _mistral_declare, _mistral_calls, _mistral_v7_results),
    "llama3_1": ToolStyle(
        "first",
        _llama_declare,
        _llama_call,
        _llama_results,
        content_and_calls=False,
        announced="Environment: ipython\n",
    ),
    "llama3_1_published": ToolStyle(
        "first", _llama_declare, _llama_call_quoted, _llama_results, announced="Environment: ipython\n"
    ),
    "deepseek_published": ToolStyle("system", _nothing, _nothing, _deepseek_results),
}
