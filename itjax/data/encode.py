"""A conversation to one shifted example: what goes in, what it should predict, and how much each prediction counts.

T positions of the example: one less than its tokens, for the last token predicts nothing.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, takewhile

import numpy as np

from itjax.base.records import Conversation, Message, TokenizedExample
from itjax.base.schema import BAD_ROWS, LEARN, TRUNCATIONS
from itjax.text import chat, formats
from itjax.text.pieces import SAID, CannotWrite, Piece
from itjax.text.tokenizer import Tokenizer

TOO_LONG = "too long"
NOTHING_TO_LEARN = "no trained token"
UNWRITABLE = "format: "  # followed by the reason
NOT_TEXT = "text is not Unicode"


@dataclass(frozen=True)
class Encoding:
    """Everything that shapes the tokens of a conversation."""

    tokenizer: Tokenizer
    format: str
    length: int  # the most positions an example may have
    truncation: str
    prompt_weight: float
    learn: str = "all"  # assistant turns that are learned: all, the last, or where a flag says so
    bad_rows: str = "error"  # conversations that the format cannot write
    folder: str = ""  # of the model whose own template is the format "hf"
    reasoning: str = ""  # kept in "all" turns, after the "last" question or in "none"; empty: as the format does
    learns_separator: bool = False  # whether what follows a terminator is learned with it, as TRL does

    def __post_init__(self) -> None:
        for name, known in (("truncation", TRUNCATIONS), ("learn", LEARN), ("bad_rows", BAD_ROWS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r} is unknown. Known: {', '.join(known)}")
        object.__setattr__(self, "format", self.fmt.name)  # what "auto" stands for

    @cached_property
    def fmt(self) -> chat.Writes:
        fmt = formats.resolve(self.format, self.tokenizer, folder=self.folder or None)
        if not self.reasoning:
            return fmt
        if not isinstance(fmt, formats.Format):
            raise ValueError("reasoning: a model's own template decides itself where reasoning is kept; leave it empty")
        return formats.keep_reasoning(fmt, self.reasoning)

    def fingerprint(self) -> str:
        shape = (
            *(self.fmt, self.length, self.truncation, self.prompt_weight, self.learn, self.bad_rows),
            *(self.learns_separator, self.tokenizer.fingerprint()),
        )
        return hashlib.sha256(repr(shape).encode()).hexdigest()


@dataclass(frozen=True)
class Dropped:
    """An example that is not trained on, and why."""

    reason: str


Weighed = tuple[list[Piece], list[float]]  # what is written, and the weight of each piece
Encoded = tuple[TokenizedExample | Dropped, bool]  # and whether it was cut


def encode(conversation: Conversation, encoding: Encoding) -> Encoded:
    """The example, or why there is none; and whether it was cut."""
    return encode_many([conversation], encoding)[0]


def encode_many(conversations: Sequence[Conversation], encoding: Encoding) -> list[Encoded]:
    """`encode` for many at a time, which is faster."""
    rendered = [_render(conversation, encoding) for conversation in conversations]
    writable = [written for written in rendered if not isinstance(written, Dropped)]
    try:
        encoded = iter(chat.encode_weighed(writable, encoding.tokenizer))
    except ValueError:
        return _one_by_one(conversations, rendered, encoding)
    return [
        (written, False) if isinstance(written, Dropped) else _example(conversation, *next(encoded), encoding)
        for conversation, written in zip(conversations, rendered, strict=True)
    ]


def shift(ids: np.ndarray, weights: np.ndarray) -> TokenizedExample:
    """Inputs and what they should predict.

    ids       [10, 11, 20, 21,  1]      10, 11 asked; 20, 21, 1 answered
    weights   [ 0,  0,  1,  1,  1]

    tokens_T  [10, 11, 20, 21]
    targets_T [11, 20, 21,  1]
    weights_T [ 0,  1,  1,  1]
    """
    return TokenizedExample(tokens_T=ids[:-1], targets_T=ids[1:], weights_T=weights[1:])


def _render(conversation: Conversation, encoding: Encoding) -> Weighed | Dropped:
    try:
        return _weigh(conversation, encoding)
    except CannotWrite as error:
        if encoding.bad_rows == "skip":
            return Dropped(UNWRITABLE + error.reason)
        raise ValueError(f"{conversation.key}: {error}") from None


def _weigh(conversation: Conversation, encoding: Encoding) -> Weighed:
    return chat.weigh(
        conversation,
        encoding.fmt,
        prompt_weight=encoding.prompt_weight,
        learn=encoding.learn,
        learns_separator=encoding.learns_separator,
    )


def _one_by_one(
    conversations: Sequence[Conversation], rendered: Sequence[Weighed | Dropped], encoding: Encoding
) -> list[Encoded]:
    """Which row the tokenizer refuses."""
    results: list[Encoded] = []
    for conversation, written in zip(conversations, rendered, strict=True):
        if isinstance(written, Dropped):
            results.append((written, False))
            continue
        try:
            [(ids, weights)] = chat.encode_weighed([written], encoding.tokenizer)
        except ValueError as error:
            if encoding.bad_rows == "error":
                raise ValueError(f"{conversation.key}: {error}") from None
            results.append((Dropped(UNWRITABLE + NOT_TEXT), False))
            continue
        results.append(_example(conversation, ids, weights, encoding))
    return results


def _example(conversation: Conversation, ids: np.ndarray, weights: np.ndarray, encoding: Encoding) -> Encoded:
    is_long = len(ids) > encoding.length + 1  # tokens
    if is_long and encoding.truncation == "error":
        raise ValueError(
            f"{conversation.key}: {len(ids) - 1} positions, but length is {encoding.length}; raise length, "
            f"or choose truncation {', '.join(name for name in TRUNCATIONS if name != 'error')}"
        )
    if is_long and encoding.truncation == "drop":
        return Dropped(TOO_LONG), False
    if is_long and encoding.truncation == "drop_oldest_turns":
        shorter = _without_oldest_turns(conversation, encoding)
        if shorter is None:
            return Dropped(TOO_LONG), False
        ids, weights = shorter
    elif is_long:
        ids, weights = _cut(conversation, ids, weights, encoding)
    if not weights[1:].any():
        return Dropped(NOTHING_TO_LEARN), is_long
    return shift(ids, weights), is_long


# ------------------------------------------------------------------------------------------------ too long


def _cut(
    conversation: Conversation, ids: np.ndarray, weights: np.ndarray, encoding: Encoding
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that stay. A token whose predecessor went is never learned, and nothing is added."""
    most = encoding.length + 1
    if encoding.truncation == "proportional":
        kept = _proportional(_is_answer(conversation, encoding), most)
    else:
        begin = int(encoding.tokenizer.bos is not None and ids[0] == encoding.tokenizer.bos)
        kept = KEPT[encoding.truncation](len(ids), most, begin)
    weights = weights.copy()
    weights[1:][~kept[:-1]] = 0.0
    return ids[kept], weights[kept]


def _keep_start(num_tokens: int, most: int, begin: int) -> np.ndarray:
    return np.arange(num_tokens) < most


def _keep_end(num_tokens: int, most: int, begin: int) -> np.ndarray:
    """The end, behind the begin of text where there is one."""
    place = np.arange(num_tokens)
    return (place < begin) | (place >= num_tokens - (most - begin))


def _middle_out(num_tokens: int, most: int, begin: int) -> np.ndarray:
    """The first half of what fits, and the last."""
    place = np.arange(num_tokens)
    return (place < most - most // 2) | (place >= num_tokens - most // 2)


KEPT: dict[str, Callable[[int, int, int], np.ndarray]] = {
    "keep_start": _keep_start,
    "keep_end": _keep_end,
    "middle_out": _middle_out,
}


def _proportional(is_answer: np.ndarray, most: int) -> np.ndarray:
    """Of each question and its answer the beginning, in proportion to their lengths, until the row is full."""
    kept, place, left = np.zeros(len(is_answer), bool), 0, most
    for asked, answered in _pairs(is_answer):
        if left <= 0:
            break
        num_asked, num_answered = proportions(asked, answered, left)
        kept[place : place + num_asked] = True
        kept[place + asked : place + asked + num_answered] = True
        place, left = place + asked + answered, left - num_asked - num_answered
    return kept


def proportions(asked: int, answered: int, most: int) -> tuple[int, int]:
    """How many tokens of a question and of its answer stay: the rule of LLaMA-Factory's `infer_seqlen`."""
    if 2 * answered < most:
        longest = most
    elif 2 * asked < most:
        longest = most - asked
    else:
        longest = int(most * (answered / (asked + answered)))
    stays = min(longest, answered)
    return min(max(most - stays, 0), asked), stays


def _pairs(is_answer: np.ndarray) -> Iterator[tuple[int, int]]:
    """Lengths of a question and of the answer that follows it."""
    runs = [(bool(value), len(list(run))) for value, run in groupby(is_answer)]
    if runs and runs[0][0]:
        runs.insert(0, (False, 0))
    if len(runs) % 2:
        runs.append((True, 0))
    yield from ((runs[n][1], runs[n + 1][1]) for n in range(0, len(runs), 2))


def _is_answer(conversation: Conversation, encoding: Encoding) -> np.ndarray:
    """Of each token, whether an assistant says it."""
    pieces = chat.write(conversation, encoding.fmt)
    assistants = {turn for turn, message in enumerate(conversation.messages) if message.role == "assistant"}
    is_said = [float(piece.part == SAID and piece.turn in assistants) for piece in pieces]
    return chat.encode_weighed([(pieces, is_said)], encoding.tokenizer)[0][1] > 0


def _without_oldest_turns(conversation: Conversation, encoding: Encoding) -> tuple[np.ndarray, np.ndarray] | None:
    """The conversation from the earliest question with which it fits, behind its system prompt."""
    for messages in _later_beginnings(conversation.messages):
        try:
            written = _weigh(replace(conversation, messages=messages), encoding)
        except CannotWrite:
            continue
        [(ids, weights)] = chat.encode_weighed([written], encoding.tokenizer)
        if len(ids) <= encoding.length + 1:
            return ids, weights
    return None


def _later_beginnings(messages: Sequence[Message]) -> Iterator[tuple[Message, ...]]:
    system = tuple(takewhile(lambda message: message.role == "system", messages))
    users = [turn for turn, message in enumerate(messages) if message.role == "user"]
    yield from ((*system, *messages[turn:]) for turn in users[1:])
