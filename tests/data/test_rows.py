"""What the plan of a run promises: stages and epochs end with a row, shares hold at every prefix, editions take turns."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itjax.base.records import DataPosition
from itjax.base.schema import Mixture, Stage
from itjax.data import mixture, pack, recipe, rows
from itjax.data.recipe import Node
from itjax.data.rows import Shape
from tests.data.test_loader import Encoded, encoded, loaded, same

SHAPE = Shape(length=32, rows=4, window=20, seed=0, packing=True)


def made(sources, run_mixture=None, *, weights=None, limits=None):
    """The recipe of sources side by side."""
    names = [source.name for source in sources]
    weights, limits = weights or [None] * len(names), limits or [None] * len(names)
    members = tuple(Node(*each) for each in zip(names, weights, [1.0] * len(names), limits, strict=True))
    root = Node("", mixture=run_mixture or Mixture(), members=members)
    return recipe.resolve(root, {source.name: rows.size(source) for source in sources})


def planned(sources, found, *, steps=None, epochs=None, **changes):
    return rows.plan(sources, found, Shape(**{**vars(SHAPE), **changes}), steps=steps, epochs=epochs)


def staged(*stages, unit="examples"):
    """Weights of mails and sums from each step on."""
    found = {f"from {start}": Stage(start, {"mails": mails, "sums": sums}) for start, mails, sums in stages}
    return Mixture(unit=unit, stages=found)


@functools.cache
def mails_and_sums():
    """Mails of 2 to 20 tokens, sums of 1 to 6."""
    draw = np.random.default_rng(0)
    return (
        encoded("mails", draw.integers(2, 21, 700), trained=2),
        encoded("sums", draw.integers(1, 7, 500), first=50_000),
    )


def examples_of(plan, start, stop, rows_per_step=4):
    """Sources of the examples of some steps, in row order."""
    return plan.source[plan.offsets[start * rows_per_step] : plan.offsets[stop * rows_per_step]]


# --- stages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("window", [3, 20, 1000])
def test_every_step_has_exactly_the_shares_of_its_stage(packing, window):
    """Mails alone, then mails and sums, then sums alone: one example of another stage would be seen."""
    found = made(mails_and_sums(), staged((0, 1, 0), (13, 1, 1), (31, 0, 1)))
    plan = planned(mails_and_sums(), found, steps=50, packing=packing, window=window)
    assert set(examples_of(plan, 0, 13)) == {0}
    assert set(examples_of(plan, 31, 50)) == {1}
    middle = np.bincount(examples_of(plan, 13, 31))
    assert abs(middle[0] - middle[1]) <= 1
    assert [(stage.name, stage.start, stage.stop) for stage in plan.stages] == [
        ("from 0", 0, 13), ("from 13", 13, 31), ("from 31", 31, 50),
    ]  # fmt: skip


@pytest.mark.parametrize("unit", ["examples", "tokens"])
def test_rows_are_full_up_to_the_end_of_a_stage(unit):
    found = made(mails_and_sums(), staged((0, 3, 1), (25, 1, 1), (50, 1, 3), unit=unit))
    plan = planned(mails_and_sums(), found, steps=75, window=70)
    assert (np.diff(plan.offsets) > 0).all()
    lengths = rows.per_example([source.lengths for source in mails_and_sums()], plan)
    filled = np.add.reduceat(lengths, plan.offsets[:-1]) / 32
    for stage in plan.stages:
        assert filled[stage.start * 4 : stage.stop * 4].mean() > 0.98


def test_no_window_is_too_small_to_pack_well():
    """Stages of 9, 100, 52 and 60 rows and windows of 20: none is below 10 rows but what an epoch leaves."""
    source = encoded("mails", np.random.default_rng(0).integers(2, 21, 5000))
    found = made([source], Mixture(stages={str(step): Stage(step, {"mails": 1.0}) for step in (9, 34, 47)}))
    plan = planned([source], found, steps=62)
    sizes = np.diff(plan.windows)
    assert plan.windows[np.isin(plan.windows, [36, 136, 188])].tolist() == [36, 136, 188]
    assert sizes.min() >= 10
    assert sizes.max() <= 31


def test_no_example_is_lost_between_stages():
    """Six passes over 12 rows' worth a step; every epoch of a source holds each of its examples once."""
    sources = mails_and_sums()
    found = made(sources, staged((0, 3, 1), (17, 1, 1), (40, 1, 2)))
    plan = planned(sources, found, steps=200)
    for number, source in enumerate(sources):
        at = plan.source == number
        epochs, indices = plan.epoch[at], plan.index[at]
        assert epochs.max() >= 2
        for epoch in range(epochs.max()):  # the last is only begun
            assert sorted(indices[epochs == epoch].tolist()) == list(range(len(source)))


@pytest.mark.parametrize("steps", [1, 12, 13, 14, 30, 31, 33])
@pytest.mark.parametrize("unit", ["examples", "tokens"])
def test_a_longer_run_begins_with_the_shorter_whatever_stage_that_ends_in(steps, unit):
    found = made(mails_and_sums(), staged((0, 3, 1), (13, 1, 1), (31, 1, 3), unit=unit))
    long, short = (planned(mails_and_sums(), found, steps=number) for number in (90, steps))
    np.testing.assert_array_equal(short.offsets, long.offsets[: steps * 4 + 1])
    for name in ("source", "index", "epoch"):
        np.testing.assert_array_equal(getattr(short, name), getattr(long, name)[: short.offsets[-1]])


def test_stages_may_be_as_short_as_a_step():
    found = made(mails_and_sums(), staged(*((step, 1 - step % 2, step % 2) for step in range(10))))
    plan = planned(mails_and_sums(), found, steps=12, window=1000)
    assert [set(examples_of(plan, step, step + 1).tolist()) for step in range(10)] == [{0}, {1}] * 5


def test_a_stage_that_the_run_does_not_reach_changes_nothing_before():
    """Nor does the stage's own border, if the run ends before the window that would be cut."""
    sources = mails_and_sums()
    with_stage = planned(sources, made(sources, staged((0, 1, 1), (500, 0, 1))), steps=20)
    without = planned(sources, made(sources, weights=[1.0, 1.0]), steps=20)
    np.testing.assert_array_equal(with_stage.index, without.index)
    assert len(with_stage.stages) == 1


def test_epochs_are_counted_over_stages():
    """An epoch is as many examples as the sources hold, whatever the weights: 1,200."""
    plan = planned(mails_and_sums(), made(mails_and_sums(), staged((0, 1, 0), (20, 1, 1))), epochs=2)
    assert plan.offsets[-1] == 2 * 1200
    assert set(examples_of(plan, 0, 20)) == {0}


# --- shares at every prefix -------------------------------------------------------------------------------------------


def prefixes(sources, found, *, num):
    """What each source has had after every example of the order, in examples and in tokens."""
    pools = rows._Ledger(sources, found, SHAPE).pools
    order, _ = mixture.draw(pools, lambda gone: found.shares(0), drawn=[0] * len(pools), num=num, seed=0)
    is_of = order.source == np.arange(len(sources))[:, None]
    lengths = rows.per_example([source.lengths for source in sources], order)
    return np.cumsum(is_of, axis=1), np.cumsum(is_of * lengths, axis=1)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.01])
def test_shares_of_tokens_hold_at_every_prefix_within_the_longest_example(share):
    sources = (encoded("mails", np.full(100, 90)), encoded("sums", np.random.default_rng(0).integers(1, 12, 900)))
    found = made(sources, Mixture(unit="tokens"), weights=[share, 1 - share])
    _, tokens = prefixes(sources, found, num=5000)
    assert np.abs(tokens - np.outer([share, 1 - share], tokens.sum(axis=0))).max() < 90


def test_shares_of_examples_leave_tokens_where_they_fall():
    """The trap: half the examples are 89 % of the tokens when they are eight times as long."""
    sources = (encoded("mails", np.full(100, 24)), encoded("sums", np.full(100, 3)))
    _, tokens = prefixes(sources, made(sources, weights=[0.5, 0.5]), num=2000)
    assert tokens[0, -1] / tokens[:, -1].sum() == pytest.approx(24 / 27)


@pytest.mark.parametrize("unit", ["tokens", "trained_tokens"])
def test_realised_shares_follow_the_unit_at_the_end_of_every_window(unit):
    sources = mails_and_sums()
    found = made(sources, Mixture(unit=unit), weights=[0.25, 0.75])
    plan = planned(sources, found, steps=100)
    counts = rows.per_example([getattr(source, rows.UNIT_COLUMNS[unit]) for source in sources], plan)
    ends = plan.offsets[plan.windows[1:][plan.windows[1:] <= 400]]
    assert len(ends) > 10
    for end in ends:
        had = np.bincount(plan.source[:end], counts[:end])
        assert abs(had[0] - 0.25 * had.sum()) < 20


def test_an_epoch_by_tokens_holds_every_example_once_where_sizes_decide():
    plan = planned(mails_and_sums(), made(mails_and_sums(), Mixture(unit="tokens")), epochs=2)
    for epoch in range(2):
        part = slice(epoch * 1200, (epoch + 1) * 1200)
        assert set(plan.epoch[part]) == {epoch}
        assert len(set(zip(plan.source[part].tolist(), plan.index[part].tolist(), strict=True))) == 1200


# --- hosts and workers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
@pytest.mark.parametrize("long", [5, 20])
def test_hosts_see_the_mixture_and_not_a_part_of_it(hosts, long):
    """Grain's `mix(...)[host::hosts]` gives one of two hosts all the mails: 10 % of the examples instead of 50 %."""
    sources = [encoded("mails", [long] * 500), encoded("sums", [4] * 300, first=50_000)]
    loader = loaded(sources, weights=[1.0, 1.0], length=20, rows=8, steps=100, epochs=None, window=40)
    rows_of = [[placed.source for placed in loader.row(row)] for row in range(800)]
    counts = np.zeros((hosts, 2))  # of rows that are mails (or mostly) and sums
    for row, found in enumerate(rows_of):
        counts[row % hosts, int(found[0] == "sums")] += 1
    expected = counts.sum(axis=0) / hosts
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < (hosts - 1) + 4 * (2 * (hosts - 1)) ** 0.5 + 1e-9  # four deviations above its mean
    examples = [source for found in rows_of for source in found]
    assert examples.count("mails") / len(examples) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
@pytest.mark.parametrize("unit", ["examples", "tokens"])
def test_the_batches_of_all_hosts_hold_the_shares_at_the_end_of_every_window(unit, hosts):
    sources = mails_and_sums()
    found = made(sources, staged((0, 0.75, 0.25), (30, 0.2, 0.8), unit=unit))
    windows = planned(sources, found, steps=60, rows=8, window=16).windows
    counts = np.zeros((480, 2), np.int64)  # of each row
    for host in range(hosts):
        loader = loaded(
            sources,
            weights=found,
            length=32,
            rows=8,
            steps=60,
            epochs=None,
            window=16,
            local_rows=range(host, 8, hosts),
        )
        for step in range(60):
            counts[step * 8 + host : (step + 1) * 8 : hosts] = _counts(loader.batch(step), unit)
    for begin, end, share in ((0, 240, [0.75, 0.25]), (240, 480, [0.2, 0.8])):
        ends = [row for row in windows.tolist() if begin < row <= end]
        assert len(ends) >= 13
        for stop in ends:
            had = counts[begin:stop].sum(axis=0)
            assert np.abs(had - np.array(share) * had.sum()).max() < (1 if unit == "examples" else 20)


def _counts(batch, unit):
    """Examples or tokens of each source in each row."""
    at = batch.segments_BT > 0
    if unit == "examples":
        at &= batch.positions_BT == 0
    return np.stack([(at & (batch.source_BT == number)).sum(axis=1) for number in range(2)], axis=1)


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_read_the_same_staged_batches(workers):
    sources = mails_and_sums()
    found = made(sources, staged((0, 3, 1), (3, 0, 1), unit="tokens"))
    alone = loaded(sources, weights=found, length=32, steps=6, epochs=None)
    with loaded(sources, weights=found, length=32, steps=6, epochs=None, workers=workers) as loader:
        assert all(map(same, loader, [alone.batch(step) for step in range(6)]))


# --- sources that end -------------------------------------------------------------------------------------------------


def test_a_run_of_epochs_ends_where_a_source_is_exhausted():
    sources = mails_and_sums()
    found = made(sources, Mixture(exhausted="stop"), weights=[0.5, 0.5], limits=[1.0, None])
    plan = planned(sources, found, epochs=5)
    assert np.bincount(plan.source).tolist() == [700, 700]
    assert plan.ended_by == "mails has had its max_epochs=1 (700 examples)"


def test_a_run_of_epochs_goes_on_without_an_exhausted_source():
    sources = mails_and_sums()
    found = made(sources, Mixture(exhausted="drop"), weights=[0.5, 0.5], limits=[1.0, None])
    plan = planned(sources, found, epochs=5)
    assert np.bincount(plan.source).tolist() == [700, 5 * 1200 - 700]
    assert plan.ended_by == ""


def test_all_sources_exhausted_end_a_run():
    sources = mails_and_sums()
    plan = planned(sources, made(sources, Mixture(exhausted="drop"), limits=[1.5, 2.0]), epochs=9)
    assert np.bincount(plan.source).tolist() == [1050, 1000]
    assert "sums has had its max_epochs=2" in plan.ended_by


@pytest.mark.parametrize("policy, way", [("stop", "'drop' to go on"), ("drop", "give other sources a weight")])
def test_steps_that_the_data_is_not_enough_for_are_refused_with_the_step_reached(policy, way):
    sources = (encoded("mails", [32] * 40), encoded("sums", [32] * 40))
    found = made(sources, Mixture(exhausted=policy), limits=[1.0, 1.0])
    assert len(planned(sources, found, steps=20).source) == 80
    message = (
        rf"ends at step 20 of 21: mails has had its max_epochs=1 \(40 .*exhausted is '{policy}'; set steps to 20.*{way}"
    )
    with pytest.raises(ValueError, match=message):
        planned(sources, found, steps=21)


def test_a_limit_that_allows_no_example_is_refused():
    source = encoded("mails", [32] * 40)
    with pytest.raises(ValueError, match=r"nothing to draw: mails has had its max_epochs=0.01 \(0 examples\)"):
        planned([source], made([source], Mixture(exhausted="drop"), limits=[0.01]), epochs=1)


def test_part_of_an_epoch_may_end_before_a_source_does():
    sources = mails_and_sums()
    found = made(sources, Mixture(exhausted="stop"), limits=[1.8, None])
    plan = planned(sources, found, epochs=1.5)
    assert abs(plan.offsets[-1] - 1.5 * 1200) < 30
    assert plan.ended_by == ""
    assert planned(sources, found, epochs=1.9).ended_by


def test_a_limit_counts_over_stages():
    sources = (encoded("mails", [32] * 40), encoded("sums", [32] * 100))
    rules = Mixture(exhausted="drop", stages={"late": Stage(10, {"mails": 1.0, "sums": 1.0})})
    plan = planned(sources, made(sources, rules, weights=[3.0, 1.0], limits=[1.0, None]), steps=30)
    assert np.bincount(examples_of(plan, 0, 10)).tolist() == [30, 10]
    assert np.bincount(plan.source).tolist() == [40, 80]


# --- editions ---------------------------------------------------------------------------------------------------------


class Editions(Encoded):
    """A source that holds its rows in several phrasings."""


def phrased(name, *editions, first=100):
    source = encoded(name, np.concatenate(editions), first=first, kind=Editions)
    source.edition_ends = np.cumsum([len(edition) for edition in editions])
    source.fingerprint, source.rows_fingerprint = f"of {len(editions)} editions", "of the rows"
    return source


def test_sizes_are_those_of_the_first_edition():
    source = phrased("mails", [3, 4], [9, 9, 9])
    assert rows.size(source) == (2, 7, 2)
    assert loaded([source], epochs=1).report()["sources"]["mails"]["epochs"] == 1
    assert loaded([source], epochs=1).report()["sources"]["mails"]["editions"] == 2


def test_each_pass_over_a_source_is_in_another_phrasing():
    source = phrased("mails", [32] * 40, [31] * 39, [30] * 40)
    plan = planned([source], made([source]), steps=30)
    for epoch, expected in enumerate([range(40), range(40, 79), range(79, 119)]):
        assert sorted(plan.index[plan.epoch == epoch].tolist()) == list(expected)
    assert plan.index[plan.epoch == 3].max() < 40  # the first again


def positions(loader):
    return [loader.plan_at(step) for step in range(loader.num_steps + 1)]


@pytest.mark.parametrize("unit", ["examples", "tokens"])
def test_a_run_may_be_made_longer_with_further_editions(unit):
    """20 examples, one a row, 4 rows a step: an epoch is five steps."""
    draw = np.random.default_rng(0)
    lengths = [draw.integers(20, 33, 20) for _ in range(3)]
    one, more = phrased("mails", lengths[0]), phrased("mails", *lengths)
    found = [made([source], Mixture(unit=unit)) for source in (one, more)]
    short = loaded([one], weights=found[0], length=32, epochs=1, window=4)
    long = loaded([more], weights=found[1], length=32, epochs=3, window=4)
    assert positions(short) == positions(long)[:6]
    assert [short.digest(step) for step in range(5)] == [long.digest(step) for step in range(5)]
    long.set_state(short.get_state())
    wrapped = loaded([one], weights=found[0], length=32, epochs=3, window=4)
    assert positions(wrapped)[:6] == positions(long)[:6]
    assert not set(positions(wrapped)[6:]) & set(positions(long)[6:])  # it went on with the first phrasing


def test_a_plan_says_how_many_editions_it_has_use_for():
    """With as many, a longer run with more goes on where it stands, whatever the sizes of the editions."""
    sizes = (20, 18, 19, 20, 17)
    for epochs in (0.3, 1, 1.5, 2, 2.9):
        source = phrased("mails", [30] * 20)
        while True:
            short = loaded([source], length=32, rows=2, epochs=epochs, window=6)
            needed = short.report()["sources"]["mails"]["epochs_begun"]
            if needed <= len(source.edition_ends):
                break
            source = phrased("mails", *([30] * size for size in sizes[:needed]))
        long = loaded([phrased("mails", *([30] * size for size in sizes))], length=32, rows=2, epochs=4, window=6)
        short.set_state(long.get_state())
        assert positions(short) == positions(long)[: short.num_steps + 1]


def test_other_rows_are_another_plan():
    sources = [phrased("mails", [30] * 20), phrased("mails", [30] * 20)]
    sources[1].rows_fingerprint = "of other rows"
    assert len({loaded([source], length=32).plan_hash for source in sources}) == 2


def test_a_position_is_refused_where_an_edition_it_needed_has_changed():
    sources = [phrased("mails", [30] * 20, [29] * 20), phrased("mails", [30] * 20, [28] * 20)]
    before, after = (loaded([source], length=32, epochs=2, window=4) for source in sources)
    assert positions(before)[:6] == positions(after)[:6]
    next(before)
    after.set_state(before.get_state())
    before._step = 7
    with pytest.raises(ValueError, match="belongs to plan"):
        after.set_state(before.get_state())


def test_plans_of_one_name_have_one_past_even_where_tokens_of_a_further_edition_decide():
    """When the mails are through, it hangs on the first mail of the next edition whether it comes before the next sum."""
    sums = encoded("sums", np.random.default_rng(1).integers(1, 33, 400))
    plans = []
    for length in (1, 32):
        mails = phrased("mails", [7] * 11, [length] * 11)
        found = made([mails, sums], Mixture(unit="tokens"), weights=[0.5, 0.5])
        loader = loaded([mails, sums], weights=found, length=32, rows=1, steps=60, epochs=None, window=1)
        plans.append((positions(loader), [loader.digest(step) for step in range(60)]))
    (names, past), (other_names, other_past) = plans
    assert past != other_past
    for step in range(60):
        assert names[step] != other_names[step] or past[:step] == other_past[:step]


def test_editions_that_do_not_cover_the_examples_are_refused():
    source = phrased("mails", [3, 4])
    source.edition_ends = np.array([1])
    with pytest.raises(ValueError, match=r"sources\.mails: editions end at \[1\], but it has 2 examples"):
        loaded([source])


# --- any mixture ------------------------------------------------------------------------------------------------------


@st.composite
def runs(draw):
    """Sources of one to three editions, weights that change up to three times, any unit, rows and windows of any size."""
    num = draw(st.integers(1, 3))
    lengths = st.lists(st.integers(1, 16), min_size=1, max_size=40)
    sources = [
        phrased(f"source {number}", *draw(st.lists(lengths, min_size=1, max_size=3)), first=1000 * number)
        for number in range(num)
    ]
    weights = st.lists(st.sampled_from([0.0, 0.1, 1.0, 1.0, 7.3]), min_size=num, max_size=num).filter(any)
    starts = draw(st.sets(st.integers(0, 12), max_size=3))
    stages = {
        str(start): Stage(start, dict(zip((source.name for source in sources), draw(weights), strict=True)))
        for start in starts
    }
    found = made(sources, Mixture(unit=draw(st.sampled_from(["examples", "tokens", "trained_tokens"])), stages=stages))
    shape = Shape(length=16, rows=draw(st.integers(1, 4)), window=draw(st.integers(1, 30)), seed=0,
                  packing=draw(st.booleans()))  # fmt: skip
    return sources, found, shape, draw(st.integers(1, 16)), draw(st.integers(0, 8))


@given(run=runs())
@settings(deadline=None, max_examples=120)
def test_any_mixture_is_planned_whole(run):
    sources, found, shape, steps, more = run
    plan, longer = (rows.plan(sources, found, shape, steps=num, epochs=None) for num in (steps, steps + more))
    for name in ("source", "index", "epoch"):
        np.testing.assert_array_equal(getattr(plan, name), getattr(longer, name)[: plan.offsets[-1]])
    np.testing.assert_array_equal(plan.offsets, longer.offsets[: steps * shape.rows + 1])
    assert (np.diff(plan.offsets) > 0).all()
    filled = np.add.reduceat(rows.per_example([source.lengths for source in sources], plan), plan.offsets[:-1])
    assert filled.max() <= 16
    for step in range(steps):
        left_out = np.flatnonzero(found.shares(step) == 0)
        assert not set(left_out) & set(examples_of(plan, step, step + 1, shape.rows).tolist())
    for number, source in enumerate(sources):
        epochs_hold_their_edition_once_at_most(source, longer, number)


def epochs_hold_their_edition_once_at_most(source, plan, number):
    """Nothing twice in an epoch, and nothing of another edition; that nothing is missing is said of staged runs above."""
    at, begins = plan.source == number, [0, *source.edition_ends.tolist()]
    epochs, indices = plan.epoch[at], plan.index[at]
    assert len(set(zip(epochs.tolist(), indices.tolist(), strict=True))) == len(indices)
    for epoch in range(epochs.max(initial=0) + 1):
        edition = epoch % len(source.edition_ends)
        expected = set(range(begins[edition], begins[edition + 1]))
        assert set(indices[epochs == epoch].tolist()) <= expected


def test_resuming_at_any_step_of_any_stage_goes_on_as_if_uninterrupted():
    sources = mails_and_sums()
    found = made(sources, staged((0, 3, 1), (3, 0, 1), (6, 1, 1), unit="tokens"))

    def fresh(hosts=1, host=0):
        return loaded(sources, weights=found, length=32, rows=8, steps=9, epochs=None, local_rows=range(host, 8, hosts))

    whole = fresh()
    for step in range(9):
        again = [fresh(hosts=2, host=host) for host in range(2)]
        for host, part in enumerate(again):
            part.set_state(DataPosition(step, whole.plan_at(step)))
            assert all(
                same(batch, [array[host::2] for array in whole.batch(at)]) for at, batch in enumerate(part, step)
            )


# --- windows ----------------------------------------------------------------------------------------------------------


def test_the_end_of_a_window_is_the_next_on_the_grid():
    for epoch, window in ((10, 3), (7, 100), (1200, 37), (5, 1)):
        ends = pack.window_ends(3 * epoch, window=window, epoch=epoch)
        found = [pack.window_end(at, window=window, epoch=epoch) for at in range(3 * epoch)]
        assert found == [int(ends[np.searchsorted(ends, at, side="right")]) for at in range(3 * epoch)]
