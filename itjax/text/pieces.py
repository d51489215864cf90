"""What a format writes, stretch by stretch: the text, whether it is a control token, and whose turn it belongs to.

    <|im_start|>   assistant\\n   Paris.   <|im_end|>   \\n
    special                               special
    FRAME          FRAME         SAID     SAID         AFTER

Loss weights come later: a piece only says what a stretch is.
"""

from typing import NamedTuple

EDGE = "edge"  # around the conversation: begin of text, end of text
FRAME = "frame"  # what announces a turn; a prompt ends with the frame of the answer
SAID = "said"  # what the one whose turn it is says, up to and including the token that ends the turn
AFTER = "after"  # what separates a turn from the next; nobody has to say it


class Piece(NamedTuple):
    """A stretch of text of one kind."""

    text: str
    turn: int  # number of the message in the conversation; -1: the format's own
    part: str
    special: bool = False  # exactly one control token, never data


class Part(NamedTuple):
    """Text of a writer of tools: the format's `own`, where its control tokens count, or data, where nothing does."""

    text: str
    own: bool = False


class CannotWrite(ValueError):
    """A conversation that a format has no way to write. `reason` can be counted: it is short and quotes no data."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])
