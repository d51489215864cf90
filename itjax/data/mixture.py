"""Which source comes next, and how often: a deterministic order of (source, index, epoch), exact at every prefix.

    5 mails and 2 sums at the rates 3/4 and 1/4
    source   0  0  0  1  0  0  0  1      after n examples source s was drawn n * rate[s] times, off by less than one
    index    0  3  1  1  2  4  0  0      inside a source: a new seeded permutation in every epoch
    epoch    0  0  0  0  0  0  1  0

The order is stateless: the first n of a longer order are the same n, and adding a source reshuffles no other. Rates may
be of tokens instead: then what was drawn of a source is off by less than the longest example, after every example.
"""

import hashlib
import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from itjax.base.schema import Mixture

# size / total is recovered from its float64 while the total stays below this (its square is float64's precision).
LARGEST_DENOMINATOR = 2**26


@dataclass(frozen=True)
class Order:
    """Example number n of the run is `index[n]` of source `source[n]`, in that source's epoch `epoch[n]`."""

    source: np.ndarray  # int32
    index: np.ndarray  # int64
    epoch: np.ndarray  # int32

    def __len__(self) -> int:
        return len(self.source)


# --- how often --------------------------------------------------------------------------------------------------------


def rates(
    sizes: Sequence[float],
    weights: Sequence[float | None],
    rules: Mixture | None = None,
    *,
    scales: Sequence[float] | None = None,
) -> np.ndarray:
    """Share of every source in what is drawn, adding up to 1; sizes and shares are in the same unit.

    All None: by the rules, or proportional to size, so that an epoch holds every example once. All given: normalised,
    so 2 and 1 are 2/3 and 1/3. Some of each: the given ones are shares of all, and the rules divide the rest.
    """
    _check(sizes, weights)
    given = math.fsum(weight for weight in weights if weight is not None)
    if None not in weights:
        return np.array([weight / given for weight in weights if weight is not None])
    if given >= 1:
        raise ValueError(
            f"mixture: the weights given add up to {given:g}, which leaves nothing for the sources without one; "
            "make them shares below 1 in all, or give every source a weight"
        )
    others = [number for number, weight in enumerate(weights) if weight is None]
    amounts = _amounts(
        [sizes[number] for number in others],
        rules or Mixture(),
        scales=[1.0 if scales is None else scales[number] for number in others],
        part=1 - given,
    )
    shares = np.array([0.0 if weight is None else weight for weight in weights])
    shares[others] = (1 - given) * amounts / math.fsum(amounts)
    return shares


def _amounts(sizes: Sequence[float], rules: Mixture, *, scales: Sequence[float], part: float) -> np.ndarray:
    """What each source counts as; `part` is the share of all that they divide."""
    if rules.rates == "equal":
        return np.ones(len(sizes))
    if rules.rates == "unimax":
        if rules.budget is None:
            raise ValueError("mixture.budget: not set; rates='unimax' divides it: how much is drawn in all")
        return unimax(sizes, budget=rules.budget * part, max_epochs=rules.max_epochs)
    return capped(sizes, scales=scales, cap=rules.cap, temperature=rules.temperature)


def capped(sizes: Sequence[float], *, scales: Sequence[float], cap: float | None, temperature: float) -> np.ndarray:
    """min(scale * size, cap) ^ (1 / temperature): the examples-proportional mixing of T5 (arXiv 1910.10683, 3.5.2).

    sizes                    10,000  393,000  120,000  2,000  3,000,000
    cap 30,000               10,000   30,000   30,000  2,000     30,000
    """
    amounts = np.multiply(sizes, scales)
    if cap is not None:
        amounts = np.minimum(amounts, cap)
    return amounts if temperature == 1 else amounts ** (1 / temperature)


def unimax(sizes: Sequence[float], *, budget: float, max_epochs: float) -> np.ndarray:
    """How much is drawn of each source: an even part of the budget, or `max_epochs` passes where that is less.

    What a small source leaves is divided evenly among the larger ones (UniMax, arXiv 2304.09151).
    """
    amounts, left = np.zeros(len(sizes)), budget
    smallest_first = np.argsort(sizes, kind="stable")
    for done, number in enumerate(smallest_first.tolist()):
        amounts[number] = min(left / (len(sizes) - done), sizes[number] * max_epochs)
        left -= amounts[number]
    return amounts


# --- which one next ---------------------------------------------------------------------------------------------------


class Pool(NamedTuple):
    """What is drawn from one source.

    A source may hold its rows in several editions, one behind the other, other phrasings of the same rows: edition k ends
    before example `ends[k]`. Its epoch e draws from edition e, from the first again after the last.
    """

    name: str
    ends: np.ndarray  # int64
    costs: np.ndarray | None = None  # what each example counts; None: one each
    max_epochs: float | None = None

    @property
    def limit(self) -> int | None:
        """Examples that `max_epochs` passes hold: those of whole passes and a share of the next, rounded down."""
        if self.max_epochs is None:
            return None
        whole = int(self.max_epochs)
        begin, end = self.begin(whole), self.begin(whole + 1)
        return begin + math.floor(round((self.max_epochs - whole) * (end - begin), 6))

    def begin(self, epoch: int) -> int:
        """How many examples the epochs before this one draw."""
        rounds, edition = divmod(epoch, len(self.ends))
        return rounds * int(self.ends[-1]) + (int(self.ends[edition - 1]) if edition else 0)

    def epoch(self, draw: int) -> int:
        """The epoch in which draw number `draw`, from 0, falls."""
        rounds, within = divmod(draw, int(self.ends[-1]))
        return rounds * len(self.ends) + int(np.searchsorted(self.ends, within, side="right"))


class Span(NamedTuple):
    """Examples in a row that were drawn at the same rates."""

    num: int
    rates: np.ndarray


def draw(
    pools: Sequence[Pool],
    rates: Callable[[frozenset[int]], np.ndarray],
    *,
    drawn: Sequence[int] | np.ndarray,
    num: int,
    seed: int,
) -> tuple[Order, list[Span]]:
    """The next `num` examples when so many of each source were drawn before.

    `rates` gives the rates without the sources that are exhausted, which begins when one would be drawn once more than
    its pool allows. The order is shorter than `num` where it gives only zeros.
    """
    counts = np.array(drawn, np.int64)
    gone: frozenset[int] = frozenset()
    sources, spans, left = [np.empty(0, np.int32)], [], num
    while left and (now := rates(gone)).any():
        source, missing = _until_exhausted(pools, now, counts, left, seed)
        sources.append(source)
        spans.append(Span(len(source), now))
        counts += np.bincount(source, minlength=len(pools))
        left -= len(source)
        gone |= {missing} if missing is not None else set()
    return _numbered(pools, np.concatenate(sources), drawn, seed), spans


def order(
    sizes: Sequence[int], rates: Sequence[float] | np.ndarray, *, num: int, seed: int, names: Sequence[str]
) -> Order:
    """The first `num` examples. Each source's shuffle depends on the seed, its name and the epoch, and nothing else."""
    if not len(sizes) == len(rates) == len(names) or len(set(names)) != len(names):
        raise ValueError(
            f"mixture: {len(sizes)} sizes, {len(rates)} rates, names {list(names)}; give one of each, all names distinct"
        )
    pools = [Pool(name, np.array([size])) for size, name in zip(sizes, names, strict=True)]
    return draw(pools, lambda gone: np.asarray(rates), drawn=[0] * len(sizes), num=num, seed=seed)[0]


def _until_exhausted(
    pools: Sequence[Pool], rates: np.ndarray, drawn: np.ndarray, num: int, seed: int
) -> tuple[np.ndarray, int | None]:
    """Source numbers at these rates, and the source that the order ends at for want of examples."""
    active = np.flatnonzero(rates)
    if pools[active[0]].costs is not None:
        costs = [_costs(pools[number], int(drawn[number]), seed) for number in active.tolist()]
        source, missing = interleave_by_cost(rates[active], costs, num)
        return active[source].astype(np.int32), None if missing is None else int(active[missing])
    source = active[interleave(rates[active], num)].astype(np.int32)
    end, first_missing = num, None
    for number in active.tolist():
        if (limit := pools[number].limit) is not None:
            at = np.flatnonzero(source == number)
            room = max(0, limit - int(drawn[number]))
            if len(at) > room and at[room] < end:
                end, first_missing = int(at[room]), number
    return source[:end], first_missing


def interleave(rates: Sequence[float] | np.ndarray, num: int) -> np.ndarray:
    """Source numbers such that every prefix of length n holds `n * rate` of each, off by less than one.

    Draw j (from 0) of a source may not come before slot floor(j / rate), nor after slot ceil((j + 1) / rate) - 1:
    one slot too early or too late would be off by one. Serving the earliest deadline among the released draws meets
    all of them whenever the rates add up to 1 (Tijdeman's chairman assignment; unit jobs on one machine).
    """
    shares, total = _integers(rates)
    if len(shares) == 1:
        return np.zeros(num, np.int32)
    period = min(num, total)  # after `total` slots every source is exactly even, and the pattern starts again
    slots = np.empty(period, np.int32)
    ready = sorted((-(-total // share), number) for number, share in enumerate(shares))  # (deadline, source), a heap
    waiting: list[tuple[int, int, int]] = []  # (release, deadline, source), a heap
    drawn = [0] * len(shares)
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, deadline, number = heapq.heappop(waiting)
            heapq.heappush(ready, (deadline, number))
        _, number = ready[0]
        slots[slot] = number
        drawn[number] = draws = drawn[number] + 1
        release, deadline = draws * total // shares[number], -(-(draws + 1) * total // shares[number])
        if release <= slot + 1:
            heapq.heapreplace(ready, (deadline, number))
        else:
            heapq.heappop(ready)
            heapq.heappush(waiting, (release, deadline, number))
    return np.resize(slots, num)


def interleave_by_cost(
    rates: Sequence[float] | np.ndarray, costs: Sequence[Iterator[int]], num: int
) -> tuple[np.ndarray, int | None]:
    """The same with examples that cost more or less: what a source has had is off by less than the highest cost.

    An ideal server would serve all sources at once, each at its rate: an example begins there when those before it have
    been served, and ends when it has been. Here examples come one after the other: always the one that ends first among
    those that would have begun. So a source is ahead by less than the example it was given, and behind by less than the
    one example that may stand in its way (WF2Q of Bennett and Zhang, 1996).

    `costs` gives what the next examples of each source cost. Where one has no more when it is due, the numbers end, and
    the source is told.
    """
    shares, total = _integers(rates)
    common = math.lcm(*shares)
    pace = [common // share * total for share in shares]  # the ideal server's time for one unit, as a whole number
    slots = np.empty(num, np.int32)
    now = 0
    ready: list[tuple[int, int, int | None]] = []  # (end, source, cost), a heap
    waiting: list[tuple[int, int, int, int | None]] = []  # (begin, end, source, cost), a heap
    for number, further in enumerate(costs):
        cost = next(further, None)  # none left: due at once
        ready.append((0 if cost is None else cost * pace[number], number, cost))
    heapq.heapify(ready)
    for slot in range(num):
        while waiting and waiting[0][0] <= now:
            _, end, number, cost = heapq.heappop(waiting)
            heapq.heappush(ready, (end, number, cost))
        end, number, cost = heapq.heappop(ready)
        if cost is None:
            return slots[:slot], number
        slots[slot] = number
        now += cost * common
        begin, cost = end, next(costs[number], None)
        end = begin if cost is None else begin + cost * pace[number]
        if begin <= now:
            heapq.heappush(ready, (end, number, cost))
        else:
            heapq.heappush(waiting, (begin, end, number, cost))
    return slots, None


# --- inside a source --------------------------------------------------------------------------------------------------


def shuffled(pool: Pool, start: int, stop: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Index and epoch of the draws from `start` to `stop` of a source that is shuffled anew in every epoch."""
    found = [(np.empty(0, np.int64), np.empty(0, np.int32))]
    at = start
    while at < stop:
        epoch = pool.epoch(at)
        begin, end = pool.begin(epoch), min(pool.begin(epoch + 1), stop)
        found.append((_epoch(pool, epoch, seed)[at - begin : end - begin], np.full(end - at, epoch, np.int32)))
        at = end
    index, epochs = map(np.concatenate, zip(*found, strict=True))
    return index, epochs


def _epoch(pool: Pool, epoch: int, seed: int) -> np.ndarray:
    """The examples of an epoch's edition, in the epoch's order."""
    edition = epoch % len(pool.ends)
    first = int(pool.ends[edition - 1]) if edition else 0
    return first + permutation(int(pool.ends[edition]) - first, seed, _key(pool.name), epoch)


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def sample(size: int, num: int, *, seed: int, name: str) -> np.ndarray:
    """Which `num` rows stand for a source of `size`, in order: a larger sample holds the smaller."""
    return np.sort(permutation(size, seed, _key(name))[:num])


def permutation(size: int, *key: int) -> np.ndarray:
    """The numbers below `size` in an order that is a function of the key alone, on every machine.

    Sorting raw bits, because numpy promises to keep the bits of a generator and not what `permutation` makes of them.
    """
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(bits, kind="stable")


def _costs(pool: Pool, start: int, seed: int) -> Iterator[int]:
    """What the draws from `start` on cost, up to the pool's limit."""
    assert pool.costs is not None
    limit = pool.limit
    for epoch in itertools.count(pool.epoch(start)):
        begin, end = pool.begin(epoch), pool.begin(epoch + 1)
        if limit is not None and max(start, begin) >= limit:
            return
        end = end if limit is None else min(end, limit)
        yield from pool.costs[_epoch(pool, epoch, seed)][max(0, start - begin) : end - begin].tolist()


def _numbered(pools: Sequence[Pool], source: np.ndarray, drawn: Sequence[int] | np.ndarray, seed: int) -> Order:
    """Source numbers with the index and epoch of each draw."""
    index, epoch = np.empty(len(source), np.int64), np.empty(len(source), np.int32)
    for number, pool in enumerate(pools):
        at = np.flatnonzero(source == number)
        index[at], epoch[at] = shuffled(pool, int(drawn[number]), int(drawn[number]) + len(at), seed=seed)
    return Order(source, index, epoch)


def _check(sizes: Sequence[float], weights: Sequence[float | None]) -> None:
    if not sizes or len(sizes) != len(weights):
        raise ValueError(
            f"mixture: {len(sizes)} sources and {len(weights)} weights; give one weight (or None) a source"
        )
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        if size < 1:
            raise ValueError(
                f"mixture: source {number} has no examples; remove it, or see why all its rows were dropped"
            )
        if weight is not None and not 0 < weight < math.inf:
            raise ValueError(f"mixture: source {number} has weight {weight}; weights are above 0, or remove the source")


def _integers(rates: Sequence[float] | np.ndarray) -> tuple[list[int], int]:
    """Rates as whole numbers out of a common total: 0.75, 0.25 -> [3, 1], 4.

    Simple fractions are meant where they are the same float64 (0.1 is 1/10); otherwise the floats are taken exactly.
    """
    exact = [Fraction(float(rate)) for rate in rates]
    simple = [rate.limit_denominator(LARGEST_DENOMINATOR) for rate in exact]
    same = all(float(near) == float(rate) for near, rate in zip(simple, exact, strict=True))
    meant = simple if same and sum(simple) == 1 else exact
    if any(rate <= 0 for rate in meant):
        raise ValueError(
            f"mixture: rates {list(map(float, rates))}; every rate is above 0, remove the sources that are not"
        )
    common = math.lcm(*(rate.denominator for rate in meant))
    shares = [int(rate * common) for rate in meant]
    divisor = math.gcd(*shares)
    return [share // divisor for share in shares], sum(shares) // divisor
