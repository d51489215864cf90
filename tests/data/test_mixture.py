"""What a mixture promises: exact shares at every prefix, every example once an epoch, no neighbour in the way."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itjax.base.schema import Mixture
from itjax.data import mixture
from itjax.data.mixture import Pool

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


def pool(name, *sizes, **settings):
    """A source with editions of these sizes."""
    return Pool(name, np.cumsum(sizes), **settings)


def shuffle(name, size, num, seed):
    return mixture.shuffled(pool(name, size), 0, num, seed=seed)[0].tolist()


def test_epochs_seeds_and_names_each_give_another_shuffle():
    base = shuffle("mails", 50, 100, seed=1)
    assert base[:50] != base[50:]
    assert base != shuffle("mails", 50, 100, seed=2)
    assert base != shuffle("sums", 50, 100, seed=1)


def test_a_shuffle_is_the_same_on_every_machine():
    """If this changes, runs cannot be resumed across the change: raise loader.PLAN_VERSION."""
    assert mixture.permutation(6, 1, 2, 3).tolist() == [1, 3, 5, 2, 0, 4]


def test_names_are_distinct():
    with pytest.raises(ValueError, match="names distinct"):
        mixture.order([2, 2], [0.5, 0.5], num=2, seed=0, names=["mails", "mails"])


# --- rates by rule ----------------------------------------------------------------------------------------------------


LANGUAGES = [179_955_884_499, 184_595_788_282, 42_541_080_893, 10_027_573_389, 549_707_867]  # swe fas ekk isl fao


def test_unimax_gives_the_published_counts():
    """The worked example of the unimax-sampling package: 250e9 characters, at most 4 epochs."""
    counts = mixture.unimax(LANGUAGES, budget=250e9, max_epochs=4)
    assert counts[3:].tolist() == [40_110_293_556, 2_198_831_468]
    assert [f"{count:.2f}" for count in counts[:3]] == ["69230291658.67"] * 3
    assert counts.sum() == pytest.approx(250e9, abs=1)


TASKS = [10_000, 393_000, 120_000, 2_000, 3_000_000]


@pytest.mark.parametrize(
    "rules, expected",
    [
        (Mixture(cap=30_000), [0.098, 0.2941, 0.2941, 0.0196, 0.2941]),
        (Mixture(cap=2**19, temperature=2), [0.0543, 0.3403, 0.1881, 0.0243, 0.3931]),
        (Mixture(temperature=4), [0.0981, 0.2456, 0.1826, 0.0656, 0.4082]),
        (Mixture(rates="equal"), [0.2] * 5),
    ],
)
def test_capped_and_tempered_rates_are_those_of_seqio(rules, expected):
    """Computed with seqio.utils.rate_num_examples, normalised."""
    assert mixture.rates(TASKS, [None] * 5, rules).round(4).tolist() == expected


def test_scale_comes_before_the_cap_and_the_cap_before_the_temperature():
    assert mixture.capped([10, 100], scales=[2, 2], cap=100, temperature=2).tolist() == [20**0.5, 10]


def test_rules_divide_what_the_weights_leave():
    rates = mixture.rates([900, 100, 50], [None, None, 0.5], Mixture(rates="equal"))
    assert rates.tolist() == [0.25, 0.25, 0.5]
    unimax = mixture.rates([900, 10, 50], [None, None, 0.5], Mixture(rates="unimax", budget=200, max_epochs=2))
    assert unimax.tolist() == [0.4, 0.1, 0.5]  # 100 are left: 20 of the small one, which is two passes, and 80


def test_unimax_needs_a_budget():
    with pytest.raises(ValueError, match=r"mixture\.budget: not set"):
        mixture.rates([3, 3], [None, None], Mixture(rates="unimax"))


# --- rates of tokens --------------------------------------------------------------------------------------------------


def costly(seed, num, longest):
    return np.random.default_rng(seed).integers(1, longest + 1, num)


@given(
    shares=st.lists(st.integers(1, 50), min_size=2, max_size=6),
    longest=st.lists(st.integers(1, 2000), min_size=6, max_size=6),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=60)
def test_every_prefix_holds_each_sources_share_of_the_tokens_within_the_longest_example(shares, longest, seed):
    costs = [costly(seed + number, 400, longest[number]) for number in range(len(shares))]
    source, missing = mixture.interleave_by_cost(
        [share / sum(shares) for share in shares], [iter(cost.tolist()) for cost in costs], 400
    )
    assert missing is None
    had = np.stack([np.cumsum(spent(source, cost, number)) for number, cost in enumerate(costs)])
    off = had - np.outer(shares, had.sum(axis=0)) / sum(shares)
    assert np.abs(off).max() < max(longest[: len(shares)])


def spent(source, costs, number):
    """What each slot costs source `number`, which serves its examples in order."""
    found = np.zeros(len(source), np.int64)
    at = source == number
    found[at] = costs[: at.sum()]
    return found


def test_examples_that_cost_the_same_are_counted_within_one():
    source, _ = mixture.interleave_by_cost([0.5, 0.3, 0.2], [itertools.repeat(7)] * 3, 1000)
    assert counts_are_within_one(source, [5, 3, 2])


def test_half_the_tokens_is_not_half_the_examples():
    """Examples of 9 and of 1 tokens: one of the long ones for nine of the short."""
    source, _ = mixture.interleave_by_cost([0.5, 0.5], [itertools.repeat(9), itertools.repeat(1)], 1000)
    assert np.bincount(source).tolist() == [100, 900]


def test_examples_that_cost_nothing_do_not_hold_up_the_others():
    source, missing = mixture.interleave_by_cost([0.5, 0.5], [iter([0, 0, 3] * 50), iter([1, 0] * 100)], 200)
    assert missing is None
    assert set(source.tolist()) == {0, 1}


# --- sources that end -------------------------------------------------------------------------------------------------


def drawn(pools, weights, num, *, policy="drop", before=None, seed=0):
    """The order at these weights; a source that is exhausted is dropped, or ends it."""

    def rates(gone):
        left = np.array([0.0 if number in gone else weight for number, weight in enumerate(weights)])
        return left * (not (gone and policy == "stop")) / max(left.sum(), 1e-9)

    return mixture.draw(pools, rates, drawn=before or [0] * len(pools), num=num, seed=seed)


def test_a_source_that_has_had_its_epochs_is_dropped_and_the_rest_go_on_at_their_rates():
    pools = [pool("mails", 10, max_epochs=1.5), pool("sums", 100), pool("poems", 100)]
    order, spans = drawn(pools, [0.5, 0.25, 0.25], 200)
    assert [span.num for span in spans] == [30, 170]
    assert np.bincount(order.source).tolist() == [15, 93, 92]
    assert spans[1].rates.tolist() == [0, 0.5, 0.5]
    assert counts_are_within_one(order.source[:30], [2, 1, 1])


def test_a_source_that_has_had_its_epochs_ends_the_order():
    pools = [pool("mails", 10, max_epochs=1.5), pool("sums", 100)]
    order, _ = drawn(pools, [0.5, 0.5], 200, policy="stop")
    assert np.bincount(order.source).tolist() == [15, 15]


def test_two_passes_over_all_are_two_passes_over_each():
    pools = [pool(name, size, max_epochs=2) for name, size in (("mails", 10), ("sums", 3), ("poems", 7))]
    order, _ = drawn(pools, [0.5, 0.15, 0.35], 1000)
    assert np.bincount(order.source).tolist() == [20, 6, 14]


@pytest.mark.parametrize("policy", ["drop", "stop"])
def test_sources_that_end_do_so_by_tokens_too(policy):
    costs = np.full(10, 5)
    pools = [pool("mails", 10, costs=costs, max_epochs=1), pool("sums", 10, costs=costs // 5)]
    order, spans = drawn(pools, [0.5, 0.5], 100, policy=policy)
    assert np.bincount(order.source[: spans[0].num]).tolist() == [10, 50]
    assert len(order) == (100 if policy == "drop" else 60)


def test_an_order_goes_on_where_another_stopped():
    pools = [pool("mails", 7), pool("sums", 4)]
    whole, _ = drawn(pools, [0.5, 0.5], 40)
    rest, _ = drawn(pools, [0.5, 0.5], 20, before=[10, 10])
    np.testing.assert_array_equal(whole.index[20:], rest.index)
    np.testing.assert_array_equal(whole.epoch[20:], rest.epoch)


# --- editions ---------------------------------------------------------------------------------------------------------


def test_each_epoch_draws_from_its_edition_and_every_example_of_it_once():
    """Editions of 5, 4 and 5 examples, since a row may be too long in one phrasing and not in another."""
    index, epoch = mixture.shuffled(pool("mails", 5, 4, 5), 0, 28, seed=0)
    found = [sorted(index[epoch == number].tolist()) for number in range(6)]
    assert found == [[*range(5)], [*range(5, 9)], [*range(9, 14)]] * 2
    assert index[:5].tolist() != index[14:19].tolist()


def test_further_editions_leave_the_first_epoch_as_it_was():
    one, more = (mixture.shuffled(pool("mails", *sizes), 0, 9, seed=0)[0] for sizes in ((5,), (5, 4)))
    assert one[:5].tolist() == more[:5].tolist()
    assert set(more[5:].tolist()) == {5, 6, 7, 8}


def test_a_limit_counts_passes_over_the_editions():
    assert [pool("mails", 5, 4, max_epochs=passes).limit for passes in (1, 1.5, 2, 3)] == [5, 7, 9, 14]


def test_a_sample_is_seeded_and_a_larger_one_holds_the_smaller():
    few, more = (mixture.sample(100, num, seed=0, name="mails") for num in (10, 30))
    assert len(few) == 10
    assert set(few) < set(more)
    assert few.tolist() == sorted(few.tolist()) != mixture.sample(100, 10, seed=1, name="mails").tolist()
    assert mixture.sample(3, 10, seed=0, name="mails").tolist() == [0, 1, 2]
