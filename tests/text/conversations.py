"""Conversations to try formats on: made from a seed, and read from files of the data folder."""

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from itjax.base.records import Conversation, Message, Segment, ToolCall
from itjax.text.formats import BOS, EOS

TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "How it is <outside>, \u00e9t\u00e9 & winter",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    },
    {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}},
)
WORDS = (
    *(
        "Paris",
        "rain",
        "42",
        "{x}",
        "{{",
        "y",
        "}}",
        "{%",
        "if",
        "%}",
        "\u6f22\u5b57",
        "\U0001f389",
        "<b>",
        "[1]",
        "a\nb",
    ),
    *("tab\there", "<think>", "<|end|>", "</s>", "[INST]", "it's", '"so"', "\\n", "#", "Tools"),
)


def conversation(*messages: Message, tools: Sequence[Mapping[str, Any]] = ()) -> Conversation:
    return Conversation(messages, source="test", key="test:1", tools=tuple(tools))


def rows(number: int, *, system: bool = True, tools: bool = False, thinks: bool = False) -> list[Conversation]:
    """Alternating conversations, the same for the same arguments."""
    return [_row(random.Random(seed), system=system, tools=tools, thinks=thinks) for seed in range(number)]


def _row(rng: random.Random, *, system: bool, tools: bool, thinks: bool) -> Conversation:
    messages = [Message("system", _text(rng))] if system and rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 3)):
        messages.append(Message("user", _text(rng)))
        if tools and rng.random() < 0.6:
            messages += _tool_round(rng)
        thought = _text(rng) if thinks and rng.random() < 0.6 else None
        messages.append(Message("assistant", _text(rng), reasoning=thought))
    return conversation(*messages, tools=TOOLS if tools and rng.random() < 0.8 else ())


def _tool_round(rng: random.Random) -> list[Message]:
    ids = [f"call{n:05d}" for n in range(rng.randint(1, 2))]
    calls = tuple(ToolCall("weather", {"place": _text(rng)}, id) for id in ids)
    return [
        Message("assistant", "", tool_calls=calls),
        *(Message("tool", f"it is {_text(rng)}", name="weather", tool_call_id=id) for id in ids),
    ]


def _text(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 6)))


def read_message(fields: Mapping[str, Any]) -> Message:
    """A message as chat APIs write it."""
    calls = tuple(
        ToolCall(call["function"]["name"], call["function"]["arguments"], call.get("id"))
        for call in fields.get("tool_calls") or ()
    )
    return Message(
        fields["role"],
        fields.get("content") or "",
        name=fields.get("name"),
        tool_calls=calls,
        tool_call_id=fields.get("tool_call_id"),
        reasoning=fields.get("reasoning_content"),
    )


def published_models(shared_data) -> dict[str, Any]:
    return json.loads((shared_data / "chat_templates" / "hf_rendered_visible.json").read_text())


def text(segments: Sequence[Segment], bos: str = BOS, eos: str = EOS) -> str:
    """The segments as one text, with these names of begin and end of text."""
    names = {BOS: bos, EOS: eos}
    return "".join(names.get(s.text, s.text) if s.special else s.text for s in segments)


def learned(segments: Sequence[Segment], bos: str = BOS, eos: str = EOS) -> list[str]:
    """The learned stretches of a text, one string per unbroken stretch."""
    stretches, before = [], False
    for segment in segments:
        if segment.weight:
            stretches[-1:] = (
                [stretches[-1] + text([segment], bos, eos)] if before else [*stretches[-1:], text([segment], bos, eos)]
            )
        before = bool(segment.weight)
    return stretches
