"""What an implementation of attention is asked: how scores are made, which queries of a row it is given, on what.

B rows, T positions of a row, Q of them with a query, N query heads, K key/value heads, H head size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ATTENDED = "attended"  # what a forward pass leaves for the backward pass: a policy that keeps it does not run it again
HIDDEN = -1e30  # a score that is not seen; finite, so that a query which sees nothing gives numbers and not NaN


class Scores(NamedTuple):
    """How a query scores the keys it sees, and how far back it sees."""

    scale: float  # what products of queries and keys are multiplied with
    softcap: float = 0.0  # c: the scaled score s becomes c·tanh(s / c); 0: it stays
    window: int = 0  # a position sees itself and this many less one before it; 0: everything before it


class Stripes(NamedTuple):
    """Which positions of a row have the queries that are given: of `parts` shares of stripes, share number `part`.

    parts 2, size 2   positions  0 1 | 2 3 | 4 5 | 6 7      part 0 has 0 1 6 7, part 1 has 2 3 4 5

    They are dealt out forwards and backwards in turn, which shares causal work evenly, whatever the lengths of documents
    are. `part` may be a traced number.
    """

    part: jax.Array | int = 0
    parts: int = 1
    size: int = 0  # positions in a stripe; 0 where there is one part

    def places_Q(self, count: int) -> jax.Array:
        """The positions in the row of the first `count` queries that are given."""
        number_Q = jnp.arange(count)
        if self.parts == 1:
            return number_Q
        turn_Q = number_Q // self.size
        part_Q = jnp.where(turn_Q % 2 == 0, self.part, self.parts - 1 - self.part)
        return (turn_Q * self.parts + part_Q) * self.size + number_Q % self.size

    def all_places_PQ(self, length: int) -> np.ndarray:
        """The positions in a row of this length that each part has, before anything is traced."""
        size = self.size if self.parts > 1 else length
        places_MPS = np.arange(length).reshape(-1, self.parts, size)
        places_MPS[1::2] = places_MPS[1::2, ::-1].copy()
        return places_MPS.swapaxes(0, 1).reshape(self.parts, -1)


class Segments(NamedTuple):
    """Which document of its row each position belongs to; 0 is padding."""

    queries_BQ: jax.Array
    keys_BT: jax.Array


class Case(NamedTuple):
    """What is known of a call before it is compiled: by this an implementation says whether it can do it."""

    platform: str  # "cpu", "gpu" or "tpu"
    length: int  # T
    heads: int  # N, on one device
    kv_heads: int  # K, on one device
    head_size: int
    dtype: str
    scores: Scores
    sinks: bool = False
    parts: int = 1  # shares of stripes of a row, see `Stripes`


def sees_BQT(segments: Segments, places_Q: jax.Array, *, first: int = 0, window: int) -> jax.Array:
    """The definition: a query sees itself and what came before it in its own segment, a window back at most.

    The queries stand at `places_Q` of their rows, the keys from position `first` on.
    """
    back_QT = places_Q[:, None] - (first + jnp.arange(segments.keys_BT.shape[1]))[None, :]
    near_QT = (back_QT >= 0) & (back_QT < window) if window else back_QT >= 0
    return (segments.queries_BQ[:, :, None] == segments.keys_BT[:, None, :]) & near_QT[None]
