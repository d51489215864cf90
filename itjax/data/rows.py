"""Every row of a run, planned before the first batch from lengths and a recipe.

    recipe.shares     the shares at each step
    mixture.draw      example number -> (source, index, epoch)
    pack              windows of examples -> rows, shuffled within their window
    step s            rows s * rows .. (s + 1) * rows - 1, the same for every number of hosts

A window never crosses the end of an epoch or of a stage, so every step has exactly the shares of its stage:

    examples   | window 0 | window 1 | window 2 ||| window 3 | ...      ||| the stage `late` begins
    rows       | 20       | 20       | 10       ||| 20       |          at step 5 of 10 rows

The window before a stage holds as many examples as fit the rows that are left, and what does not fit opens the stage.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from itjax.data import mixture, pack
from itjax.data.mixture import Order, Pool, Span
from itjax.data.recipe import Recipe, Size

PLAN_VERSION = 2  # part of the plan hash: raise it when the same settings begin to give another order
UNIT_COLUMNS = {"tokens": "lengths", "trained_tokens": "num_trained"}  # what an example counts, in each unit


class Source(Protocol):
    """What the loader needs of an encoded source: flat arrays, and where each example begins in them.

    Example i has `lengths[i]` positions and one id more, `tokens[offsets[i]:offsets[i + 1]]`; it is shifted when read.
    `weights` is aligned to `tokens`: the weight of predicting that token. Where rows are there in several editions, one
    behind the other, `edition_ends` has the number of examples up to the end of each; without it there is one. Then
    `rows_fingerprint` is the fingerprint of rows and encoding however many editions there are; without it `fingerprint`.
    """

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def lengths(self) -> np.ndarray: ...
    @property
    def weight_sums(self) -> np.ndarray: ...
    @property
    def num_trained(self) -> np.ndarray: ...
    @property
    def offsets(self) -> np.ndarray: ...
    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def weights(self) -> np.ndarray: ...
    def __len__(self) -> int: ...


class Stage(NamedTuple):
    """Steps from `start` to `stop`, and how many examples of each source were asked for in them."""

    name: str
    start: int
    stop: int
    asked: np.ndarray  # float64


@dataclass(frozen=True)
class Rows:
    """The planned examples in row order: row r holds those from `offsets[r]` to `offsets[r + 1]`, an empty row none."""

    offsets: np.ndarray  # int64
    source: np.ndarray  # int32
    index: np.ndarray  # int64
    epoch: np.ndarray  # int32
    stages: tuple[Stage, ...]
    windows: np.ndarray  # int64, the first row of every window
    reached: np.ndarray  # int64, (window, source): epochs of the source that have begun when the window ends
    ended_by: str  # why the data ends before the epochs asked for; empty: it does not


def editions(source: Source) -> np.ndarray:
    """Where the editions of a source end."""
    ends = np.asarray(getattr(source, "edition_ends", [len(source)]), np.int64)
    if not len(ends) or ends[-1] != len(source) or (np.diff(ends, prepend=0) < 0).any():
        raise ValueError(
            f"sources.{source.name}: editions end at {ends.tolist()}, but it has {len(source)} examples; "
            "the cache is damaged, remove it"
        )
    return ends


def size(source: Source) -> Size:
    """What one pass over the source holds: its first edition."""
    first = int(editions(source)[0])
    return Size(first, *(int(np.sum(getattr(source, name)[:first], dtype=np.int64)) for name in UNIT_COLUMNS.values()))


def per_example(arrays: Sequence[np.ndarray], order: Order) -> np.ndarray:
    """One value for every example of an order, from an array for each source."""
    sizes = np.array([len(array) for array in arrays], np.int64)
    return np.concatenate(arrays)[(np.cumsum(sizes) - sizes)[order.source] + order.index]


# --- the plan ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What rows look like. `window` is in rows' worth of examples."""

    length: int
    rows: int
    window: int
    seed: int
    packing: bool


def plan(sources: Sequence[Source], recipe: Recipe, shape: Shape, *, steps: int | None, epochs: float | None) -> Rows:
    """Every row of so many steps or epochs, and empty ones up to the end of the last step.

    An epoch is as many examples as the sources hold together, in their first edition. Where the recipe ends before the
    steps asked for, that is an error; epochs end there.
    """
    ledger = _Ledger(sources, recipe, shape)
    goal = math.inf if steps is None else steps * shape.rows
    last = math.inf if epochs is None else math.ceil(epochs) * ledger.epoch_size
    borders = [*(start * shape.rows for start in recipe.starts[1:]), math.inf]
    spans = []
    for start, border in zip(recipe.starts, borders, strict=True):
        if ledger.num_rows >= goal or ledger.num_examples >= last:
            break
        stage = _Stage(ledger, start)
        spans.append(stage.fill(border=border, goal=min(goal, border), last=last))
        if stage.is_exhausted and ledger.num_rows < min(goal, border):
            break
    if not ledger.num_rows:
        raise ValueError(f"config.sources: there is nothing to draw: {_who(ledger)}; raise max_epochs")
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(ledger.row_sizes), dtype=np.int64)])
    num_rows = int(goal) if epochs is None else _rows_of(offsets, epochs, ledger.epoch_size)
    if num_rows > ledger.num_rows:
        raise ValueError(_too_few(ledger, num_rows))
    offsets = np.concatenate([offsets[: num_rows + 1], np.full(-num_rows % shape.rows, offsets[num_rows])])
    source, index, epoch = (np.concatenate(parts)[: offsets[-1]] for parts in zip(*ledger.orders, strict=True))
    return Rows(
        offsets,
        source,
        index,
        epoch,
        stages=tuple(_stages(recipe, spans, offsets[:: shape.rows])),
        windows=np.array(ledger.begins),
        reached=np.array(ledger.reached),
        ended_by=_who(ledger) if num_rows == ledger.num_rows and ledger.num_examples < last < math.inf else "",
    )


def _rows_of(offsets: np.ndarray, epochs: float, epoch_size: int) -> int:
    """Rows of so many epochs; of an epoch that is only begun, the same share of its rows, rounded up."""
    whole = int(epochs)
    begins, ends = np.searchsorted(offsets, [whole * epoch_size, (whole + 1) * epoch_size]).tolist()
    if ends == len(offsets) and offsets[-1] < epochs * epoch_size:  # the recipe ends before
        return len(offsets) - 1
    if ends == len(offsets):  # inside the epoch that is only begun
        return int(np.searchsorted(offsets, epochs * epoch_size))
    return max(1, begins + math.ceil(round((epochs - whole) * (ends - begins), 6)))


def _stages(recipe: Recipe, spans: Sequence[Sequence[Span]], by_step: np.ndarray) -> list[Stage]:
    """What each stage asked for, up to the last step; `by_step` has the examples before each step."""
    stops = [*recipe.starts[1:], len(by_step)]
    stages = []
    for start, stop, drawn in zip(recipe.starts, stops, spans, strict=False):
        stop = min(stop, len(by_step) - 1)
        if start >= stop:
            break
        left, asked = int(by_step[stop] - by_step[start]), np.zeros(len(recipe.names))
        for span in drawn:
            asked += min(span.num, left) * recipe.in_examples(span.rates)
            left -= min(span.num, left)
        stages.append(Stage(recipe.stage(start), start, stop, asked))
    return stages


def _who(ledger: "_Ledger") -> str:
    """The sources that are exhausted, and how."""
    found = [
        f"{pool.name} has had its max_epochs={pool.max_epochs:g} ({count:,} examples)"
        for pool, count in zip(ledger.pools, ledger.drawn.tolist(), strict=True)
        if pool.limit is not None and count >= pool.limit
    ]
    return ", ".join(found)


def _too_few(ledger: "_Ledger", num_rows: int) -> str:
    rows, policy = ledger.shape.rows, ledger.recipe.exhausted
    reached, steps = -(-ledger.num_rows // rows), num_rows // rows
    way = (
        "set mixture.exhausted='drop' to go on without it" if policy == "stop" else "give other sources a weight there"
    )
    return (
        f"config.steps: the data ends at step {reached} of {steps}: {_who(ledger)}, and mixture.exhausted is {policy!r}; "
        f"set steps to {reached}, raise max_epochs, or {way}"
    )


# --- stage by stage, window by window ---------------------------------------------------------------------------------


class _Ledger:
    """What is planned so far; windows are added at its end."""

    def __init__(self, sources: Sequence[Source], recipe: Recipe, shape: Shape) -> None:
        self.sources, self.recipe, self.shape = sources, recipe, shape
        costs = UNIT_COLUMNS.get(recipe.unit)
        self.pools = [
            Pool(source.name, editions(source), getattr(source, costs) if costs else None, limit)
            for source, limit in zip(sources, recipe.limits, strict=True)
        ]
        self.epoch_size = sum(int(pool.ends[0]) for pool in self.pools)
        self.drawn = np.zeros(len(sources), np.int64)
        self.orders: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # source, index, epoch in row order
        self.row_sizes: list[np.ndarray] = []  # examples of each row
        self.begins: list[int] = []  # first row of each window
        self.reached: list[list[int]] = []
        self.num_rows = self.num_examples = 0

    def add(self, order: Order, rows: pack.Plan) -> None:
        """A window of examples `order` in these rows."""
        self.begins.append(self.num_rows)
        self.orders.append((order.source[rows.items], order.index[rows.items], order.epoch[rows.items]))
        self.row_sizes.append(np.diff(rows.row_offsets))
        self.drawn += np.bincount(order.source, minlength=len(self.pools))
        counts = zip(self.pools, self.drawn.tolist(), strict=True)
        self.reached.append([pool.epoch(count - 1) + 1 if count else 0 for pool, count in counts])
        self.num_rows += rows.num_rows
        self.num_examples += len(order)


class _Stage:
    """Plans the windows of a stage, from its first example to its last row."""

    def __init__(self, ledger: _Ledger, start: int) -> None:
        self.ledger, self.start, self.is_exhausted = ledger, start, False
        self.first, self.drawn = ledger.num_examples, ledger.drawn.copy()  # before the stage
        shares = ledger.recipe.in_examples(ledger.recipe.shares(start))
        means = [size.tokens / size.examples for size in ledger.recipe.sizes.values()]
        self.per_row = ledger.shape.length / float(shares @ means) if ledger.shape.packing else 1.0  # examples, about
        self.window = math.ceil(ledger.shape.window * self.per_row)  # examples

    def fill(self, *, border: float, goal: float, last: float) -> list[Span]:
        """Adds windows until the rows up to `goal` or the examples up to `last` are there, or the recipe ends.

        The rows of the stage end at `border`, however far the run goes: a longer run begins the same.
        """
        ledger = self.ledger
        want = math.inf if math.isinf(goal) else (goal - ledger.num_rows) * self.per_row + 2 * self.window
        while True:
            num = math.floor(min(want, last - self.first))
            order, spans = mixture.draw(ledger.pools, self._shares, drawn=self.drawn, num=num, seed=ledger.shape.seed)
            self.is_exhausted = len(order) < num
            self._pack(order, border=border, goal=goal, is_all=self.is_exhausted or num == last - self.first)
            if self.is_exhausted or ledger.num_rows >= goal or ledger.num_examples >= last:
                return spans
            want = num + 1.05 * max(0, goal - ledger.num_rows) * self.per_row + self.window

    def _shares(self, without: frozenset[int]) -> np.ndarray:
        recipe = self.ledger.recipe
        if without and recipe.exhausted == "stop":
            return np.zeros(len(recipe.names))
        return recipe.shares(self.start, without=without)

    def _pack(self, order: Order, *, border: float, goal: float, is_all: bool) -> None:
        """Adds the windows that are not there yet, as far as the order goes; `is_all`: no longer order has more."""
        ledger, shape = self.ledger, self.ledger.shape
        lengths = per_example([source.lengths for source in ledger.sources], order)
        positions = lengths if shape.packing else np.full(len(order), shape.length)
        filled = np.concatenate([[0], np.cumsum(positions, dtype=np.int64)])
        at = ledger.num_examples - self.first
        while at < len(order) and ledger.num_rows < goal:
            left = border - ledger.num_rows
            end = self._end(at, left, filled)
            if end >= len(order) and not is_all:
                return
            rows = pack.fit(lengths[at:end], length=shape.length, packing=shape.packing)
            while rows.num_rows > left:
                end = at + _without_the_emptiest(rows, filled[at : end + 1], left=int(left))
                rows = pack.fit(lengths[at:end], length=shape.length, packing=shape.packing)
            rows = pack.shuffled(rows, seed=shape.seed, number=len(ledger.begins))
            window = Order(order.source[at:end], order.index[at:end], order.epoch[at:end])
            ledger.add(window, rows)
            at = end

    def _end(self, at: int, left: float, filled: np.ndarray) -> int:
        """Where the window that begins at `at` ends, in examples of the stage, if they fit the rows that are left of it.

        On the grid of the run; but the first window of a stage and its last may be half as large again, so that none is
        too small to pack well.
        """
        end, epoch_end = self._on_grid(at)
        if at == 0 and self.first and end < min(self.window / 2, epoch_end):
            end, _ = self._on_grid(end)
        if math.isinf(left) or end >= len(filled):
            return min(end, len(filled) - 1)
        shape = self.ledger.shape
        if (filled[end] - filled[at]) / shape.length <= left - shape.window / 2:
            return end
        fitting = int(np.searchsorted(filled, filled[at] + left * shape.length, side="right")) - 1
        return min(fitting, epoch_end)

    def _on_grid(self, at: int) -> tuple[int, int]:
        """The next end of a window after `at`, and the next end of an epoch."""
        size, number = self.ledger.epoch_size, self.first + at
        end = pack.window_end(number, window=self.window, epoch=size)
        return end - self.first, (number // size + 1) * size - self.first


def _without_the_emptiest(rows: pack.Plan, filled: np.ndarray, *, left: int) -> int:
    """How many of a window's examples are likely to fit `left` rows: all but as much as the emptiest rows hold."""
    held = filled[1:] - filled[:-1]
    per_row = np.add.reduceat(held[rows.items], rows.row_offsets[:-1])
    surplus = int(np.sort(per_row)[: rows.num_rows - left].sum())
    return min(len(held) - 1, int(np.searchsorted(filled, filled[-1] - surplus, side="right")) - 1)


# --- names of plans ---------------------------------------------------------------------------------------------------


class Hashes:
    """Names for a plan, as far as it has been begun: all that shapes the order of examples and their weights.

    Not how far it goes or on how many hosts it is read. Nor editions of a source that no window up to there needed, so
    that a longer run may add some.
    """

    def __init__(self, sources: Sequence[Source], recipe: Recipe, planned: Rows, settings: dict[str, Any]) -> None:
        self._windows, self._reached = planned.windows, planned.reached
        base = hashlib.blake2b(repr((PLAN_VERSION, recipe.key(), sorted(settings.items()))).encode(), digest_size=8)
        self._later: list[list[bytes]] = []
        for source in sources:
            first, *later = np.split(np.ascontiguousarray(source.lengths, "<i4"), editions(source)[:-1])
            fingerprint = getattr(source, "rows_fingerprint", source.fingerprint)
            base.update(repr((source.name, fingerprint)).encode() + first.tobytes())
            self._later.append([hashlib.blake2b(lengths.tobytes()).digest() for lengths in later])
        self._base = base

    def at(self, row: int) -> str:
        """The name of the plan as far as it shapes the rows before this one, and what their windows leave for later."""
        digest, begun = self._base.copy(), int(np.searchsorted(self._windows, row))
        for number, later in enumerate(self._later):
            used = later[: max(0, int(self._reached[begun - 1, number]) - 1)] if begun else []
            if used:
                digest.update(repr(number).encode() + b"".join(used))
        return digest.hexdigest()
