"""metrics.jsonl is appended and never rewritten; a resumed run goes on in it without a line twice or missing."""

import contextlib
import json

import jax.numpy as jnp
import pytest
from rich.console import Console

from itjax.base.schema import Log
from itjax.train.watch import Aborted, Facts, Journal, Watch


def entry(step, loss=1.0, seconds=0.5):
    return {"kind": "train", "step": step, "loss": loss, "step_seconds": seconds}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_repeated_step_is_not_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for steps in ((1, 2, 3), (2, 3, 4)):
        with contextlib.closing(Journal(path)) as journal:
            assert all(journal.write(entry(step, seconds=sum(steps))) for step in steps)
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4]


def test_a_repeated_step_with_another_loss_is_told(tmp_path):
    with contextlib.closing(Journal(tmp_path / "metrics.jsonl")) as journal:
        assert journal.write(entry(1, loss=1.0))
        assert not journal.write(entry(1, loss=1.5))


def test_half_a_line_left_by_a_kill_is_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(entry(1)) + "\n" + '{"kind": "train", "st')
    with contextlib.closing(Journal(path)) as journal:
        assert journal.write(entry(2))
    assert lines(path) == [entry(1), entry(2)]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("{}\n{oops}\n{}\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not JSON"):
        Journal(path)


def test_infinity_is_null_in_json(tmp_path):
    with contextlib.closing(Journal(tmp_path / "metrics.jsonl")) as journal:
        journal.write(entry(1, loss=float("inf")))
    assert lines(journal.path)[0]["loss"] is None


FACTS = Facts(epoch=0.1, num_tokens=6, num_positions=8, flops=1.0, example_ids="ab", input_wait_seconds=0.0)


def metrics(*, loss=1.0, skipped=False):
    numbers = {"loss": loss, "grad_norm": 1.0, "learning_rate": 0.1, "tokens": 6, "trained_tokens": 3, "weight": 3.0}
    return {name: jnp.asarray(value) for name, value in {**numbers, "skipped": skipped}.items()}


def watch(tmp_path, **settings) -> Watch:
    log = Log(tensorboard=False, progress=False)
    return Watch(tmp_path, log, start=0, num_steps=9, max_skips=2, writes=True, console=Console(quiet=True), **settings)


def test_numbers_come_one_step_late_and_flush_brings_the_last(tmp_path):
    watching = watch(tmp_path)
    watching.note(1, metrics(), FACTS)
    assert lines(tmp_path / "metrics.jsonl") == []
    watching.note(2, metrics(), FACTS)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1]
    watching.flush()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert lines(tmp_path / "metrics.jsonl")[0]["fill"] == 0.75
    watching.close()


def test_too_many_skips_in_a_row_abort_and_each_is_written(tmp_path):
    watching = watch(tmp_path)
    for step, skipped in enumerate([True, True, False, True, True], start=1):
        watching.note(step, metrics(loss=float("nan") if skipped else 1.0, skipped=skipped), FACTS)
    watching.note(6, metrics(loss=float("nan"), skipped=True), FACTS)
    with pytest.raises(Aborted, match=r"step 6: .* not finite for 3 steps in a row .* Parameters are as before step 4"):
        watching.flush()
    watching.close()
    assert [line["skipped"] for line in lines(tmp_path / "metrics.jsonl")] == [True, True, False, True, True, True]
