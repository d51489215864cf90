"""Work is done by other processes, and comes back in order."""

import itertools
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from itjax.data.processes import AHEAD, spread

ROOT = Path(__file__).resolve().parents[2]


def square(shared, number):
    if number == shared["stop"]:
        raise ValueError(f"no {number}")
    return os.getpid(), number**2 + shared["add"]


def die(shared, number):
    os._exit(1)


def test_results_come_in_order_from_other_processes():
    found = list(spread(square, range(40), shared={"add": 1, "stop": -1}, workers=2))
    assert [value for _, value in found] == [number**2 + 1 for number in range(40)]
    assert os.getpid() not in {process for process, _ in found}


def test_an_error_comes_back_as_it_is():
    found = spread(square, range(40), shared={"add": 0, "stop": 3}, workers=2)
    assert [value for _, value in (next(found), next(found), next(found))] == [0, 1, 4]
    with pytest.raises(ValueError, match="no 3"):
        next(found)


def test_a_killed_process_is_told():
    with pytest.raises(RuntimeError, match="a process was killed"):
        list(spread(die, range(3), shared=None, workers=1))


def test_pieces_are_taken_as_they_are_needed_and_who_stops_early_leaves_no_process():
    taken = []
    endless = (taken.append(number) or number for number in itertools.count())
    found = spread(square, endless, shared={"add": 0, "stop": -1}, workers=2)
    assert [value for _, value in itertools.islice(found, 20)] == [number**2 for number in range(20)]
    assert len(taken) == 19 + 2 * AHEAD
    assert multiprocessing.active_children()
    found.close()
    assert not multiprocessing.active_children()


def test_no_pieces_are_no_results():
    assert list(spread(square, [], shared=None, workers=2)) == []


def test_what_cannot_travel_is_one_message():
    with pytest.raises(ValueError, match=r"local object.* define it in a module of its own"):
        list(spread(square, range(3), shared=lambda: None, workers=2))


KILLED = """
import time
from itjax.data.processes import spread
from tests.data.test_processes import square

for process, _ in spread(square, range(100), shared={"add": 0, "stop": -1}, workers=2):
    print(process, flush=True)
    time.sleep(30)
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="asks /proc whether a process runs")
def test_processes_end_with_the_one_that_started_them():
    command = [sys.executable, "-c", KILLED]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE) as parent:
        child = int(parent.stdout.readline())
        assert is_running(child)
        parent.kill()
    deadline = time.monotonic() + 10
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(process):
    """Whether it is there and not one that ended and nobody asked about."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
