"""What is looked at before a run trains on a format: the model's own template beside it, and the faults that ruin runs.

Two begins of text in a row, a terminator that nothing teaches, a control token that the format writes as plain text:
each of them trains without complaint and shows only when the model talks.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from itjax.base.records import Conversation, Message, ToolCall
from itjax.text import chat
from itjax.text.formats import BOS, EOS, Format
from itjax.text.jinja import ChatTemplate, difference
from itjax.text.pieces import SAID, Piece
from itjax.text.tokenizer import Tokenizer

_TOOL = {
    "type": "function",
    "function": {"name": "search", "parameters": {"type": "object", "properties": {"words": {"type": "string"}}}},
}
_ASK, _ANSWER = Message("user", "What is new?"), Message("assistant", "Not much.")
_CALL = Message("assistant", "", tool_calls=(ToolCall("search", {"words": "news"}, "call00001"),))
_RESULT = Message("tool", "nothing", name="search", tool_call_id="call00001")


def _row(*messages: Message, tools: bool = False) -> Conversation:
    return Conversation(messages, source="", key="probe", tools=(_TOOL,) if tools else ())


PROBES: dict[str, Conversation] = {
    "a question and its answer": _row(_ASK, _ANSWER),
    "a system prompt": _row(Message("system", "Be brief."), _ASK, _ANSWER),
    "several turns": _row(_ASK, _ANSWER, _ASK, _ANSWER),
    "several turns and a system prompt": _row(Message("system", "Be brief."), _ASK, _ANSWER, _ASK, _ANSWER),
    "white space around content": _row(Message("user", " What?\n"), Message("assistant", "\n So. ")),
    "an empty answer": _row(_ASK, Message("assistant", "")),
    "tools": _row(_ASK, _CALL, _RESULT, _ANSWER, tools=True),
    "reasoning": _row(_ASK, replace(_ANSWER, reasoning="Let me see.")),
    "reasoning in several turns": _row(*[_ASK, replace(_ANSWER, reasoning="Let me see.")] * 2),
}


def compare(fmt: Format, template: ChatTemplate) -> list[str]:
    """Where a format and a model's own template differ: in the text, in the prompt, or in what is learned."""
    return [line for name, probe in PROBES.items() for line in _differences(name, probe, fmt, template)]


def _differences(name: str, probe: Conversation, fmt: Format, template: ChatTemplate) -> list[str]:
    found: list[str] = []
    for what, look in LOOKS.items():
        ours, our_refusal = _try(look, probe, fmt, template)
        theirs, their_refusal = _try(look, probe, template, template)
        if our_refusal and their_refusal:
            return found
        if our_refusal or their_refusal:
            return [*found, f"{name}, {what}: only one can write it: {our_refusal or their_refusal}"]
        if ours != theirs:
            found.append(f"{name}, {what}: {difference(ours, theirs)}")
    return found


def _try(look: "Look", row: Conversation, writes: chat.Writes, template: ChatTemplate) -> tuple[str, str]:
    """The text, or the refusal."""
    names = {BOS: template.specials.get("bos_token", BOS), EOS: template.specials.get("eos_token", EOS)}
    try:
        return "".join(names.get(p.text, p.text) if p.special else p.text for p in look(row, writes)), ""
    except ValueError as error:
        return "", str(error)


def _asked(row: Conversation, writes: chat.Writes) -> list[Piece]:
    return chat.ask(row.messages[:-1], writes, tools=row.tools, thinking=None)


def _learned(row: Conversation, writes: chat.Writes) -> list[Piece]:
    pieces = chat.write(row, writes)
    unlearned = set(chat.inexact(row, writes))
    assistants = {turn for turn, message in enumerate(row.messages) if message.role == "assistant"}
    return [piece for piece in pieces if piece.part == SAID and piece.turn in assistants - unlearned]


Look = Callable[[Conversation, chat.Writes], list[Piece]]
LOOKS: dict[str, Look] = {"text": chat.write, "prompt": _asked, "learned": _learned}


def problems(conversations: Sequence[Conversation], fmt: chat.Writes, tokenizer: Tokenizer) -> list[str]:
    """What is wrong with these conversations as ids. Nothing wrong is an empty list."""
    if not conversations:
        return []
    rendered = [chat.render(conversation, fmt, prompt_weight=0.0) for conversation in conversations]
    found: list[str] = []
    stops = chat.stop_ids(fmt, tokenizer)
    taught = False
    for segments in rendered:
        ids, weights = chat.encode(segments, tokenizer)
        doubled = tokenizer.bos is not None and ((ids[1:] == tokenizer.bos) & (ids[:-1] == tokenizer.bos)).any()
        if doubled:
            found.append(f"format {fmt.name!r} writes two begins of text in a row; take one of them out")
            break
        taught = taught or any(int(id) in stops for id in ids[weights > 0])
    if not taught:
        found.append(f"format {fmt.name!r}: no learned turn has a terminator, so the model would never stop")
    return found + _controls_as_text(conversations, fmt, tokenizer)


def _controls_as_text(conversations: Sequence[Conversation], fmt: chat.Writes, tokenizer: Tokenizer) -> list[str]:
    """Control tokens of the tokenizer that the format's own words spell as ordinary text."""
    own = Conversation((Message("user", "a"), Message("assistant", "b")), source="", key="probe")
    text = "\0".join(piece.text for piece in chat.write(own, fmt) if not piece.special)
    names = sorted(name for name in tokenizer.controls if name and name in text)
    return [
        f"format {fmt.name!r} writes {name!r} as text, but the tokenizer has a control token of it" for name in names
    ]


def count_unlearned(conversations: Sequence[Conversation], fmt: chat.Writes) -> int:
    """Assistant turns that are not learned where they stand, since the format rewrites history; see `chat.views`."""
    return sum(len(chat.inexact(conversation, fmt)) for conversation in conversations)
