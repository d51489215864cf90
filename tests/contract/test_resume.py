"""kill -9 at any moment, the same command again: metrics.jsonl equals an uninterrupted run's, bit for bit."""

import signal
import time

import pytest

from tests.contract import runs


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    runs.finish(runs.start(run_dir))
    return runs.metrics(run_dir)


def kill_after(process, run_dir, lines: int, seconds: float) -> None:
    """Ends the process for certain, some time after metrics.jsonl has so many lines and the first checkpoint is there."""
    limit = time.monotonic() + 120
    committed = run_dir / "checkpoints" / "4"
    while runs.num_lines(run_dir) < lines or not committed.exists():
        if process.poll() is not None or time.monotonic() > limit:
            break
        time.sleep(0.002)
    time.sleep(seconds)
    process.kill()
    process.communicate()


def test_a_run_has_every_step_once_and_more_than_one_epoch(uninterrupted):
    steps = [line["step"] for line in uninterrupted if line["kind"] == "train"]
    assert steps == list(range(1, 13))
    assert uninterrupted[-1]["step"] == 12
    assert max(line["epoch"] for line in uninterrupted if line["kind"] == "train") > 1
    assert len({line["example_ids"] for line in uninterrupted if line["kind"] == "train"}) == 12


@pytest.mark.parametrize("kills", [((6, 0.0), (26, 0.005), (30, 0.0)), ((11, 0.02), (20, 0.05))])
def test_killed_and_started_again_gives_the_same_lines(tmp_path, uninterrupted, kills):
    for lines, seconds in kills:
        kill_after(runs.start(tmp_path / "run"), tmp_path / "run", lines, seconds)
    out = runs.finish(runs.start(tmp_path / "run"))
    assert "resuming" in out
    assert "another result" not in out
    assert runs.metrics(tmp_path / "run") == uninterrupted


def test_sigterm_saves_the_current_step_and_exits_143(tmp_path, uninterrupted):
    process = runs.start(tmp_path / "run")
    while runs.num_lines(tmp_path / "run") < 10 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert "is saved; the same command goes on from there" in runs.finish(process, code=143)
    done = runs.metrics(tmp_path / "run")[-1]["step"]
    assert f"resuming {tmp_path / 'run'} at step {done} of 12" in runs.finish(runs.start(tmp_path / "run"))
    assert runs.metrics(tmp_path / "run") == uninterrupted


def test_other_settings_are_refused_with_the_difference(tmp_path):
    runs.finish(runs.start(tmp_path / "run", steps=1))
    out = runs.finish(runs.start(tmp_path / "run", steps=1, optimizer__learning_rate=0.5), code=2)
    assert "optimizer.learning_rate: 0.003 -> 0.5" in out
    assert "--config.allow_change=True" in out
    assert "Traceback" not in out
