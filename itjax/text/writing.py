"""A conversation in a format, piece by piece.

First the messages are arranged as the format can write them (a default system prompt, messages that join, what is
forgotten), then each turn is written: header, thought, content, calls, terminator, separator.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby, takewhile
from typing import NamedTuple

from itjax.base.records import Conversation, Message
from itjax.text.formats import Format, Turn
from itjax.text.pieces import AFTER, EDGE, FRAME, SAID, CannotWrite, Part, Piece
from itjax.text.tools import STYLES, Tools

OWN = -1  # number of a message that is the format's own
DECLARES = -2  # number of a system turn that is there for the tools alone
PARAGRAPH = "\n\n"
MIXED = "joined messages differ in `learn`"


class Arranged(NamedTuple):
    """A message as it will be written, with its number in the conversation."""

    turn: int
    message: Message


def write(conversation: Conversation, fmt: Format) -> list[Piece]:
    """The whole conversation."""
    return _turns(conversation.messages, conversation.tools, fmt) + list(_own(fmt.end, fmt, OWN, EDGE))


def ask(messages: Sequence[Message], tools: Tools, fmt: Format, *, thinking: bool | None) -> list[Piece]:
    """The messages and what announces the answer. `thinking` False closes the thought before it begins."""
    pieces = _turns(messages, tools, fmt)
    if messages and messages[-1].role == "assistant" and not fmt.separates_last:
        pieces += _own(fmt.turns["assistant"].separator, fmt, len(messages) - 1, AFTER)
    if not fmt.answers_tools and messages and messages[-1].role == "tool":
        return pieces
    pieces += _own(fmt.turns["assistant"].header, fmt, len(messages), FRAME)
    if fmt.reasoning is None or (not fmt.reasoning.prompted and thinking is not False):
        return pieces
    closing = fmt.reasoning.closing if thinking is False else ""
    return [*pieces, *_own(fmt.reasoning.opening + closing, fmt, len(messages), FRAME)]


def _turns(messages: Sequence[Message], tools: Tools, fmt: Format) -> list[Piece]:
    style = STYLES[fmt.tools] if fmt.tools else None
    if tools and style is None:
        _leave_out("tools", "the row's tools", fmt)
    declared = style.declare(tools) if tools and style is not None else []
    declares = style.declared if declared and style is not None else ""
    with_system = declares == "system"
    arranged = _arrange(messages, fmt, needs_system=with_system or bool(fmt.preamble))
    question = _last(arranged, _asks, otherwise=len(arranged)) if fmt.reasoning is not None else 0
    last_user = _last(arranged, _is_user, otherwise=OWN) if declares == "last" else OWN
    first_user = _first_user(arranged, fmt) if declares == "first" else OWN
    pieces = list(_own(fmt.begin, fmt, OWN, EDGE))
    position = 0
    while position < len(arranged):
        turn, message = arranged[position]
        if message.role == "tool" and style is not None:
            run = list(takewhile(lambda a: a.message.role == "tool", arranged[position:]))
            position += len(run)
            pieces += _results(run, fmt)
            continue
        if position == last_user:
            pieces += _parts(declared, fmt, turn, FRAME)
        is_last = position == len(arranged) - 1
        pieces += _turn(
            arranged[position],
            fmt,
            headed=fmt.answers_tools or position == 0 or arranged[position - 1].message.role != "tool",
            thinks=_thinks(message, fmt, answers=position > question, is_last=is_last),
            opening=declared if position == first_user else _preamble(fmt, declares) if position == 0 else [],
            declared=declared if with_system and position == 0 else [],
            separated=fmt.separates_last or message.role != "assistant" or not is_last,
        )
        position += 1
    return pieces


def _last(arranged: Sequence["Arranged"], is_one: Callable[[Message], bool], *, otherwise: int) -> int:
    return max((n for n, a in enumerate(arranged) if is_one(a.message)), default=otherwise)


def _is_user(message: Message) -> bool:
    return message.role == "user"


def _first_user(arranged: Sequence["Arranged"], fmt: Format) -> int:
    """Where the first question is, which is to open with the tools: nothing but the system prompt may come before."""
    place = int(bool(arranged) and arranged[0].message.role == "system")
    if place == len(arranged) or not _is_user(arranged[place].message):
        raise CannotWrite(
            f"format {fmt.name!r} writes tools before the first question; begin with a user's message, "
            "behind one system message at most",
            "tools without a first question",
        )
    return place


def _preamble(fmt: Format, declares: str) -> list[Part]:
    announced = STYLES[fmt.tools].announced if declares else ""
    return [Part(announced + fmt.preamble, own=True)] if announced or fmt.preamble else []


# ------------------------------------------------------------------------------------------------ one turn


def _turn(
    arranged: Arranged,
    fmt: Format,
    *,
    headed: bool,
    opening: list[Part],
    thinks: bool,
    declared: list[Part],
    separated: bool,
) -> list[Piece]:
    turn, message = arranged
    shape = fmt.turns[message.role]
    pieces = list(_own(shape.header, fmt, turn, FRAME)) if headed else []
    if opening:
        pieces += _parts(opening, fmt, turn, FRAME)
    if thinks:
        pieces += _thought(arranged, fmt)
    content = shape.space + (message.content.lstrip("\n") if thinks else message.content)
    if content:
        pieces.append(Piece(content, turn, SAID))
    if declared:
        joiner = [] if turn == DECLARES else [Part(PARAGRAPH, own=True)]
        pieces += _parts([*joiner, *declared], fmt, turn, FRAME)
    if message.tool_calls:
        pieces += _calls(message, fmt, turn)
    pieces += _own(shape.terminator, fmt, turn, SAID)
    if separated:
        pieces += _own(shape.separator, fmt, turn, AFTER)
    return pieces


def _thinks(message: Message, fmt: Format, *, answers: bool, is_last: bool) -> bool:
    """Whether a turn has a place for what was thought. `answers`: it comes after the last question."""
    if message.role != "assistant" or fmt.reasoning is None:
        return False
    kept = fmt.reasoning.kept
    return kept == "all" or (kept == "last" and answers and (is_last or bool(message.reasoning)))


def _thought(arranged: Arranged, fmt: Format) -> Iterator[Piece]:
    assert fmt.reasoning is not None
    opened_by = FRAME if fmt.reasoning.prompted else SAID
    thought = (arranged.message.reasoning or "").strip("\n")
    if not thought and not fmt.reasoning.prompted:
        yield from _own(fmt.reasoning.opening + fmt.reasoning.closing, fmt, arranged.turn, SAID)
        return
    yield from _own(fmt.reasoning.opening, fmt, arranged.turn, opened_by)
    if thought:
        yield Piece(thought, arranged.turn, SAID)
    yield from _own(fmt.reasoning.closing, fmt, arranged.turn, SAID)


def _calls(message: Message, fmt: Format, turn: int) -> Iterator[Piece]:
    if not fmt.tools:
        _leave_out("calls", "tool calls", fmt)
        return
    style = STYLES[fmt.tools]
    if message.content and not style.content_and_calls:
        raise CannotWrite(
            f"format {fmt.name!r} cannot write content and tool calls in one turn; split the turn",
            "content and tool calls in one turn",
        )
    yield from _parts(style.calls(message.tool_calls, bool(message.content)), fmt, turn, SAID)


def _results(run: Sequence[Arranged], fmt: Format) -> Iterator[Piece]:
    """Results in a row share one turn, and so one weight."""
    style = STYLES[fmt.tools]
    turn, messages = run[0].turn, [a.message for a in run]
    if len({message.learn for message in messages}) > 1:
        raise CannotWrite(
            f"format {fmt.name!r} writes tool messages in a row as one turn; give all the same `learn`", MIXED
        )
    shape = fmt.turns[style.role] if style.role else None
    if shape is not None:
        yield from _own(shape.header, fmt, turn, FRAME)
    yield from _parts(style.results(messages), fmt, turn, SAID)
    if shape is not None:
        yield from _own(shape.terminator, fmt, turn, SAID)
        yield from _own(shape.separator, fmt, turn, AFTER)


def _asks(message: Message) -> bool:
    """Whether a message is a question, not results of tools that a user's turn holds."""
    wraps_result = message.content.startswith("<tool_response>") and message.content.endswith("</tool_response>")
    return message.role == "user" and not wraps_result


def _parts(parts: Sequence[Part], fmt: Format, turn: int, part: str) -> Iterator[Piece]:
    for text, own in parts:
        if own:
            yield from _own(text, fmt, turn, part)
        elif text:
            yield Piece(text, turn, part)


def _own(text: str, fmt: Format, turn: int, part: str) -> tuple[Piece, ...]:
    """Pieces of the format's own text, its control tokens apart."""
    return _split(text, fmt.special_names, turn, part) if text else ()


@lru_cache(maxsize=4096)
def _split(text: str, names: str, turn: int, part: str) -> tuple[Piece, ...]:
    stretches = enumerate(re.split(names, text))
    return tuple(Piece(text, turn, part, special=number % 2 == 1) for number, text in stretches if text)


# ------------------------------------------------------------------------------------------------ arranging


def _arrange(messages: Sequence[Message], fmt: Format, *, needs_system: bool) -> list[Arranged]:
    """The messages as the format can write them."""
    arranged = [Arranged(turn, _fitted(message, fmt)) for turn, message in enumerate(messages)]
    arranged = [a for a in arranged if not _is_left_out(a.message, fmt)]
    has_system = bool(arranged) and arranged[0].message.role == "system"
    if fmt.default_system and not has_system:
        arranged.insert(0, Arranged(OWN, Message("system", fmt.default_system)))
    elif needs_system and not has_system:
        arranged.insert(0, Arranged(DECLARES, Message("system", "")))
    if fmt.forgets_tools:
        arranged = _without_old_tools(arranged)
    if fmt.system_joiner is not None:
        arranged = _join_system(arranged, fmt.system_joiner, fmt)
    if fmt.merges is not None:
        arranged = _merge(arranged, fmt.merges)
    _check_roles(arranged, fmt)
    return arranged


def _fitted(message: Message, fmt: Format) -> Message:
    """The message with its content trimmed where the format trims, and its thought where it can be written."""
    if message.role == "assistant" and fmt.reasoning is not None and message.reasoning is None:
        message = _thought_apart(message, fmt.reasoning.closing.strip())
    if message.reasoning and fmt.reasoning is None:
        _leave_out("reasoning", "reasoning", fmt)
    trims = fmt.trims_system if message.role == "system" else fmt.trims
    trims = trims and not (message.role == "tool" and fmt.tools)  # what came back is data of the style of tools
    if trims and message.content != message.content.strip():
        message = replace(message, content=message.content.strip())
    return message


def _thought_apart(message: Message, closing: str) -> Message:
    """`<think>...</think>` at the beginning of an answer is its reasoning."""
    if closing not in message.content:
        return message
    thought, *_, answer = message.content.split(closing)
    if message.content.count(closing) > 1:
        raise CannotWrite(
            f"content has {closing!r} more than once; give the reasoning in a field of its own", "two ends of a thought"
        )
    thought = thought.rstrip("\n").split("<think>")[-1].lstrip("\n")
    return replace(message, content=answer.lstrip("\n"), reasoning=thought)


def _is_left_out(message: Message, fmt: Format) -> bool:
    if message.role == "system":
        return not message.content and "empty system" in fmt.omits
    return message.role == "tool" and "results" in fmt.omits


def _leave_out(what: str, words: str, fmt: Format) -> None:
    if what not in fmt.omits:
        raise CannotWrite(
            f"format {fmt.name!r} cannot write {words}; remove them or choose another format", f"no place for {what}"
        )


def _without_old_tools(arranged: list[Arranged]) -> list[Arranged]:
    last_user = max((n for n, a in enumerate(arranged) if a.message.role == "user"), default=0)
    return [
        a for n, a in enumerate(arranged) if n > last_user or not (a.message.tool_calls or a.message.role == "tool")
    ]


def _join_system(arranged: list[Arranged], joiner: str, fmt: Format) -> list[Arranged]:
    """System text stands before the content of a user, the first or the last."""
    gathers = fmt.merges is not None
    leading = list(takewhile(lambda a: a.message.role == "system", arranged)) if not gathers else []
    systems = [a for a in arranged if a.message.role == "system"] if gathers else leading[:1]
    others = [a for a in arranged if a not in systems]
    text = (fmt.merges or "").join(a.message.content for a in systems)
    if not systems or (gathers and not text):
        return others
    users = [n for n, a in enumerate(others) if a.message.role == "user"]
    place = users[-1 if fmt.system_at == "last" else 0] if users else None
    if place is None or (fmt.system_at == "first" and place != 0):
        raise CannotWrite(
            f"format {fmt.name!r} writes a system message before a user's; the next message is not a user's",
            "system message without a user's",
        )
    asked = others[place].message
    content = fmt.system_prefix + text + joiner + asked.content
    content = content.strip() if fmt.trims_joined else content
    others[place] = others[place]._replace(message=replace(asked, content=content))
    return others


def _merge(arranged: list[Arranged], joiner: str) -> list[Arranged]:
    """Messages of a user in a row, or of an assistant, are one."""
    merged: list[Arranged] = []
    for role, group in groupby(arranged, lambda a: a.message.role):
        run = list(group)
        merged += run if role in ("tool", "system") or len(run) == 1 else [_one_of(run, joiner)]
    return merged


def _one_of(run: Sequence[Arranged], joiner: str) -> Arranged:
    messages = [a.message for a in run]
    if len({message.learn for message in messages}) > 1:
        raise CannotWrite(f"{messages[0].role} messages in a row are written as one; give all the same `learn`", MIXED)
    spoken = [m.content for m in messages if m.content or m.role == "user"]
    calls = tuple(call for message in messages for call in message.tool_calls)
    return Arranged(run[-1].turn, replace(messages[-1], content=joiner.join(spoken), tool_calls=calls))


def _check_roles(arranged: Sequence[Arranged], fmt: Format) -> None:
    known = {*fmt.turns, "tool"} if fmt.tools else fmt.turns
    before = ""
    for number, (_, message) in enumerate(arranged):
        role = message.role
        if role not in known:
            raise CannotWrite(
                f"format {fmt.name!r} has no place for role {role!r}; it has {sorted(known)}", "no place for a role"
            )
        if number and role == "system" and fmt.turns[role] == Turn():
            raise CannotWrite(
                f"format {fmt.name!r} writes one system message, at the beginning; join them", "several system messages"
            )
        if not fmt.alternates or role == "system":
            continue
        if role not in _may_follow(before, merges=fmt.merges is not None):
            raise CannotWrite(
                f"format {fmt.name!r} needs user and assistant to take turns, a user first; "
                f"here {role!r} follows {before or 'the beginning'!r}",
                "roles do not take turns",
            )
        before = role


def _may_follow(role: str, *, merges: bool) -> tuple[str, ...]:
    if role == "tool":
        return ("assistant", "tool", "user") if merges else ("assistant", "tool")
    return {"": ("user",), "user": ("assistant",), "assistant": ("user", "tool")}[role]
