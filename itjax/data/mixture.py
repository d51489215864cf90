"""Which source comes next, and how often: a deterministic order of (source, index, epoch), exact at every prefix.

    5 mails and 2 sums at the rates 3/4 and 1/4
    source   0  0  0  1  0  0  0  1      after n examples source s was drawn n * rate[s] times, off by less than one
    index    0  3  1  1  2  4  0  0      inside a source: a new seeded permutation in every epoch
    epoch    0  0  0  0  0  0  1  0

The order is stateless: the first n of a longer order are the same n, and adding a source reshuffles no other.
"""

import hashlib
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

# size / total is recovered from its float64 while the total stays below this (its square is float64's precision).
LARGEST_DENOMINATOR = 2**26


@dataclass(frozen=True)
class Order:
    """Example number n of the run is `index[n]` of source `source[n]`, in that source's epoch `epoch[n]`."""

    source: np.ndarray  # int32
    index: np.ndarray  # int64
    epoch: np.ndarray  # int32


def rates(sizes: Sequence[int], weights: Sequence[float | None]) -> np.ndarray:
    """Share of every source in the examples drawn, adding up to 1.

    All None: proportional to size, so that an epoch holds every example once. All given: normalised, so 2 and 1 are
    2/3 and 1/3. Some of each: the given ones are shares of all examples, and the others divide the rest by size.
    """
    _check(sizes, weights)
    total = sum(sizes)
    if all(weight is None for weight in weights):
        return np.array([size / total for size in sizes])
    given = math.fsum(weight for weight in weights if weight is not None)
    if None not in weights:
        return np.array([weight / given for weight in weights if weight is not None])
    if given >= 1:
        raise ValueError(
            f"mixture: the weights given add up to {given:g}, which leaves nothing for the sources without one; "
            "make them shares below 1 in all, or give every source a weight"
        )
    others = sum(size for size, weight in zip(sizes, weights, strict=True) if weight is None)
    return np.array(
        [(1 - given) * size / others if weight is None else weight for size, weight in zip(sizes, weights, strict=True)]
    )


def order(
    sizes: Sequence[int], rates: Sequence[float] | np.ndarray, *, num: int, seed: int, names: Sequence[str]
) -> Order:
    """The first `num` examples. Each source's shuffle depends on the seed, its name and the epoch, and nothing else."""
    if not len(sizes) == len(rates) == len(names) or len(set(names)) != len(names):
        raise ValueError(
            f"mixture: {len(sizes)} sizes, {len(rates)} rates, names {list(names)}; give one of each, all names distinct"
        )
    source = interleave(rates, num)
    index, epoch = np.empty(num, np.int64), np.empty(num, np.int32)
    for number, (size, name) in enumerate(zip(sizes, names, strict=True)):
        at = np.flatnonzero(source == number)
        index[at] = shuffled(size, len(at), seed=seed, name=name)
        epoch[at] = np.arange(len(at)) // size
    return Order(source, index, epoch)


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


def shuffled(size: int, num: int, *, seed: int, name: str) -> np.ndarray:
    """The first `num` indices of a source that is shuffled anew in every epoch."""
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    epochs = [permutation(size, seed, key, epoch) for epoch in range(-(-num // size))]
    return np.concatenate(epochs)[:num] if epochs else np.empty(0, np.int64)


def permutation(size: int, *key: int) -> np.ndarray:
    """The numbers below `size` in an order that is a function of the key alone, on every machine.

    Sorting raw bits, because numpy promises to keep the bits of a generator and not what `permutation` makes of them.
    """
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(bits, kind="stable")


def _check(sizes: Sequence[int], weights: Sequence[float | None]) -> None:
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
