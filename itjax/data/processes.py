"""Work spread over fresh processes, results in order."""

import contextlib
import multiprocessing
import os
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

AHEAD = 4  # pieces of work per process that are handed out before they are asked for


def spread(work: Callable[[Any, Any], Any], pieces: Iterable[Any], *, shared: Any, workers: int) -> Iterator[Any]:
    """`work(shared, piece)` of each piece, in their order. `shared` travels to each process once; so does what is raised.

    Pieces are taken as they are handed out. Who stops early ends the processes; so does who is killed.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(work, shared))
    remaining, waiting = iter(pieces), deque[Future[Any]]()
    try:
        for piece in islice(remaining, AHEAD * workers):
            waiting.append(_submit(pool, piece))
        while waiting:
            yield waiting.popleft().result()
            for piece in islice(remaining, 1):
                waiting.append(_submit(pool, piece))
    except BrokenProcessPool:
        raise RuntimeError("a process was killed (out of memory?); try fewer workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, piece: Any) -> Future[Any]:
    """Hands a piece out; that may start a process."""
    try:
        with _main_hidden():
            return pool.submit(_do, piece)
    except (OSError, RuntimeError):
        raise
    except Exception as error:  # of what cannot be sent, of many types
        way_out = "define it in a module of its own, not in the main script or a function; or use one worker"
        raise ValueError(f"processes: {error}; {way_out}") from None


_job: tuple[Callable[[Any, Any], Any], Any] | None = None


def _begin(work: Callable[[Any, Any], Any], shared: Any) -> None:
    global _job
    _job = work, shared
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process that waits for work does not notice by itself that nobody is left to give it any."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(piece: Any) -> Any:
    assert _job is not None
    work, shared = _job
    return work(shared, piece)


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """New processes run the main script again unless there is none, and the main script may import jax."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
