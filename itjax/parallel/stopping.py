"""SIGTERM, for one process or all: the run stops after a step that all processes have in common, and that step is saved.

A process that is asked tells the others. Each answers with the last step that it has sent off, and holds until all have
answered; the step after the largest is the last one for all, and none has gone past it.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed

from itjax.parallel import cluster

ASKED, AT = "itjax: asked to stop", "itjax: at step"


class Stop:
    """Whether to stop after a step. JAX has such an agreement, too, but its handler takes every SIGTERM for itself."""

    def __init__(self, service: Any, *, number: int, count: int, start: int):
        self._service, self._number, self._count = service, number, count
        self._is_asked, self._has_answered, self._is_over = False, False, False
        self._step = start
        self._last: int | None = None  # the step that all stop after, once it is agreed
        self._holds = threading.Lock()  # while it is found, no step begins

    def ask(self, *_: object) -> None:
        """The first SIGTERM asks for a stop; a second one ends the process at once."""
        self._is_asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def after(self, step: int) -> bool:
        """Whether the run stops after this step, which has been sent off. Every process says every step."""
        if self._service is None:
            return self._is_asked
        with self._holds:
            self._step = step
            return step == self._last

    def look(self) -> bool:
        """Tells what this process was asked, answers what another one was; False when there is no more to find out."""
        if self._is_asked:
            self._service.key_value_set(f"{ASKED}/{self._number}", "", allow_overwrite=True)
        if not self._service.key_value_dir_get(ASKED):
            return True
        with self._holds:
            self._answer()
            self._last = self._agreed()
        return False

    def _answer(self) -> None:
        if not self._has_answered:
            self._has_answered = True
            self._service.key_value_set(f"{AT}/{self._number}", str(self._step))

    def _agreed(self) -> int | None:
        """The step after the largest that a process is at, when all have said theirs; None if this process ends meanwhile."""
        while not self._is_over:
            said = self._service.key_value_dir_get(AT)
            if len(said) == self._count:
                return max(int(step) for _, step in said) + 1
            time.sleep(0.05)
        return None

    def over(self) -> None:
        """No step comes after the last: the answer for those who ask later."""
        self._is_over = True
        if self._service is not None:
            with self._holds, contextlib.suppress(jax.errors.JaxRuntimeError):
                self._answer()


@contextlib.contextmanager
def on_sigterm(start: int) -> Iterator[Stop]:
    """Within, SIGTERM asks this process, and with it all others, to stop; `start` is the step that training goes on from."""
    state = distributed.global_state
    stop = Stop(state.client, number=state.process_id, count=state.num_processes, start=start)
    try:
        before = signal.signal(signal.SIGTERM, stop.ask)
    except ValueError:  # not the main thread: nobody sends us signals there
        yield stop
        return
    try:
        with contextlib.nullcontext() if state.client is None else cluster.looking(stop.look):
            try:
                yield stop
            finally:
                stop.over()
    finally:
        signal.signal(signal.SIGTERM, before)
