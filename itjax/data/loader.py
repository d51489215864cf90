"""Rows to batches: a planned, resumable iterator of this host's part of every global batch.

B rows of this host, T positions in a row. The whole run is planned before the first batch (`data/rows.py`), so the
position is one integer, any step can be had without those before it, and hosts, threads and worker processes change who
assembles a row, never what is in it. A run of fewer steps or epochs is the beginning of a longer one.
"""

import dataclasses
import gc
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import grain.python as grain
import numpy as np
from absl import flags

from itjax.base.records import DataPosition, PackedBatch
from itjax.base.schema import REDUCTIONS
from itjax.data.recipe import Recipe, plain, resolve
from itjax.data.rows import UNIT_COLUMNS, Hashes, Rows, Shape, Source, Stage, editions, plan, size

BATCHES_AHEAD = 2  # assembled but not served, in this process or in each worker


@dataclass(frozen=True)
class Placed:
    """One example in a row; segments count from 1."""

    source: str
    index: int
    epoch: int
    segment: int


def make_loader(
    sources: Sequence[Source],
    *,
    weights: Recipe | Sequence[float | None],
    length: int,
    rows: int,
    steps: int | None,
    epochs: float | None,
    window: int,
    seed: int,
    packing: bool,
    reduction: str,
    local_rows: Sequence[int],
    workers: int,
) -> "Loader":
    """Plan a run over encoded sources; `window` is in rows' worth of examples, `local_rows` are this host's of a batch.

    `weights` is the recipe of the mixture; or, for each source, a share of the examples or None, which is by size. Give
    `steps` or `epochs`. An epoch is as many examples as all sources hold together; with no weights it holds each exactly
    once. After the last whole or begun epoch the last step is filled up with empty rows.
    """
    _check(sources, length=length, rows=rows, steps=steps, epochs=epochs, local_rows=local_rows)
    if reduction not in REDUCTIONS:
        raise ValueError(f"loss.reduction: {reduction!r} is unknown; choose one of {', '.join(REDUCTIONS)}")
    shares = weights if isinstance(weights, Recipe) else _plain(sources, weights)
    if shares.names != tuple(source.name for source in sources):
        raise ValueError(
            f"sources: {', '.join(source.name for source in sources)} are to be mixed by a recipe for "
            f"{', '.join(shares.names)}; give both the same sources in the same order"
        )
    shape = Shape(length=length, rows=rows, window=window, seed=seed, packing=packing)
    planned = plan(sources, shares, shape, steps=steps, epochs=epochs)
    batches = Batches(sources, planned, rows=rows, length=length, reduction=reduction, local_rows=local_rows)
    _check_weights(batches)
    hashes = Hashes(sources, shares, planned, {**dataclasses.asdict(shape), "reduction": reduction})
    return Loader(batches, recipe=shares, hashes=hashes, workers=workers)


def _plain(sources: Sequence[Source], weights: Sequence[float | None]) -> Recipe:
    names = [source.name for source in sources]
    return resolve(plain(names, weights), {source.name: size(source) for source in sources})


class Batches:
    """Random access to the batches of a plan: `batches[step]` is this host's part, read at once and not one by one."""

    def __init__(
        self,
        sources: Sequence[Source],
        planned: Rows,
        *,
        rows: int,
        length: int,
        reduction: str,
        local_rows: Sequence[int],
    ) -> None:
        self.sources, self.planned = tuple(sources), planned
        self.rows, self.length, self.reduction = rows, length, reduction
        self.local_rows = np.asarray(local_rows, np.int64)

    def __len__(self) -> int:
        return (len(self.planned.offsets) - 1) // self.rows

    def __getitem__(self, step: int) -> PackedBatch:
        return self.assemble(step, self.local_rows)

    def members(self, step: int) -> slice:
        """Where the examples of all rows of a step stand in the plan."""
        first = step * self.rows
        return slice(int(self.planned.offsets[first]), int(self.planned.offsets[first + self.rows]))

    def assemble(self, step: int, rows_B: np.ndarray) -> PackedBatch:
        """Rows of a step as arrays: every example lands in its segment, source by source, in a few vectorised copies.

        e: examples of the batch sorted by source, t: their tokens in that order.
        """
        offsets, size = self.planned.offsets, (len(rows_B), self.length)
        starts_B = offsets[step * self.rows + rows_B]
        counts_B = offsets[step * self.rows + rows_B + 1] - starts_B
        rows_e, examples_e = np.repeat(np.arange(len(rows_B)), counts_B), ranges(starts_B, counts_B)
        sources_e, lengths_e = self.planned.source[examples_e], self.per_example("lengths", examples_e).astype(np.int64)
        begins_e = (
            rows_e * self.length + _before(lengths_e) - _before(np.bincount(rows_e, lengths_e, len(rows_B)))[rows_e]
        )
        by_source = np.argsort(sources_e, kind="stable")
        rows_e, examples_e, sources_e = rows_e[by_source], examples_e[by_source], sources_e[by_source]
        begins_e, lengths_e = begins_e[by_source].astype(np.int64), lengths_e[by_source]
        segments_e = examples_e - starts_B[rows_e] + 1

        places_t = ranges(begins_e, lengths_e)
        tokens_t, targets_t, weights_t = self._read(examples_e, sources_e, lengths_e)
        weights_t *= np.repeat(self._scales(step, examples_e, sources_e), lengths_e)

        def spread(values_t: np.ndarray, dtype: Any) -> np.ndarray:
            array_BT = np.zeros(size, dtype)
            array_BT.reshape(-1)[places_t] = values_t
            return array_BT

        return PackedBatch(
            tokens_BT=spread(tokens_t, np.int32),
            targets_BT=spread(targets_t, np.int32),
            segments_BT=spread(np.repeat(segments_e.astype(np.int32), lengths_e), np.int32),
            positions_BT=spread(ranges(np.zeros_like(begins_e), lengths_e), np.int32),
            weights_BT=spread(weights_t, np.float32),
            source_BT=spread(np.repeat(sources_e, lengths_e), np.int32),
        )

    def per_example(self, name: str, members: slice | np.ndarray) -> np.ndarray:
        """A per-example array of the sources (`lengths`, `weight_sums`, ...) for planned examples."""
        source, index = self.planned.source[members], self.planned.index[members]
        values = np.zeros(len(source), getattr(self.sources[0], name).dtype)
        for number in np.unique(source):
            here = source == number
            values[here] = getattr(self.sources[number], name)[index[here]]
        return values

    def _read(
        self, examples_e: np.ndarray, sources_e: np.ndarray, lengths_e: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, targets and weights of examples that are sorted by source: three batched reads a source."""
        num = int(lengths_e.sum())
        tokens_t, targets_t, weights_t = np.empty(num, np.int32), np.empty(num, np.int32), np.empty(num, np.float32)
        start = 0
        for number in np.unique(sources_e):
            source, here = self.sources[number], sources_e == number
            from_t = ranges(source.offsets[self.planned.index[examples_e[here]]], lengths_e[here])
            tokens, weights = np.asarray(source.tokens), np.asarray(source.weights)
            stop = start + len(from_t)
            tokens_t[start:stop] = tokens[from_t]
            from_t += 1
            targets_t[start:stop], weights_t[start:stop] = tokens[from_t], weights[from_t]
            start = stop
        return tokens_t, targets_t, weights_t

    def _scales(self, step: int, examples_e: np.ndarray, sources_e: np.ndarray) -> np.ndarray:
        """What an example's weights are multiplied by, so that the sum over the step is the reduction asked for.

        token: 1. example: weights of an example add up to 1. source: weights of a source add up to 1 over the whole
        global step, whatever part of it this host has.
        """
        if self.reduction == "token":
            return np.ones(len(examples_e), np.float32)
        if self.reduction == "example":
            sums_e = self.per_example("weight_sums", examples_e).astype(np.float64)
        else:
            members = self.members(step)
            sums = np.bincount(
                self.planned.source[members], self.per_example("weight_sums", members), len(self.sources)
            )
            sums_e = sums[sources_e]
        return np.divide(1.0, sums_e, out=np.zeros_like(sums_e), where=sums_e > 0).astype(np.float32)


class Loader:
    """An iterator of this host's batches that knows where it is."""

    def __init__(self, batches: Batches, *, recipe: Recipe, hashes: Hashes, workers: int) -> None:
        self._batches, self._hashes, self._workers = batches, hashes, workers
        self.recipe, self.plan_hash, self.num_steps = recipe, hashes.at(0), len(batches)
        self._step = 0
        self._ahead: Iterator[PackedBatch] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> PackedBatch:
        if self._step >= self.num_steps:
            self.close()
            raise StopIteration
        if self._ahead is None:
            self._ahead = _read_ahead(self._batches, self._step, self._workers)
        try:
            batch = next(self._ahead)
        except StopIteration:
            raise RuntimeError(f"data: the readers stopped at step {self._step} of {self.num_steps}") from None
        self._step += 1
        # Workers hand over shared memory, which would live as long as the caller's last batch; ours is plain memory.
        return PackedBatch(*map(np.array, batch)) if self._workers else batch

    def get_state(self) -> DataPosition:
        """The next step to serve: the same on every host, whatever has been read ahead."""
        return DataPosition(step=self._step, plan=self.plan_at(self._step))

    def plan_at(self, step: int) -> str:
        """The name of the plan up to a step: `plan_hash`, and the further editions of sources that it needs by then."""
        return self._hashes.at(step * self._batches.rows)

    def set_state(self, position: DataPosition) -> None:
        if position.plan != (here := self.plan_at(position.step)):
            raise ValueError(
                f"data position: step {position.step} belongs to plan {position.plan}, this run has plan "
                f"{here}; the files, mixture, seed, length, rows, window, packing or reduction have changed: "
                "change them back, or start a new run_dir"
            )
        if not 0 <= position.step <= self.num_steps:
            raise ValueError(
                f"data position: step {position.step} is not within the {self.num_steps} steps of this run; "
                "raise steps or epochs"
            )
        self.close()
        self._step = position.step

    def close(self) -> None:
        """Stop reading ahead, and end the worker processes. The next batch starts them again."""
        if self._ahead is not None:
            self._ahead.close()  # type: ignore[attr-defined]
            self._ahead = None
            if self._workers:
                # Grain's iterator is a cycle that owns semaphores; collected by chance while the next workers are
                # started, it would call multiprocessing's resource tracker from inside itself, which is an error.
                gc.collect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def batch(self, step: int, *, all_rows: bool = False) -> PackedBatch:
        """Any batch of the run, this host's rows or all of them; the position does not move."""
        self._check_step(step)
        rows_B = np.arange(self._batches.rows) if all_rows else self._batches.local_rows
        return self._batches.assemble(step, rows_B)

    def row(self, number: int) -> list[Placed]:
        """What lies in a row of the run; row r of step s is number `s * rows + r`."""
        offsets = self._batches.planned.offsets
        if not 0 <= number < len(offsets) - 1:
            raise ValueError(f"row {number}: this run has rows 0 to {len(offsets) - 2}")
        found = self._ids(slice(int(offsets[number]), int(offsets[number + 1])))
        return [Placed(*example, segment) for segment, example in enumerate(found, start=1)]

    def examples(self, step: int) -> list[tuple[str, int, int]]:
        """(source, index, epoch) of every example of the global batch, in row order."""
        self._check_step(step)
        return self._ids(self._batches.members(step))

    def lengths(self, step: int) -> np.ndarray:
        """Positions of every example of the global batch, in row order."""
        self._check_step(step)
        return self._batches.per_example("lengths", self._batches.members(step))

    @property
    def num_positions(self) -> int:
        """Positions of a global batch, padding included."""
        return self._batches.rows * self._batches.length

    def digest(self, step: int) -> str:
        """A short name for exactly these examples in this order, to compare runs by."""
        text = "\n".join(f"{source}\t{index}\t{epoch}" for source, index, epoch in self.examples(step))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def epoch(self, step: int) -> float:
        """Passes over the data made when `step` steps are done."""
        served = self._batches.planned.offsets[step * self._batches.rows]
        return float(served) / self._epoch_size

    def report(self) -> dict[str, Any]:
        """What the run will see: shares per source as asked for and as planned, passes, and how full the rows are."""
        batches, planned, recipe = self._batches, self._batches.planned, self.recipe
        num_full = int(np.count_nonzero(np.diff(planned.offsets)))
        asked = np.sum([stage.asked for stage in planned.stages], axis=0)
        shares, totals = self._shares(0, self.num_steps, asked)
        begun = planned.reached[-1].tolist()
        passes = [
            _passes(source, shares[source.name]["examples"], *more)
            for source, *more in zip(batches.sources, recipe.limits, begun, strict=True)
        ]
        return {
            "unit": recipe.unit,
            "rule": recipe.rule,
            "num_steps": self.num_steps,
            "num_rows": num_full,
            **totals,
            "tokens_per_step": totals["tokens"] / self.num_steps,
            "trained_share": totals["trained_tokens"] / totals["tokens"],
            "fill": totals["tokens"] / (num_full * batches.length),
            "rows_per_epoch": num_full * self._epoch_size / totals["examples"],
            "epochs": self.epoch(self.num_steps),
            "ended_by": planned.ended_by,
            "stages": [self._stage(stage) for stage in planned.stages] if len(recipe.starts) > 1 else [],
            "sources": {name: shares[name] | more for name, more in zip(shares, passes, strict=True)},
        }

    def _stage(self, stage: Stage) -> dict[str, Any]:
        """Shares in the steps of one stage, which are counted from 1 as in metrics.jsonl."""
        shares, totals = self._shares(stage.start, stage.stop, stage.asked)
        return {
            "stage": stage.name,
            "first_step": stage.start + 1,
            "last_step": stage.stop,
            **totals,
            "sources": shares,
        }

    def _shares(self, start: int, stop: int, asked: np.ndarray) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
        """What each source gives to these steps and what it was asked for, and what all give together."""
        batches = self._batches
        members = slice(batches.members(start).start, batches.members(stop - 1).stop)
        source = batches.planned.source[members]
        counts, plans = {"examples": np.bincount(source, minlength=len(batches.sources))}, {"examples": asked}
        for unit, column in UNIT_COLUMNS.items():
            counts[unit] = _per_source(source, batches.per_example(column, members), len(batches.sources))
            plans[unit] = asked * [getattr(size, unit) / size.examples for size in self.recipe.sizes.values()]
        shares = {
            name: {
                **{unit: int(count[number]) for unit, count in counts.items()},
                **{f"share_{unit}": _share(count, number) for unit, count in counts.items()},
                **{f"planned_share_{unit}": _share(plan, number) for unit, plan in plans.items()},
            }
            for number, name in enumerate(self.recipe.names)
        }
        return shares, {unit: int(count.sum()) for unit, count in counts.items()}

    @property
    def _epoch_size(self) -> int:
        return sum(size.examples for size in self.recipe.sizes.values())

    def _ids(self, members: slice) -> list[tuple[str, int, int]]:
        planned, names = self._batches.planned, [source.name for source in self._batches.sources]
        columns = planned.source[members], planned.index[members], planned.epoch[members]
        return [
            (names[source], index, epoch) for source, index, epoch in zip(*(c.tolist() for c in columns), strict=True)
        ]

    def _check_step(self, step: int) -> None:
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step {step}: this run has steps 0 to {self.num_steps - 1}")


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts [5, 0], counts [3, 2] -> [5, 6, 7, 0, 1]."""
    return np.repeat(starts - _before(counts), counts) + np.arange(counts.sum())


def _before(counts: np.ndarray) -> np.ndarray:
    """Sum of all counts before each: [3, 2, 4] -> [0, 3, 5]."""
    return np.cumsum(counts) - counts


def _per_source(source: np.ndarray, values: np.ndarray, num: int) -> np.ndarray:
    """Sums of a value of examples over each of `num` sources."""
    return np.bincount(source, values, num).astype(np.int64)


def _passes(source: Source, examples: int, limit: float | None, begun: int) -> dict[str, Any]:
    """How often the rows of a source are seen: epochs of its first edition, at most how often, and in how many editions.

    `epochs_begun` is the number of editions that the plan has use for, its last window to the end.
    """
    ends = editions(source)
    return {"epochs": examples / int(ends[0]), "epochs_begun": begun, "editions": len(ends), "max_epochs": limit}


def _share(counts: np.ndarray, number: int) -> float:
    total = float(counts.sum())
    return float(counts[number]) / total if total else 0.0


def _read_ahead(batches: Batches, step: int, workers: int) -> Iterator[PackedBatch]:
    """Grain serves the batches from `step` on, assembled in a thread or in worker processes, always in order."""
    dataset = grain.MapDataset.source(batches).slice(slice(step, None))
    stream = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=BATCHES_AHEAD))
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads its flags in the workers; a library cannot ask for absl's main
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=BATCHES_AHEAD)
        stream = stream.mp_prefetch(options)
    return iter(stream)


def _check(
    sources: Sequence[Source],
    *,
    length: int,
    rows: int,
    steps: int | None,
    epochs: float | None,
    local_rows: Sequence[int],
) -> None:
    if not sources:
        raise ValueError("sources: there are none; give files or sources")
    if (steps is None) == (epochs is None):
        raise ValueError(f"steps: {steps}, epochs: {epochs}; give one of the two")
    if (steps is not None and steps < 1) or (epochs is not None and not 0 < epochs < math.inf):
        raise ValueError(f"steps: {steps}, epochs: {epochs}; what is given is above 0")
    if outside := [row for row in local_rows if not 0 <= row < rows]:
        raise ValueError(f"local_rows: {outside} are not among the {rows} rows of a batch (0 to {rows - 1})")
    for source in sources:
        if not len(source):
            raise ValueError(
                f"sources.{source.name}: has no examples; see the reasons its rows were dropped for, or remove it"
            )
        longest = int(np.argmax(source.lengths))
        if source.lengths[longest] > length:
            too_long = int((source.lengths > length).sum())
            raise ValueError(
                f"sources.{source.name}: {too_long} of {len(source)} examples are longer than length={length} "
                f"(number {longest} has {source.lengths[longest]} positions); choose a truncation, or raise length"
            )


def _check_weights(batches: Batches) -> None:
    """A step in which nothing is learned would divide by zero; the plan knows it before the run begins."""
    learns = np.concatenate([[0], np.cumsum(batches.per_example("weight_sums", slice(None)) > 0)])
    per_step = np.diff(learns[batches.planned.offsets[:: batches.rows]])
    if not per_step.all():
        step = int(np.argmin(per_step > 0))
        raise ValueError(
            f"data: none of the {batches.rows} rows of step {step} has a token to learn; "
            "drop examples without a trained token, or raise rows"
        )
