"""Many short examples, one row: the plan of which example goes where.

    lengths (in the order of the mixture)   5  2  3  1  4  4  1        length 6, one window
    longest first into the fullest row      5 1 | 4 1 | 4 2 | 3
    segments of those rows                  111112 | 111120 | 111122 | 111000

The plan needs lengths only, so it takes a second for a million examples, is the same on every host, and any row of it
can be assembled without the rows before. Windows of examples are packed on their own: the order of the mixture
survives up to a window, and a longer run begins with the same rows.
"""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

from itjax.data.mixture import permutation


class Plan(NamedTuple):
    """Row r holds the examples `items[row_offsets[r]:row_offsets[r + 1]]`, numbers in the order of the mixture."""

    row_offsets: np.ndarray  # int64, one more than there are rows
    items: np.ndarray  # int64

    @property
    def num_rows(self) -> int:
        return len(self.row_offsets) - 1

    def row(self, number: int) -> np.ndarray:
        return self.items[self.row_offsets[number] : self.row_offsets[number + 1]]


def plan(lengths: np.ndarray, *, length: int, window: int, epoch: int, seed: int, packing: bool) -> Plan:
    """Rows of at most `length` positions for examples that all fit, none of them split.

    `lengths` are whole windows (see `window_ends`). With `packing=False` every example has a row of its own.
    Rows of a window are shuffled by a seeded permutation, so that long examples do not come first.
    """
    lengths = np.asarray(lengths)
    _check(lengths, length)
    ends = window_ends(len(lengths), window=window, epoch=epoch)
    if len(lengths) and ends[-1] != len(lengths):
        raise ValueError(
            f"pack: {len(lengths)} examples end inside a window; give {ends[-1]}, a whole number of windows"
        )
    rows: list[np.ndarray] = []
    start = 0
    for number, end in enumerate(ends.tolist()):
        packed = shuffled(fit(lengths[start:end], length=length, packing=packing), seed=seed, number=number)
        rows += [start + packed.row(row) for row in range(packed.num_rows)]
        start = end
    return _join(rows)


def fit(lengths: np.ndarray, *, length: int, packing: bool) -> Plan:
    """The rows of one window; with `packing=False` every example has a row of its own."""
    return best_fit(lengths, length) if packing else _single(len(lengths))


def shuffled(window: Plan, *, seed: int, number: int) -> Plan:
    """The rows of window `number` of the run, in the order in which they are served."""
    rows = permutation(window.num_rows, seed, number)
    starts, sizes = window.row_offsets[rows], np.diff(window.row_offsets)[rows]
    ends = np.cumsum(sizes)
    items = window.items[np.repeat(starts - ends + sizes, sizes) + np.arange(len(window.items))]
    return Plan(np.concatenate([[0], ends]).astype(np.int64), items)


def window_ends(num: int, *, window: int, epoch: int) -> np.ndarray:
    """Where windows end, up to the first end that covers `num` examples.

    No window crosses the end of an epoch, and those of an epoch are equally large, so none is too small to pack well:
    an epoch of 10 with windows of about 3 ends them at 3, 6, 10, 13, 16, 20, ...
    """
    per_epoch = max(1, round(epoch / window))
    inside = np.arange(1, per_epoch + 1, dtype=np.int64) * epoch // per_epoch
    ends = (np.arange(-(-num // epoch), dtype=np.int64)[:, None] * epoch + inside).ravel()
    return ends[: np.searchsorted(ends, num) + 1] if num else ends


def window_end(at: int, *, window: int, epoch: int) -> int:
    """The first of the `window_ends` after `at`."""
    per_epoch, (epochs, inside) = max(1, round(epoch / window)), divmod(at, epoch)
    number = inside * per_epoch // epoch + 1
    if number * epoch // per_epoch == inside:
        number += 1
    return epochs * epoch + number * epoch // per_epoch


def best_fit(lengths: np.ndarray, length: int) -> Plan:
    """Best-fit decreasing: longest first, each into the row with the least space that still holds it, else a new row.

    Rows are kept by their free space, so the search is a bisection over at most `length` spaces however many rows.
    """
    longest_first = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    rows: list[list[int]] = []
    rows_with: dict[int, list[int]] = {}  # free space -> rows
    spaces: list[int] = []  # the keys of rows_with, in order
    for item, size in zip(longest_first.tolist(), np.asarray(lengths)[longest_first].tolist(), strict=True):
        at = bisect_left(spaces, size)
        if at == len(spaces):
            row, space = len(rows), length
            rows.append([])
        else:
            space = spaces[at]
            row = rows_with[space].pop()
            if not rows_with[space]:
                del rows_with[space], spaces[at]
        rows[row].append(item)
        left = space - size
        if left in rows_with:
            rows_with[left].append(row)
        elif left:
            rows_with[left] = [row]
            insort(spaces, left)
    return _join([np.array(row, np.int64) for row in rows])


def fill(plan: Plan, lengths: np.ndarray, length: int) -> float:
    """Share of the positions of all rows that hold a token."""
    return float(np.asarray(lengths)[plan.items].sum(dtype=np.int64)) / max(1, plan.num_rows * length)


def _single(num: int) -> Plan:
    return Plan(np.arange(num + 1, dtype=np.int64), np.arange(num, dtype=np.int64))


def _join(rows: list[np.ndarray]) -> Plan:
    sizes = np.fromiter(map(len, rows), np.int64, len(rows))
    items = np.concatenate(rows) if rows else np.empty(0, np.int64)
    return Plan(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), items)


def _check(lengths: np.ndarray, length: int) -> None:
    if len(lengths) and lengths.min() < 1:
        number = int(lengths.argmin())
        raise ValueError(
            f"pack: example {number} has {lengths[number]} positions; drop it, it holds nothing to predict"
        )
    if len(lengths) and lengths.max() > length:
        number = int(lengths.argmax())
        raise ValueError(
            f"pack: example {number} has {lengths[number]} positions and a row has {length}; "
            "truncate or drop it before, or raise length"
        )
