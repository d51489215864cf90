"""What a mixture promises: exact shares at every prefix, every example once an epoch, no neighbour in the way."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itjax.data import mixture

NAMES = ["mails", "sums", "poems", "games", "facts"]


def counts_are_within_one(source, shares):
    """The claim in whole numbers: |count * total - n * share| < total after every n."""
    total, n = sum(shares), np.arange(1, len(source) + 1)
    return all(
        (np.abs(np.cumsum(source == number) * total - n * share) < total).all() for number, share in enumerate(shares)
    )


def test_five_mails_and_two_sums_at_three_to_one():
    order = mixture.order([5, 2], [0.75, 0.25], num=8, seed=0, names=["mails", "sums"])
    assert order.source.tolist() == [0, 0, 0, 1, 0, 0, 0, 1]
    assert order.index.tolist() == [0, 3, 1, 1, 2, 4, 0, 0]
    assert order.epoch.tolist() == [0, 0, 0, 0, 0, 0, 1, 0]


def test_rates_follow_size_unless_weights_are_given():
    assert mixture.rates([30, 10], [None, None]).tolist() == [0.75, 0.25]
    assert mixture.rates([30, 10], [1.0, 3.0]).tolist() == [0.25, 0.75]


def test_a_given_weight_among_sources_without_is_a_share_of_all_examples():
    assert mixture.rates([30, 10, 5], [None, None, 0.5]).tolist() == [0.375, 0.125, 0.5]


@pytest.mark.parametrize(
    "sizes, weights, message",
    [
        ([], [], "0 sources"),
        ([3, 0], [None, None], "source 1 has no examples"),
        ([3, 3], [None, 1.0], "leaves nothing"),
        ([3, 3], [1.0, -1.0], "weight -1.0"),
        ([3, 3], [1.0, float("nan")], "weight nan"),
    ],
)
def test_impossible_mixtures_say_what_is_wrong(sizes, weights, message):
    with pytest.raises(ValueError, match=message):
        mixture.rates(sizes, weights)


@given(shares=st.lists(st.integers(1, 50), min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
def test_every_prefix_holds_each_source_as_often_as_its_rate_says(shares):
    rates = [share / sum(shares) for share in shares]
    assert counts_are_within_one(mixture.interleave(rates, 500), shares)


@given(draws=st.lists(st.floats(1e-3, 1), min_size=2, max_size=8))
@settings(deadline=None, max_examples=30)
def test_rates_that_are_no_simple_fractions_are_exact_too(draws):
    rates = [draw / sum(draws) for draw in draws]
    source = mixture.interleave(rates, 300)
    total = sum(map(Fraction, rates))
    for number, rate in enumerate(rates):
        drawn = np.cumsum(source == number).tolist()
        assert all(abs(count - n * Fraction(rate) / total) < 1 for n, count in enumerate(drawn, start=1))


def test_a_rare_source_is_not_rounded_away():
    source = mixture.interleave([1 - 1e-5, 1e-5], 200_000)
    assert np.count_nonzero(source == 1) == 2


def test_an_epoch_of_proportional_sources_holds_every_example_once():
    sizes = [100, 37, 1, 11]
    rates = mixture.rates(sizes, [None] * 4)
    order = mixture.order(sizes, rates, num=3 * sum(sizes), seed=3, names=NAMES[:4])
    for epoch in range(3):
        part = slice(epoch * sum(sizes), (epoch + 1) * sum(sizes))
        assert set(order.epoch[part]) == {epoch}
        assert len(set(zip(order.source[part].tolist(), order.index[part].tolist(), strict=True))) == sum(sizes)


def test_a_longer_order_begins_with_the_shorter():
    def first(num):
        return mixture.order([9, 4, 2], [0.5, 0.3, 0.2], num=num, seed=1, names=NAMES[:3])

    short, long = first(17), first(100)
    for name in ("source", "index", "epoch"):
        np.testing.assert_array_equal(getattr(short, name), getattr(long, name)[:17])


def test_adding_a_source_reshuffles_no_other():
    before = mixture.order([9, 4], [0.6, 0.4], num=200, seed=1, names=["mails", "sums"])
    after = mixture.order([7, 9, 4], [0.5, 0.3, 0.2], num=200, seed=1, names=["poems", "mails", "sums"])
    for old, new in ((0, 1), (1, 2)):
        shuffle, again = before.index[before.source == old], after.index[after.source == new]
        num = min(len(shuffle), len(again))
        assert num > 20
        np.testing.assert_array_equal(shuffle[:num], again[:num])


def test_epochs_seeds_and_names_each_give_another_shuffle():
    base = mixture.shuffled(50, 100, seed=1, name="mails").tolist()
    assert base[:50] != base[50:]
    assert base != mixture.shuffled(50, 100, seed=2, name="mails").tolist()
    assert base != mixture.shuffled(50, 100, seed=1, name="sums").tolist()


def test_a_shuffle_is_the_same_on_every_machine():
    """If this changes, runs cannot be resumed across the change: raise loader.PLAN_VERSION."""
    assert mixture.permutation(6, 1, 2, 3).tolist() == [1, 3, 5, 2, 0, 4]


def test_names_are_distinct():
    with pytest.raises(ValueError, match="names distinct"):
        mixture.order([2, 2], [0.5, 0.5], num=2, seed=0, names=["mails", "mails"])
