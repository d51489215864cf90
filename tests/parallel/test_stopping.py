"""SIGTERM to one of many: all stop after one step that none has passed."""

import signal
import threading
import time

import pytest

from itjax.parallel import stopping
from itjax.parallel.stopping import Stop


class Board:
    """The service's keys and values, with one `Stop` for each of several processes at the steps given."""

    def __init__(self, *steps: int):
        self.values: dict[str, str] = {}
        self.stops = [Stop(self, number=i, count=len(steps), start=step) for i, step in enumerate(steps)]

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, key):
        return [(name, value) for name, value in self.values.items() if name.startswith(f"{key}/")]

    def settle(self) -> None:
        """Every process looks, at the same time, until it has found out."""
        threads = [threading.Thread(target=self._look, args=(stop,)) for stop in self.stops]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=10)

    def _look(self, stop: Stop) -> None:
        while stop.look():
            time.sleep(0.01)


@pytest.fixture(autouse=True)
def ordinary_sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_all_stop_after_the_step_that_follows_the_furthest():
    board = Board(3, 5, 4)
    assert all(stop.look() for stop in board.stops)  # nobody was asked: they look on
    board.stops[2].ask()
    board.settle()
    assert [[step for step in range(1, 10) if stop.after(step)] for stop in board.stops] == [[6], [6], [6]]


def test_a_process_at_its_last_step_is_waited_for_and_not_asked_for_more():
    board = Board(10, 12, 11)
    board.stops[1].over()  # 12 was the last step of the run
    board.stops[0].ask()
    board.settle()
    assert not any(stop.after(step) for stop in board.stops for step in (11, 12))


def test_an_answer_is_given_once():
    """Who reads late reads the same: a process that stops goes on to say so when its steps are over."""
    board = Board(3, 5)
    board.stops[0].ask()
    board.settle()
    board.stops[1].after(6)
    board.stops[1].over()
    assert dict(board.key_value_dir_get(stopping.AT)) == {f"{stopping.AT}/0": "3", f"{stopping.AT}/1": "5"}


def test_alone_the_first_sigterm_asks_and_a_second_one_would_end_the_process():
    with stopping.on_sigterm(0) as stop:
        assert not stop.after(1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.after(1)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) != stop.ask
