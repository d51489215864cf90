"""Work is done by other processes, and comes back in order."""

import os

import pytest

from itjax.data.processes import spread


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
