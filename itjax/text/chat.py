"""Conversation to segments: the text a model sees, and how much each stretch of it is learned.

    system    "Be brief."                                  not learned
    user      "Capital of France?"                         not learned
    assistant <|im_start|>assistant\\n                      not learned: the prompt ends here
              "Paris." <|im_end|>                          learned: exactly what the model must emit
              \\n                                           not learned: nobody has to emit it

Each segment is tokenised on its own, so the ids of a prompt are exactly the first ids of the training text, and text from
data is never read as a control token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any, Protocol

import numpy as np

from itjax.base.records import Conversation, Message, Segment
from itjax.base.schema import LEARN
from itjax.text import writing
from itjax.text.formats import BOS, EOS, Format
from itjax.text.jinja import CALL_ENDS, ChatTemplate
from itjax.text.pieces import AFTER, EDGE, FRAME, SAID, CannotWrite, Piece
from itjax.text.tokenizer import Tokenizer

LEARNED = 1.0
NO_FLAG = "no message has `learn` set"
Writes = Format | ChatTemplate  # whatever can write a conversation


class Stretch(Protocol):
    """A segment or a piece: text that is tokenised on its own, or one control token."""

    @property
    def text(self) -> str: ...
    @property
    def special(self) -> bool: ...


def render(
    conversation: Conversation,
    fmt: Writes,
    *,
    prompt_weight: float,
    learn: str = "all",
    learns_separator: bool = False,
) -> list[Segment]:
    """The whole conversation, each stretch with its weight.

    What an assistant says weighs 1 or `message.learn`: all turns, the last, or those with a flag. The rest weighs
    `prompt_weight`. A turn that the format writes otherwise when it is asked for (see `views`) is not learned.
    """
    pieces, weights = weigh(
        conversation, fmt, prompt_weight=prompt_weight, learn=learn, learns_separator=learns_separator
    )
    return [Segment(piece.text, weight, piece.special) for piece, weight in zip(pieces, weights, strict=True)]


def weigh(
    conversation: Conversation, fmt: Writes, *, prompt_weight: float, learn: str, learns_separator: bool
) -> tuple[list[Piece], list[float]]:
    """The same as pieces and the weight of each."""
    if not conversation.tools and conversation.tags.get("tools"):
        message = f"format {fmt.name!r} cannot write the row's tools; remove them or choose another format"
        raise CannotWrite(message, "no place for tools")
    pieces = write(conversation, fmt)
    weights = _turn_weights(conversation.messages, learn, prompt_weight)
    for turn in inexact(conversation, fmt) if fmt.rewrites_history else ():
        weights[turn] = 0.0
    by_turn = (SAID, AFTER) if learns_separator else (SAID,)
    parts = {part: 0.0 if part == EDGE else prompt_weight for part in (EDGE, FRAME, SAID, AFTER)}
    return pieces, [weights.get(turn, prompt_weight) if part in by_turn else parts[part] for _, turn, part, _ in pieces]


def prompt(
    messages: Sequence[Message],
    fmt: Writes,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    thinking: bool | None = None,
) -> list[Segment]:
    """The messages and the header of the answer, for generation: the first segments of `render` with that answer.

    `thinking` False asks formats that think for an answer without a thought; None is what the model's template does.
    """
    pieces = ask(messages, fmt, tools=tools, thinking=thinking)
    return [Segment(piece.text, 0.0, special=piece.special) for piece in pieces]


def ask(
    messages: Sequence[Message], fmt: Writes, *, tools: Sequence[Mapping[str, Any]], thinking: bool | None
) -> list[Piece]:
    """The pieces of a prompt."""
    if isinstance(fmt, ChatTemplate):
        return fmt.ask(messages, tools, thinking=thinking)
    return writing.ask(messages, tools, fmt, thinking=thinking)


def write(conversation: Conversation, fmt: Writes) -> list[Piece]:
    """The pieces of the whole conversation."""
    return fmt.write(conversation) if isinstance(fmt, ChatTemplate) else writing.write(conversation, fmt)


# ------------------------------------------------------------------------------------------------ what is learned


def _turn_weights(messages: Sequence[Message], learn: str, prompt_weight: float) -> dict[int, float]:
    if learn not in LEARN:
        raise ValueError(f"learn: {learn!r} is unknown. Known: {', '.join(LEARN)}")
    if learn == "flag" and all(message.learn is None for message in messages):
        raise CannotWrite(f"{NO_FLAG}; set it on the messages to learn, or choose learn 'all' or 'last'", NO_FLAG)
    assistants = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
    last = assistants[-1] if assistants else -1
    weights = {}
    for turn, message in enumerate(messages):
        if learn == "last" and turn != last:
            weights[turn] = 0.0 if message.role == "assistant" else prompt_weight
        elif message.learn is not None:
            weights[turn] = float(message.learn)
        elif message.role == "assistant":
            weights[turn] = 0.0 if learn == "flag" else LEARNED
        else:
            weights[turn] = prompt_weight
    return weights


def inexact(conversation: Conversation, fmt: Writes) -> list[int]:
    """Assistant turns that the whole conversation shows otherwise than the prompt that asks for them.

    Qwen3 leaves earlier thinking out, Mistral moves the system prompt to the last question: what was said then followed
    another text than the one that stands here.
    """
    if not fmt.rewrites_history:
        return []
    messages = conversation.messages
    turns = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
    if turns in ([], [len(messages) - 1]):
        return []
    whole = write(conversation, fmt)
    if isinstance(fmt, ChatTemplate):
        exact = {piece.turn for piece in whole if piece.part == SAID}
        return [turn for turn in turns if turn not in exact]
    return [turn for turn in turns if not _is_exact(turn, conversation, whole, fmt)]


def _is_exact(turn: int, conversation: Conversation, whole: Sequence[Piece], fmt: Format) -> bool:
    """Whether the whole begins with the conversation up to this turn's terminator, as it is when the turn is last."""
    alone = writing.write(replace(conversation, messages=conversation.messages[: turn + 1]), fmt)
    last = max((n for n, piece in enumerate(alone) if piece.turn == turn and piece.part == SAID), default=-1)
    return last >= 0 and list(alone[: last + 1]) == list(whole[: last + 1])


def views(conversation: Conversation, fmt: Writes, *, learn: str = "all") -> list[Conversation]:
    """The conversation as few times as it takes for every learned turn to follow exactly its own prompt.

    One for most formats. Where a format rewrites history, a view ends with a turn and learns the turns that it shows
    exactly and that no longer view has learned.
    """
    weights = _turn_weights(conversation.messages, learn, 0.0)
    assistants = [t for t, message in enumerate(conversation.messages) if message.role == "assistant"]
    left = [turn for turn in assistants if weights[turn]]
    found: list[Conversation] = []
    messages = conversation.messages
    while left:
        view = replace(conversation, messages=messages)
        exact = set(left) - set(inexact(view, fmt))
        if not exact and len(messages) > left[-1] + 1:
            messages = messages[: left[-1] + 1]
            continue
        if not exact:
            raise CannotWrite(f"format {fmt.name!r}: turn {left[-1]} does not follow its own prompt", "inexact turn")
        found.append(replace(view, messages=_learning_only(messages, exact, assistants, weights)))
        left = [turn for turn in left if turn not in exact]
        messages = messages[: left[-1] + 1] if left else ()
    return found[::-1] or [conversation]


def _learning_only(
    messages: Sequence[Message], learned: set[int], assistants: Sequence[int], weights: Mapping[int, float]
) -> tuple[Message, ...]:
    silent = {turn: 0.0 for turn in assistants}
    chosen = silent | {turn: weights[turn] for turn in learned}
    return tuple(replace(m, learn=chosen[t]) if t in chosen else m for t, m in enumerate(messages))


# ------------------------------------------------------------------------------------------------ ids


def encode(segments: Sequence[Segment], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Ids (int32) and weights (float32) of segments, one token per special segment."""
    return encode_many([segments], tokenizer)[0]


def encode_many(
    conversations: Sequence[Sequence[Segment]], tokenizer: Tokenizer
) -> list[tuple[np.ndarray, np.ndarray]]:
    """`encode` for many at a time; a text that stands in several (headers, system prompts) is tokenised once."""
    return encode_weighed([(segments, [s.weight for s in segments]) for segments in conversations], tokenizer)


def encode_weighed(
    conversations: Sequence[tuple[Sequence[Stretch], Sequence[float]]], tokenizer: Tokenizer
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and weights of stretches of text, each with its weight.

    Some tokenizers begin every text with a space of their own. They get it where a text begins, which is at the start
    and after control tokens, and not where a stretch goes on with the text of the one before.
    """
    rows = [stretches for stretches, _ in conversations]
    ids = _ids_with_spaces(rows, tokenizer) if tokenizer.space_before else _ids(rows, tokenizer)
    return _flat_rows(ids, [weights for _, weights in conversations])


def _ids(rows: Sequence[Sequence[Stretch]], tokenizer: Tokenizer) -> list[list[list[int]]]:
    texts = list(dict.fromkeys(s.text for row in rows for s in row if not s.special))
    text_ids = dict(zip(texts, tokenizer.encode_many(texts), strict=True))
    special_ids = {text: [_special_id(text, tokenizer)] for text in {s.text for row in rows for s in row if s.special}}
    return [[special_ids[s.text] if s.special else text_ids[s.text] for s in row] for row in rows]


def _ids_with_spaces(rows: Sequence[Sequence[Stretch]], tokenizer: Tokenizer) -> list[list[list[int]]]:
    always = tokenizer.space_before == "always"
    keys = [[(s.text, _kind(n, row, always)) for n, s in enumerate(row)] for row in rows]
    wanted = dict.fromkeys(chain.from_iterable(keys))
    ids: dict[tuple[str, str], list[int]] = {}
    for kind, encode_texts in (("begins", tokenizer.encode_many), ("goes on", tokenizer.encode_more)):
        texts = [text for text, of_kind in wanted if of_kind == kind]
        ids |= zip(((text, kind) for text in texts), encode_texts(texts), strict=True)
    ids |= {(text, kind): [_special_id(text, tokenizer)] for text, kind in wanted if kind == "special"}
    return [[ids[key] for key in row] for row in keys]


def _kind(number: int, row: Sequence[Stretch], always: bool) -> str:
    if row[number].special:
        return "special"
    return "begins" if number == 0 or (always and row[number - 1].special) else "goes on"


def _flat_rows(
    ids: Sequence[Sequence[Sequence[int]]], weights: Sequence[Sequence[float]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """One array of all ids and one of all weights, cut into rows: far fewer calls of numpy than a row at a time."""
    parts = list(chain.from_iterable(ids))
    counts = np.fromiter(map(len, parts), np.int64, count=len(parts))
    ends = np.concatenate([[0], np.cumsum(counts)])
    bounds = ends[np.cumsum([0, *map(len, ids)])].tolist()
    flat_ids = np.fromiter(chain.from_iterable(parts), np.int32, count=int(ends[-1]))
    flat_weights = np.repeat(np.fromiter(chain.from_iterable(weights), np.float32, count=len(parts)), counts)
    return [(flat_ids[start:stop], flat_weights[start:stop]) for start, stop in pairwise(bounds)]


def stop_ids(fmt: Writes, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end an answer: the assistant's terminator, the end of a call where there is one, the end of text."""
    terminator = fmt.terminator if isinstance(fmt, ChatTemplate) else _terminator(fmt)
    others = (tokenizer.eos, *(tokenizer.control(name) for name in CALL_ENDS))
    return frozenset({_special_id(terminator, tokenizer), *(id for id in others if id is not None)})


def _terminator(fmt: Format) -> str:
    return next((name for name in fmt.specials.findall(fmt.turns["assistant"].terminator)), EOS)


def _special_id(text: str, tokenizer: Tokenizer) -> int:
    id = {BOS: tokenizer.bos, EOS: tokenizer.eos}.get(text)
    id = tokenizer.control(text) if id is None else id
    if id is None:
        raise ValueError(f"tokenizer: there is no control token {text!r}; choose a format made for this tokenizer")
    return id
