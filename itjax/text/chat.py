"""Conversation to segments: the text a model sees, and how much each stretch of it is learned.

    system    "Be brief."                                  not learned
    user      "Capital of France?"                         not learned
    assistant <|im_start|>assistant\\n                      not learned: the prompt ends here
              "Paris." <|im_end|>                          learned: exactly what the model must emit
              \\n                                           not learned: nobody has to emit it

Each segment is tokenised on its own, so the ids of a prompt are exactly the first ids of the training text, and text from
data is never read as a control token.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain

import numpy as np

from itjax.base.records import Conversation, Message, Segment
from itjax.text.formats import BOS, EOS, Format
from itjax.text.tokenizer import Tokenizer

LEARNED = 1.0


def render(conversation: Conversation, fmt: Format, *, prompt_weight: float) -> list[Segment]:
    """The whole conversation. Assistant content and terminator weigh 1 or `message.learn`, the rest `prompt_weight`."""
    if conversation.tags.get("tools"):
        raise ValueError(f"format {fmt.name!r} cannot write the row's tools; remove them or choose another format")
    segments = list(_own(fmt.begin, fmt, 0.0))
    for message in _arrange(conversation.messages, fmt):
        turn = fmt.turns[message.role]
        weight = _weight(message, prompt_weight)
        segments += _own(turn.header, fmt, prompt_weight)
        segments += _content(message, fmt, weight)
        segments += _own(turn.terminator, fmt, weight)
        segments += _own(turn.separator, fmt, prompt_weight)
    return segments


def prompt(messages: Sequence[Message], fmt: Format) -> list[Segment]:
    """The messages and the header of the answer, for generation: the first segments of `render` with that answer."""
    asked = Conversation(tuple(messages), source="", key="prompt")
    return render(asked, fmt, prompt_weight=0.0) + list(_own(fmt.turns["assistant"].header, fmt, 0.0))


def encode(segments: Sequence[Segment], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Ids (int32) and weights (float32) of segments, one token per special segment."""
    return encode_many([segments], tokenizer)[0]


def encode_many(
    conversations: Sequence[Sequence[Segment]], tokenizer: Tokenizer
) -> list[tuple[np.ndarray, np.ndarray]]:
    """`encode` for many at a time; a text that stands in several (headers, system prompts) is tokenised once."""
    texts = list(dict.fromkeys(s.text for segments in conversations for s in segments if not s.special))
    text_ids = dict(zip(texts, tokenizer.encode_many(texts), strict=True))
    specials = {s.text for segments in conversations for s in segments if s.special}
    special_ids = {text: [_special_id(text, tokenizer)] for text in specials}
    return [_join(segments, text_ids, special_ids) for segments in conversations]


def stop_ids(fmt: Format, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end an answer: the assistant's terminator, and the tokenizer's end of text."""
    terminator = next((s.text for s in _own(fmt.turns["assistant"].terminator, fmt, 0.0) if s.special), EOS)
    return frozenset({_special_id(terminator, tokenizer)} | ({tokenizer.eos} if tokenizer.eos is not None else set()))


def _join(
    segments: Sequence[Segment], text_ids: dict[str, list[int]], special_ids: dict[str, list[int]]
) -> tuple[np.ndarray, np.ndarray]:
    parts = [special_ids[s.text] if s.special else text_ids[s.text] for s in segments]
    counts = [len(part) for part in parts]
    ids = np.fromiter(chain.from_iterable(parts), dtype=np.int32, count=sum(counts))
    return ids, np.repeat(np.array([s.weight for s in segments], dtype=np.float32), counts)


def _special_id(text: str, tokenizer: Tokenizer) -> int:
    id = {BOS: tokenizer.bos, EOS: tokenizer.eos}.get(text, tokenizer.control(text))
    if id is None:
        raise ValueError(f"tokenizer: there is no control token {text!r}; choose a format made for this tokenizer")
    return id


def _own(text: str, fmt: Format, weight: float) -> tuple[Segment, ...]:
    """Segments of the format's own text; its control tokens are special."""
    return _split(text, fmt.specials, weight)


@lru_cache(maxsize=4096)
def _split(text: str, specials: re.Pattern[str], weight: float) -> tuple[Segment, ...]:
    parts = enumerate(specials.split(text))
    return tuple(Segment(part, weight, special=number % 2 == 1) for number, part in parts if part)


def _content(message: Message, fmt: Format, weight: float) -> Iterable[Segment]:
    if message.tool_calls or message.reasoning:
        what = "tool calls" if message.tool_calls else "reasoning"
        raise ValueError(f"format {fmt.name!r} cannot write {what}; remove them or choose another format")
    content = message.content.strip() if fmt.trims else message.content
    return [Segment(content, weight)] if content else []


def _weight(message: Message, prompt_weight: float) -> float:
    if message.learn is not None:
        return float(message.learn)
    return LEARNED if message.role == "assistant" else prompt_weight


def _arrange(messages: Sequence[Message], fmt: Format) -> list[Message]:
    """The messages as the format can write them: with its default system prompt, or system text joined to a user's."""
    arranged = list(messages)
    has_system = bool(arranged) and arranged[0].role == "system"
    if fmt.default_system and not has_system:
        arranged.insert(0, Message("system", fmt.default_system))
    if has_system and fmt.system_joiner is not None:
        arranged = _join_system(arranged, fmt.system_joiner, fmt)
    for message in arranged:
        if message.role not in fmt.turns:
            raise ValueError(f"format {fmt.name!r} has no place for role {message.role!r}; it has {sorted(fmt.turns)}")
    return arranged


def _join_system(messages: list[Message], joiner: str, fmt: Format) -> list[Message]:
    system, *others = messages
    if not others or others[0].role != "user":
        raise ValueError(
            f"format {fmt.name!r} writes a system message before a user's; the next message is not a user's"
        )
    first = others[0]
    return [Message("user", system.content + joiner + first.content, learn=first.learn, name=first.name), *others[1:]]
