"""The template of a declared format writes what the format writes, marks what it learns and refuses what it refuses."""

import random
from dataclasses import replace

import pytest

from itjax.base.records import Conversation, Message, ToolCall
from itjax.text import as_jinja, chat, formats
from itjax.text.formats import BOS, EOS, FORMATS
from itjax.text.jinja import ChatTemplate, spelt
from tests.text.conversations import TOOLS, conversation, rows

SPECIALS = {"bos_token": BOS, "eos_token": EOS}
NAMES = [*FORMATS]


def odd_rows(number: int) -> list[Conversation]:
    """Any roles in any order, with white space, empty texts and all that a message can hold."""
    return [_odd(random.Random(seed)) for seed in range(number)]


def _odd(rng: random.Random) -> Conversation:
    texts = (
        "",
        " a ",
        "\n\nb\n",
        "c",
        "d {{ x }}",
        "<think>\nhm\n</think>\n\nso",
        "<tool_response>\nx\n</tool_response>",
    )
    messages = []
    for n in range(rng.randint(1, 6)):
        roles = ("system", "user", "user", "assistant", "assistant", "tool")
        role = rng.choice(roles) if rng.random() < 0.4 else ("user", "assistant")[n % 2]
        message = Message(role, rng.choice(texts))
        if role == "assistant" and rng.random() < 0.3:
            message = replace(message, reasoning=rng.choice(("", "why\n", "\nbecause")))
        if role == "assistant" and rng.random() < 0.25:
            calls = (ToolCall("f", {"x": 1}, "call00001"), ToolCall("g", '{"y": [2, "é"]}', "call00002"))
            message = replace(message, tool_calls=calls[: rng.randint(1, 2)])
        if role == "tool":
            contents = ("7", "1.5", "true", '{"a": 1}', "[1, 2]", "it is <b>", '"q"', "07", "x", "")
            message = Message("tool", rng.choice(contents), name="f", tool_call_id="call00001")
        messages.append(message)
    return conversation(*messages, tools=TOOLS if rng.random() < 0.3 else ())


def expected(row: Conversation, fmt: formats.Format) -> tuple[str, list[tuple[int, int]]] | None:
    """The text of the format and where it is learned; None if the format refuses."""
    try:
        segments = chat.render(row, fmt, prompt_weight=0.0)
    except ValueError:
        return None
    text, learned = "", []
    for segment in segments:
        start, text = len(text), text + segment.text
        if segment.weight and segment.text:
            learned.append((start, len(text)))
    return text, joined(learned)


def joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for start, stop in spans:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        elif start < stop:
            found.append((start, stop))
    return found


def written(row: Conversation, template: ChatTemplate) -> tuple[str, list[tuple[int, int]]] | None:
    try:
        text, marks = template.marked(messages(row), row.tools)
    except ValueError:
        return None
    return text, joined([(mark.start, mark.stop) for mark in marks])


def messages(row: Conversation) -> list[dict]:
    """As chat APIs have them, arguments that are a text as a text."""
    plain = spelt(row.messages, literal=False, nothing="")
    for message, fields in zip(row.messages, plain, strict=True):
        for call, wrapped in zip(message.tool_calls, fields.get("tool_calls", ()), strict=True):
            wrapped["function"]["arguments"] = call.arguments
    return plain


def conversations(name: str) -> list[Conversation]:
    fmt = FORMATS[name]
    return [
        *rows(60),
        *rows(60, system=False, thinks=fmt.reasoning is not None),
        *(rows(60, tools=True, thinks=fmt.reasoning is not None) if fmt.tools else []),
        *odd_rows(400),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_text_and_what_is_learned_are_those_of_the_format(name):
    fmt, compared = FORMATS[name], 0
    template = ChatTemplate(as_jinja.jinja_of(fmt), SPECIALS, controls=())
    for row in conversations(name):
        ours, theirs = expected(row, fmt), written(row, template)
        if fmt.forgets_tools and None in (ours, theirs):
            continue  # a turn that is forgotten may be one that could not have been written
        assert theirs == ours, row
        compared += ours is not None
    assert compared > 60


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("thinking", [None, False])
def test_the_prompt_is_that_of_the_format(name, thinking):
    fmt = FORMATS[name]
    template = ChatTemplate(as_jinja.jinja_of(fmt), SPECIALS, controls=())
    for row in conversations(name)[::2]:
        try:
            ours = "".join(s.text for s in chat.prompt(row.messages, fmt, tools=row.tools, thinking=thinking))
        except ValueError:
            continue
        assert template.render(messages(row), row.tools, asks=True, thinking=thinking) == ours


@pytest.mark.parametrize("kept", ["all", "none"])
def test_reasoning_that_is_kept_elsewhere_is_written_there(kept):
    fmt = formats.keep_reasoning(FORMATS["qwen3"], kept)
    template = ChatTemplate(as_jinja.jinja_of(fmt), SPECIALS, controls=())
    for row in rows(80, tools=True, thinks=True):
        assert written(row, template) == expected(row, fmt)


def test_a_style_of_tools_without_a_template_is_named():
    with pytest.raises(ValueError, match="no template for tools as 'qwen2_published' writes them"):
        as_jinja.jinja_of(formats.as_published(FORMATS["qwen2"]))
