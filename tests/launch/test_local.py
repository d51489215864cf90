"""Real runs of several processes on this machine: ended in every way, they go on as if nothing had been."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.contract import runs

LAUNCHER = runs.ROOT / "launch" / "local.py"
TINY = {
    "steps": 8,
    "checkpoint.every": 3,
    "evaluation.every": 0,
    "evaluation.examples": 0,
    "architecture.layers": 1,
    "optimizer.schedule": "constant",  # a run of more steps is a longer one of the same
    "optimizer.warmup": 0.0,
}
SEEN = (
    "kind",
    "step",
    "example_ids",
    "tokens",
    "trained_tokens",
    "epoch",
    "skipped",
    "fill",
)  # equal whatever the mesh


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    """Encoded data and compiled steps, shared by the runs of this file."""
    return str(tmp_path_factory.mktemp("cache"))


def environment(cache: str) -> dict[str, str]:
    given = runs.environment(XDG_CACHE_HOME=cache, ITJAX_HEARTBEAT_SECONDS="10")
    return {**given, "XLA_FLAGS": "--xla_backend_optimization_level=0"}  # compiles in two thirds of the time


def start(run_dir: Path, cache: str, *, processes: int, devices: int = 1, **settings: object) -> subprocess.Popen:
    """A small run in so many processes, or in this command's own one where `processes` is 0."""
    given = {**TINY, **settings}
    words = runs.arguments(run_dir, **{name.replace(".", "__"): value for name, value in given.items()})
    ours = [str(LAUNCHER), f"--processes={processes}", f"--devices_per_process={devices}"]
    return subprocess.Popen(
        [sys.executable, *(ours if processes else ["-m", "itjax.main"]), *words],
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def children(launcher: subprocess.Popen) -> list[int]:
    listed = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    if not listed.exists():
        pytest.skip("the kernel does not list the children of a process")
    return [int(word) for word in listed.read_text().split()]


def wait_for(run_dir: Path, process: subprocess.Popen, *, step: int) -> None:
    """Until metrics.jsonl has the line of a step and the first checkpoint is there."""
    limit = time.monotonic() + 200
    while runs.num_lines(run_dir) < step or not (run_dir / "checkpoints" / "3").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.01)


def same(run: list[dict], other: list[dict]) -> bool:
    """Whether two runs saw the same data and came to the same losses, up to the order of sums."""
    return len(run) == len(other) and all(
        all(a.get(name) == b.get(name) for name in SEEN)
        and math.isclose(a["loss"], b["loss"], rel_tol=2e-5)
        and math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=2e-4)
        for a, b in zip(run, other, strict=True)
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache) -> list[dict]:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    runs.finish(start(run_dir, cache, processes=0))
    return runs.metrics(run_dir)


@pytest.fixture(scope="module")
def two(tmp_path_factory, cache) -> list[dict]:
    run_dir = tmp_path_factory.mktemp("two") / "run"
    runs.finish(start(run_dir, cache, processes=2))
    return runs.metrics(run_dir)


def test_two_that_are_killed_go_on_bit_for_bit(tmp_path, cache, alone, two):
    run_dir = tmp_path / "run"
    launcher = start(run_dir, cache, processes=2)
    wait_for(run_dir, launcher, step=5)
    for process in [*children(launcher), launcher.pid]:
        os.kill(process, signal.SIGKILL)
    launcher.communicate()
    done = runs.num_lines(run_dir)
    out = runs.finish(start(run_dir, cache, processes=2))
    assert done == 8 or "resuming" in out
    assert "another result" not in out
    assert runs.metrics(run_dir) == two
    assert same(two, alone)


def test_four_that_are_asked_to_stop_save_one_step_of_the_run_that_one_process_does(tmp_path, cache, alone):
    run_dir = tmp_path / "run"
    launcher = start(run_dir, cache, processes=4, steps=400)
    wait_for(run_dir, launcher, step=5)
    launcher.send_signal(signal.SIGTERM)
    out = runs.finish(launcher, code=143)
    saved = max(int(folder.name) for folder in (run_dir / "checkpoints").iterdir())
    assert f"SIGTERM: step {saved} is saved; the same command goes on from there" in out
    assert runs.metrics(run_dir)[-1]["step"] == saved
    assert same(runs.metrics(run_dir)[: len(alone)], alone[:saved])


@pytest.mark.slow
def test_four_that_are_killed_go_on_as_one_process_would(tmp_path, cache, alone):
    run_dir = tmp_path / "run"
    launcher = start(run_dir, cache, processes=4)
    wait_for(run_dir, launcher, step=5)
    for process in [*children(launcher), launcher.pid]:
        os.kill(process, signal.SIGKILL)
    launcher.communicate()
    runs.finish(start(run_dir, cache, processes=4))
    assert same(runs.metrics(run_dir), alone)


def test_processes_started_unlike_end_before_the_first_step(tmp_path, cache):
    """One of them has another seed: its config file says so."""
    config = tmp_path / "uneven.py"
    config.write_text(
        f"import os, runpy\nbase = runpy.run_path({str(runs.ROOT / 'configs' / 'quickstart.py')!r})['get_config']\n"
        "def get_config():\n    config = base()\n    config.seed = int(os.environ.get('JAX_PROCESS_ID', 0))\n"
        "    return config\n"
    )
    words = [f"--config={config}", f"--config.run_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, str(LAUNCHER), "--processes=2", "--devices_per_process=1", *words],
        env=environment(cache),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("process 1 has config.seed=1, process 0 has 0") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_one_of_two_that_is_killed_ends_the_other_which_names_it(tmp_path, cache, two):
    run_dir = tmp_path / "run"
    launcher = start(run_dir, cache, processes=2, steps=400)
    wait_for(run_dir, launcher, step=5)
    os.kill(children(launcher)[1], signal.SIGKILL)
    out = runs.finish(launcher, code=137)
    assert "process 0 of 2: no sign of life from process 1 for 10 s" in out


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_sigterm_for_one_of_two_stops_both(tmp_path, cache, which):
    run_dir = tmp_path / "run"
    launcher = start(run_dir, cache, processes=2, steps=400)
    wait_for(run_dir, launcher, step=5)
    os.kill(children(launcher)[which], signal.SIGTERM)
    out = runs.finish(launcher, code=143)
    assert "is saved; the same command goes on from there" in out


@pytest.mark.slow
def test_two_processes_of_two_devices_come_to_the_losses_of_one(tmp_path, cache, alone):
    run_dir = tmp_path / "run"
    runs.finish(start(run_dir, cache, processes=2, devices=2, **{"parallel.data": 2, "parallel.fsdp": 2}))
    assert same(runs.metrics(run_dir), alone)


def test_other_commands_run_in_several_processes_too():
    done = subprocess.run(
        [sys.executable, str(LAUNCHER), "--processes=2", "--command=verify", "--help"],
        env=runs.environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0
    assert "Prove the invariances" in done.stdout


def test_without_a_number_of_processes_it_says_how_it_is_used():
    done = subprocess.run([sys.executable, str(LAUNCHER), "--config=x.py"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--processes: ''; say how many, e.g. --processes=2" in done.stderr
