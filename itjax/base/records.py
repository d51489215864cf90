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
    name: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    reasoning: str | None = None


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
