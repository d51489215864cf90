"""A conversation to one shifted example: what goes in, what it should predict, and how much each prediction counts.

T positions of the example: one less than its tokens, for the last token predicts nothing.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from itjax.base.records import Conversation, Segment, TokenizedExample
from itjax.base.schema import TRUNCATIONS
from itjax.text import chat, formats
from itjax.text.tokenizer import Tokenizer

TOO_LONG = "too long"
NOTHING_TO_LEARN = "no trained token"


@dataclass(frozen=True)
class Encoding:
    """Everything that shapes the tokens of a conversation."""

    tokenizer: Tokenizer
    format: str
    length: int  # the most positions an example may have
    truncation: str
    prompt_weight: float

    def __post_init__(self) -> None:
        if self.truncation not in TRUNCATIONS:
            raise ValueError(f"truncation: {self.truncation!r} is unknown. Known: {', '.join(TRUNCATIONS)}")
        object.__setattr__(self, "format", self.fmt.name)  # what "auto" stands for

    @cached_property
    def fmt(self) -> formats.Format:
        return formats.resolve(self.format, self.tokenizer)

    def fingerprint(self) -> str:
        shape = (self.fmt, self.length, self.truncation, self.prompt_weight, self.tokenizer.fingerprint())
        return hashlib.sha256(repr(shape).encode()).hexdigest()


@dataclass(frozen=True)
class Dropped:
    """An example that is not trained on, and why."""

    reason: str


def encode(conversation: Conversation, encoding: Encoding) -> tuple[TokenizedExample | Dropped, bool]:
    """The example, or why there is none; and whether it was cut."""
    return encode_many([conversation], encoding)[0]


def encode_many(
    conversations: Sequence[Conversation], encoding: Encoding
) -> list[tuple[TokenizedExample | Dropped, bool]]:
    """`encode` for many at a time, which is faster."""
    rendered = [_render(conversation, encoding) for conversation in conversations]
    encoded = chat.encode_many(rendered, encoding.tokenizer)
    return [
        _example(ids, weights, encoding, conversation.key)
        for conversation, (ids, weights) in zip(conversations, encoded, strict=True)
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


def _render(conversation: Conversation, encoding: Encoding) -> list[Segment]:
    try:
        return chat.render(conversation, encoding.fmt, prompt_weight=encoding.prompt_weight)
    except ValueError as error:
        raise ValueError(f"{conversation.key}: {error}") from None


def _example(
    ids: np.ndarray, weights: np.ndarray, encoding: Encoding, key: str
) -> tuple[TokenizedExample | Dropped, bool]:
    most = encoding.length + 1  # tokens
    is_long = len(ids) > most
    if is_long and encoding.truncation == "error":
        raise ValueError(
            f"{key}: {len(ids) - 1} positions, but length is {encoding.length}; "
            "raise length, or choose truncation drop, keep_start or keep_end"
        )
    if is_long and encoding.truncation == "drop":
        return Dropped(TOO_LONG), False
    if is_long:
        kept = slice(None, most) if encoding.truncation == "keep_start" else slice(-most, None)
        ids, weights = ids[kept], weights[kept]
    if not weights[1:].any():
        return Dropped(NOTHING_TO_LEARN), is_long
    return shift(ids, weights), is_long
