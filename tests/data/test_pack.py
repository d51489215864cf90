"""What a plan of rows promises: every example in one row, rows nearly full, the same rows however long the run."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itjax.data import pack

LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=60)


def rows(plan, lengths):
    return [[lengths[item] for item in plan.row(number)] for number in range(plan.num_rows)]


def plain_best_fit(lengths, length):
    """The same rule as a search over all rows."""
    spaces = []
    for size in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= size]
        if fitting:
            spaces[spaces.index(min(fitting))] -= size
        else:
            spaces.append(length - size)
    return sorted(spaces)


def test_longest_first_into_the_fullest_row():
    lengths = [5, 2, 3, 1, 4, 4, 1]
    assert rows(pack.best_fit(np.array(lengths), 6), lengths) == [[5, 1], [4, 1], [4, 2], [3]]


@pytest.mark.parametrize(
    "lengths, expected",
    [([4, 2, 3, 1], [[4], [3, 1], [2]]), ([4, 1, 2, 3, 1], [[4], [3, 1], [2, 1]])],
)
def test_documented_packing_of_5_2_3_1_in_rows_of_4(lengths, expected):
    """TRL documents these rows for [5, 2, 3, 1], the 5 cut to 4 ("bfd") or split in 4 + 1 ("bfd_split")."""
    assert rows(pack.best_fit(np.array(lengths), 4), lengths) == expected


@given(lengths=LENGTHS)
@settings(deadline=None)
def test_rows_are_those_of_a_plain_best_fit(lengths):
    packed = rows(pack.best_fit(np.array(lengths), 20), lengths)
    assert sorted(20 - sum(row) for row in packed) == plain_best_fit(lengths, 20)


@given(lengths=LENGTHS, window=st.integers(1, 30), packing=st.booleans())
@settings(deadline=None)
def test_every_example_lies_in_one_row_and_fits(lengths, window, packing):
    plan = pack.plan(np.array(lengths), length=20, window=window, epoch=len(lengths), seed=0, packing=packing)
    assert sorted(plan.items.tolist()) == list(range(len(lengths)))
    assert all(0 < sum(row) <= 20 for row in rows(plan, lengths))


def test_windows_divide_an_epoch_evenly_and_never_cross_its_end():
    assert pack.window_ends(20, window=3, epoch=10).tolist() == [3, 6, 10, 13, 16, 20]
    assert pack.window_ends(11, window=3, epoch=10).tolist() == [3, 6, 10, 13]
    assert pack.window_ends(5, window=1000, epoch=4).tolist() == [4, 8]


def test_a_longer_run_begins_with_the_same_rows():
    lengths = np.random.default_rng(0).integers(1, 100, 3000)

    def planned(num):
        return pack.plan(lengths[:num], length=100, window=250, epoch=1000, seed=5, packing=True)

    short, long = planned(1250), planned(3000)
    assert short.num_rows > 500
    np.testing.assert_array_equal(short.row_offsets, long.row_offsets[: short.num_rows + 1])
    np.testing.assert_array_equal(short.items, long.items[: len(short.items)])


def test_rows_hold_the_examples_of_their_window():
    plan = pack.plan(np.full(100, 10), length=30, window=10, epoch=100, seed=0, packing=True)
    assert [item // 10 for item in plan.items] == sorted(item // 10 for item in range(100))


def test_long_examples_do_not_come_first():
    lengths = np.random.default_rng(0).integers(1, 100, 2000)
    plan = pack.plan(lengths, length=100, window=2000, epoch=2000, seed=0, packing=True)
    longest = np.maximum.reduceat(lengths[plan.items], plan.row_offsets[:-1])
    first, second = np.array_split(longest, 2)
    assert abs(first.mean() - second.mean()) < 5
    assert longest.std() > 10


def test_without_packing_every_example_has_its_own_row():
    plan = pack.plan(np.array([3, 1, 2]), length=9, window=3, epoch=3, seed=0, packing=False)
    assert np.diff(plan.row_offsets).tolist() == [1, 1, 1]
    assert sorted(plan.items.tolist()) == [0, 1, 2]


def test_rows_of_log_normal_lengths_are_full():
    """50,000 examples of 350 tokens on average in rows of 2,048, windows of 1,000 rows' worth."""
    draw = np.random.default_rng(0).lognormal(np.log(350) - 0.9**2 / 2, 0.9, 50_000)
    lengths = np.clip(draw, 8, 2048).astype(np.int32)
    window = int(1000 * 2048 / lengths.mean())
    plan = pack.plan(lengths, length=2048, window=window, epoch=50_000, seed=0, packing=True)
    assert pack.fill(plan, lengths, 2048) >= 0.995


def test_the_plan_is_the_same_in_another_process():
    code = (
        "import hashlib, numpy; from itjax.data import mixture, pack;"
        "order = mixture.order([700, 300], [.5, .5], num=1000, seed=7, names=['mails', 'sums']);"
        "plan = pack.plan(order.index % 50 + 1, length=64, window=100, epoch=1000, seed=7, packing=True);"
        "print(hashlib.sha256(plan.items.tobytes() + order.index.tobytes()).hexdigest())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


@pytest.mark.parametrize(
    "lengths, message",
    [([3, 11], "example 1 has 11 positions and a row has 10"), ([3, 0], "example 1 has 0 positions")],
)
def test_examples_that_cannot_lie_in_a_row_are_refused(lengths, message):
    with pytest.raises(ValueError, match=message):
        pack.plan(np.array(lengths), length=10, window=2, epoch=2, seed=0, packing=True)


def test_a_plan_that_ends_inside_a_window_is_refused():
    with pytest.raises(ValueError, match="a whole number of windows"):
        pack.plan(np.ones(7, int), length=10, window=5, epoch=10, seed=0, packing=True)
