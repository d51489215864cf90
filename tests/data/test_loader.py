"""What a loader promises: the planned batches, on any number of hosts and workers, from any step on."""

import dataclasses
import gc
import json
import multiprocessing
import os
from dataclasses import dataclass
from multiprocessing.synchronize import SemLock

import numpy as np
import pytest

from itjax.base.records import DataPosition, PackedBatch
from itjax.data.loader import Placed, make_loader


@dataclass
class Encoded:
    """An encoded source in memory: example i is `lengths[i] + 1` ids, and its last `trained[i]` ids are learned."""

    name: str
    lengths: np.ndarray
    num_trained: np.ndarray
    tokens: np.ndarray
    first: int = 100
    fingerprint: str = "made"

    def __post_init__(self):
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths + 1, dtype=np.int64)])
        ends = np.repeat(self.offsets[1:], self.lengths + 1)
        self.weights = (np.arange(self.offsets[-1]) >= ends - np.repeat(self.num_trained, self.lengths + 1)).astype(
            "f4"
        )
        self.weight_sums = self.num_trained.astype(np.float32)

    def __len__(self):
        return len(self.lengths)


def encoded(name, lengths, *, trained=1, first=100, kind=Encoded):
    """Ids count up from `first`, so a token says where it comes from."""
    lengths = np.array(lengths, np.int32)
    tokens = first + np.arange(lengths.sum() + len(lengths), dtype=np.int32)
    return kind(name, lengths, np.broadcast_to(np.int32(trained), lengths.shape), tokens)


class EndsItsProcess(Encoded):
    """A source on which a worker dies as if killed for memory."""

    def __getattribute__(self, name):
        if name == "tokens" and multiprocessing.parent_process() is not None:
            os._exit(9)
        return super().__getattribute__(name)


class Unreadable(Encoded):
    """A source whose file has gone."""

    def __getattribute__(self, name):
        if name == "tokens" and "offsets" in self.__dict__:
            raise OSError("tokens.bin: no such file")
        return super().__getattribute__(name)


def loaded(sources, **changes):
    settings = {
        "weights": [None] * len(sources),
        "length": 16,
        "rows": 4,
        "steps": None,
        "epochs": 1,
        "window": 10,
        "seed": 0,
        "packing": True,
        "reduction": "token",
        "local_rows": range(changes.get("rows", 4)),
        "workers": 0,
    }
    return make_loader(sources, **(settings | changes))


def mails_and_sums(num=60):
    draw = np.random.default_rng(0)
    return [
        encoded("mails", draw.integers(2, 17, num), trained=2),
        encoded("sums", draw.integers(1, 9, num // 2), first=5000),
    ]


def same(batch, other):
    return all(np.array_equal(one, two) for one, two in zip(batch, other, strict=True))


def every_step(loader):
    return [loader.batch(step) for step in range(loader.num_steps)]


def test_two_examples_of_two_sources_in_one_row():
    """mails: 10 11 12 13 14; sums: 50 51 52; the last id of each is learned."""
    sources = [encoded("mails", [4], first=10), encoded("sums", [2], first=50)]
    loader = loaded(sources, length=8, rows=2, epochs=1)
    batch = next(loader)
    assert batch.tokens_BT.tolist() == [[10, 11, 12, 13, 50, 51, 0, 0], [0] * 8]
    assert batch.targets_BT.tolist() == [[11, 12, 13, 14, 51, 52, 0, 0], [0] * 8]
    assert batch.segments_BT.tolist() == [[1, 1, 1, 1, 2, 2, 0, 0], [0] * 8]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 0, 1, 0, 0], [0] * 8]
    assert batch.weights_BT.tolist() == [[0, 0, 0, 1, 0, 1, 0, 0], [0] * 8]
    assert batch.source_BT.tolist() == [[0, 0, 0, 0, 1, 1, 0, 0], [0] * 8]
    assert [array.dtype for array in batch] == ["int32"] * 4 + ["float32", "int32"]
    assert loader.examples(0) == [("mails", 0, 0), ("sums", 0, 0)]
    assert loader.row(0) == [Placed("mails", 0, 0, 1), Placed("sums", 0, 0, 2)]
    assert loader.row(1) == []
    assert list(loader) == []


def test_an_epoch_holds_every_example_once_whole_and_nothing_else():
    sources = mails_and_sums()
    seen = []
    for batch in loaded(sources):
        for row in range(4):
            for segment in range(1, batch.segments_BT[row].max() + 1):
                at = batch.segments_BT[row] == segment
                seen.append(batch.tokens_BT[row][at].tolist() + batch.targets_BT[row][at][-1:].tolist())
    whole = [
        source.tokens[source.offsets[i] : source.offsets[i + 1]].tolist()
        for source in sources
        for i in range(len(source))
    ]
    assert sorted(seen) == sorted(whole)


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_hosts_together_read_the_batch_of_one(hosts):
    sources, whole = mails_and_sums(), loaded(mails_and_sums(), rows=8)
    parts = [loaded(sources, rows=8, local_rows=range(host, 8, hosts)) for host in range(hosts)]
    assert {part.plan_hash for part in parts} == {whole.plan_hash}
    for number, batches in enumerate(zip(*parts, strict=True)):
        for host, batch in enumerate(batches):
            assert same(batch, [array[host::hosts] for array in whole.batch(number)])


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
@pytest.mark.parametrize("packing", [True, False])
def test_no_host_sees_one_source_alone(hosts, packing):
    """Half mails, half sums: an order of 0, 1, 0, 1, ... in rows would give each of two hosts its own source."""
    sources = [encoded("mails", [4] * 500), encoded("sums", [4] * 300, first=5000)]
    loader = loaded(sources, weights=[1.0, 1.0], rows=8, steps=100, epochs=None, window=20, packing=packing)
    for host in range(hosts):
        seen = [example.source == "mails" for row in range(host, 800, hosts) for example in loader.row(row)]
        assert abs(np.mean(seen) - 0.5) < 2.5 / len(seen) ** 0.5


@pytest.mark.parametrize("packing", [True, False])
def test_rows_hold_the_exact_mixture_at_the_end_of_every_window(packing):
    """20 rows a window, of 4 examples each or of 1; one source in three of four examples."""
    sources = [encoded("mails", [4] * 500), encoded("sums", [4] * 300, first=5000)]
    loader = loaded(sources, weights=[0.75, 0.25], rows=20, steps=40, epochs=None, window=20, packing=packing)
    drawn = 0
    for step in range(40):
        drawn += sum(source == "mails" for source, _, _ in loader.examples(step))
        assert abs(drawn - 0.75 * (step + 1) * 20 * (4 if packing else 1)) < 1


def open_semaphores():
    return [thing for thing in gc.get_objects() if isinstance(thing, SemLock)]


def through_json(position):
    return DataPosition(**json.loads(json.dumps(dataclasses.asdict(position))))


def test_resuming_at_any_step_of_any_epoch_goes_on_as_if_uninterrupted():
    sources = mails_and_sums()
    uninterrupted = list(loaded(sources, epochs=2.5))
    first = loaded(sources, epochs=2.5)
    for step in range(len(uninterrupted)):
        second = loaded(sources, epochs=2.5)
        second.set_state(through_json(first.get_state()))
        rest = list(second)
        assert len(rest) == len(uninterrupted) - step
        assert all(map(same, rest, uninterrupted[step:]))
        next(first)


def test_worker_processes_resume_to_the_same_batches_and_end_with_the_loader():
    sources = mails_and_sums(30)
    expected = every_step(loaded(sources))
    with loaded(sources, workers=2) as loader:
        loader.set_state(DataPosition(1, loader.plan_hash))
        assert all(map(same, [next(loader) for _ in range(3)], expected[1:4]))
        assert loader.get_state().step == 4  # what was served, not what the workers have read ahead
        assert multiprocessing.active_children()
        assert len(open_semaphores()) > 2
    assert not multiprocessing.active_children()
    # Left to the garbage collector they would fail in whatever it interrupts; two belong to Grain's own pool of threads.
    assert len(open_semaphores()) <= 2


@pytest.mark.slow
def test_resuming_at_every_step_with_worker_processes():
    sources = mails_and_sums(30)
    expected = every_step(loaded(sources))
    loader = loaded(sources, workers=2)
    for step in range(len(expected)):
        loader.set_state(DataPosition(step, loader.plan_hash))
        rest = list(loader)
        assert len(rest) == len(expected) - step
        assert all(map(same, rest, expected[step:]))


def test_a_run_of_four_hosts_goes_on_with_two_and_then_one():
    whole = loaded(mails_and_sums(), rows=8, epochs=3)
    seen, position = [], whole.get_state()
    for hosts in (4, 2, 1):
        parts = [
            loaded(mails_and_sums(), rows=8, epochs=3, local_rows=range(host * 8 // hosts, (host + 1) * 8 // hosts))
            for host in range(hosts)
        ]
        for part in parts:
            part.set_state(position)
        for _ in range(3):
            seen.append(PackedBatch(*map(np.concatenate, zip(*map(next, parts), strict=True))))
        assert len({part.get_state() for part in parts}) == 1
        position = through_json(parts[0].get_state())
    assert position.step == 9
    assert all(map(same, seen, every_step(whole)))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_never_run_out_at_different_steps(hosts):
    for size in range(1, 51):
        sources = [encoded("mails", 1 + np.arange(size) % 16)]
        parts = [loaded(sources, local_rows=range(host, 4, hosts)) for host in range(hosts)]
        batches = [list(part) for part in parts]
        assert len({len(mine) for mine in batches}) == 1
        assert {batch.tokens_BT.shape for mine in batches for batch in mine} == {(4 // hosts, 16)}
        assert sum(np.count_nonzero(batch.weights_BT) for mine in batches for batch in mine) == size


def test_a_longer_run_begins_with_the_shorter():
    sources = mails_and_sums()
    steps, longer, epochs = (
        loaded(sources, steps=5, epochs=None),
        loaded(sources, steps=40, epochs=None),
        loaded(sources, epochs=3),
    )
    assert steps.plan_hash == longer.plan_hash == epochs.plan_hash
    assert (steps.num_steps, longer.num_steps) == (5, 40)
    for step in range(5):
        assert steps.digest(step) == longer.digest(step) == epochs.digest(step)
        assert same(steps.batch(step), longer.batch(step))


def test_a_part_of_an_epoch_is_that_share_of_its_rows():
    sources = [encoded("mails", [16] * 100)]
    assert [loaded(sources, epochs=epochs).report()["num_rows"] for epochs in (0.001, 0.3, 1, 2.25)] == [
        1,
        30,
        100,
        225,
    ]


def test_epochs_are_counted_in_examples_served():
    loader = loaded([encoded("mails", [16] * 8)], epochs=2)
    assert [loader.epoch(step) for step in range(loader.num_steps + 1)] == [0, 0.5, 1, 1.5, 2]


def test_reduction_example_gives_every_example_the_weight_one():
    sources = mails_and_sums()
    for batch in loaded(sources, reduction="example"):
        for row in range(4):
            per_segment = np.bincount(batch.segments_BT[row], batch.weights_BT[row])
            np.testing.assert_allclose(per_segment[1:], 1, rtol=1e-6)


def test_reduction_source_gives_every_source_of_a_step_the_same_weight_however_it_is_shared_out():
    whole = loaded(mails_and_sums(), reduction="source")
    parts = [loaded(mails_and_sums(), reduction="source", local_rows=[host]) for host in range(4)]
    for step in range(whole.num_steps - 1):
        batch = whole.batch(step)
        per_source = np.bincount(batch.source_BT.ravel(), batch.weights_BT.ravel())
        np.testing.assert_allclose(per_source, [1, 1], rtol=1e-5)
        assert (np.concatenate([part.batch(step).weights_BT for part in parts]) == batch.weights_BT).all()


def test_reduction_token_leaves_the_weights_as_encoded():
    batch = loaded(mails_and_sums()).batch(0)
    assert set(batch.weights_BT.ravel().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    "change",
    [
        {"weights": [1.0, 1.0]},
        {"length": 17},
        {"rows": 5},
        {"window": 11},
        {"seed": 1},
        {"packing": False},
        {"reduction": "example"},
    ],
)
def test_a_position_is_refused_when_the_order_has_changed(change):
    sources = mails_and_sums()
    position = loaded(sources).get_state()
    with pytest.raises(ValueError, match=r"change them back, or start a new run_dir"):
        loaded(sources, **change).set_state(position)


def test_a_position_is_refused_when_the_data_has_changed():
    position = loaded(mails_and_sums()).get_state()
    other = mails_and_sums()
    other[1].fingerprint = "edited"
    for sources in (other, mails_and_sums()[:1], mails_and_sums(62)):
        with pytest.raises(ValueError, match="belongs to plan"):
            loaded(sources).set_state(position)


def test_a_position_after_the_end_is_refused():
    loader = loaded(mails_and_sums())
    with pytest.raises(ValueError, match="raise steps or epochs"):
        loader.set_state(DataPosition(loader.num_steps + 1, loader.plan_hash))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sources": []}, "there are none"),
        ({"sources": [encoded("mails", [])]}, "sources.mails: has no examples"),
        ({"length": 15}, r"sources.mails: 1 of 2 examples are longer than length=15 \(number 1 has 16 positions\)"),
        ({"steps": 3}, "steps: 3, epochs: 1; give one"),
        ({"epochs": None}, "give one"),
        ({"epochs": 0}, "above 0"),
        ({"local_rows": [3, 4]}, r"local_rows: \[4\]"),
        ({"reduction": "mean"}, "'mean' is unknown"),
        ({"weights": [1.0, 1.0]}, "1 sources and 2 weights"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(changes, message):
    sources = changes.get("sources", [encoded("mails", [2, 16])])
    with pytest.raises(ValueError, match=message):
        loaded(sources, **{name: value for name, value in changes.items() if name != "sources"})


def test_a_step_that_teaches_nothing_is_refused_before_the_run_begins():
    with pytest.raises(ValueError, match="none of the 1 rows of step 0 has a token to learn"):
        loaded([encoded("mails", [16, 16], trained=0)], rows=1)
    half = encoded("mails", [16] * 6)
    half.weights[: half.offsets[3]], half.weight_sums[:3] = 0, 0
    with pytest.raises(ValueError, match=r"rows of step \d has"):
        loaded([half], rows=1)
    assert loaded([half], rows=6).num_steps == 1


def test_a_source_that_cannot_be_read_stops_the_run():
    loader = loaded([encoded("mails", [16] * 8, kind=Unreadable)])
    with pytest.raises(OSError, match=r"tokens\.bin"):
        next(loader)


def test_a_worker_that_dies_stops_the_run():
    with loaded([encoded("mails", [16] * 8, kind=EndsItsProcess)], workers=1) as loader, pytest.raises(RuntimeError):
        next(loader)


def test_a_batch_can_be_had_with_all_rows_on_any_host():
    whole, one = loaded(mails_and_sums()), loaded(mails_and_sums(), local_rows=[2])
    assert same(one.batch(1, all_rows=True), whole.batch(1))
    assert one.get_state().step == 0
    for wrong in (-1, one.num_steps):
        with pytest.raises(ValueError, match="this run has steps 0 to"):
            one.batch(wrong)
    with pytest.raises(ValueError, match="this run has rows 0 to"):
        one.row(10_000)


def test_the_report_counts_what_will_be_seen():
    sources = [encoded("mails", [12] * 30, trained=3), encoded("sums", [4] * 10)]
    report = loaded(sources, weights=[1.0, 1.0], epochs=2).report()
    assert report["fill"] == 1.0
    assert report["tokens"] == 40 * 12 + 40 * 4
    assert report["sources"]["mails"] == {
        "examples": 40,
        "tokens": 480,
        "trained_tokens": 120,
        "share_examples": 0.5,
        "share_tokens": 0.75,
        "share_trained_tokens": 0.75,
        "planned_share_examples": 0.5,
        "planned_share_tokens": 0.75,
        "planned_share_trained_tokens": 0.75,
        "epochs": 40 / 30,
        "epochs_begun": 2,
        "editions": 1,
        "max_epochs": None,
    }
    assert report["sources"]["sums"]["epochs"] == 4.0
    assert report["rows_per_epoch"] == 20
