"""The things that flow: what one example is called at each stage on its way to a gradient.

B rows, T positions in a row. Everything here is plain data; no stage needs to import another to speak about it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Message:
    """One turn. `learn` None means the default: assistant turns are learned, all others are not."""

    role: str  # "system", "user", "assistant" or "tool"
    content: str
    learn: bool | float | None = None
    name: str | None = None  # of the tool that answers
    tool_calls: tuple["ToolCall", ...] = ()
    tool_call_id: str | None = None  # the call that a tool answers
    reasoning: str | None = None


@dataclass(frozen=True)
class ToolCall:
    """What an assistant asks a tool to do. `arguments` are as the row has them: an object, or JSON in a text."""

    name: str
    arguments: Any
    id: str | None = None


@dataclass(frozen=True)
class Conversation:
    """Turns in order, with the address they came from.

    `key` names the row so that a person can find it: `path:line`, or `task:number` for embedded tasks.
    """

    messages: tuple[Message, ...]
    source: str
    key: str
    template: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()  # functions the assistant may call, as the row declares them


@dataclass(frozen=True)
class Finding:
    """What a stage of the audit says of one example, in words that can be counted and never quote the data."""

    key: str  # of the example: `path:line`
    source: str
    stage: str  # "exact_duplicates", "personal", ...
    reason: str  # "email", "near-duplicate", "answer is empty"
    action: str  # "drop", "mask" or "tag"
    message: int | None = None  # which turn, from 0, and which stretch of its text
    part: str = "content"  # the text of the turn: "content", "reasoning", "tool_calls/0/to" (a path into an argument)
    start: int = 0
    stop: int = 0
    other: str = ""  # key of the example that it repeats, or of the evaluation item that it leaks
    score: float | None = None  # similarity, coverage, probability


@dataclass(frozen=True)
class Segment:
    """A stretch of text with one loss weight. `special` text is the format's own (one control token each), never data."""

    text: str
    weight: float
    special: bool = False


@dataclass(frozen=True)
class TokenizedExample:
    """One example, already shifted: `targets_T[t]` is what `tokens_T[t]` should predict, with weight `weights_T[t]`.

    text      [10, 11, 20, 21,  1]      10, 11 asked; 20, 21, 1 answered
    tokens_T  [10, 11, 20, 21]
    targets_T [11, 20, 21,  1]
    weights_T [ 0,  1,  1,  1]
    """

    tokens_T: np.ndarray  # int32
    targets_T: np.ndarray  # int32
    weights_T: np.ndarray  # float32


class PackedBatch(NamedTuple):
    """Rows of many examples each; a pytree of arrays, on the host (numpy) or on devices (global jax arrays).

    `segments_BT` numbers the examples of a row from 1, 0 is padding; positions restart at 0 in every segment.
    `source_BT` is the number of the example's source (0 on padding), for losses per source.
    """

    tokens_BT: Any  # int32
    targets_BT: Any  # int32
    segments_BT: Any  # int32
    positions_BT: Any  # int32
    weights_BT: Any  # float32
    source_BT: Any  # int32


@dataclass(frozen=True)
class DataPosition:
    """Where the data stands: the next step to serve, and the plan it belongs to. The same on every host."""

    step: int
    plan: str  # hash of everything that shapes the order of examples and rows
