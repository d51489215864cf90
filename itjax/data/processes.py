"""Work spread over fresh processes, results in order."""

import contextlib
import multiprocessing
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

AHEAD = 4  # pieces of work per process that are handed out before they are asked for


def spread(work: Callable[[Any, Any], Any], pieces: Sequence[Any], *, shared: Any, workers: int) -> Iterator[Any]:
    """`work(shared, piece)` of each piece, in their order. `shared` travels to each process once; so does what is raised."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(work, shared)) as pool:
        try:
            waiting: list[Future[Any]] = []
            with _main_hidden():
                waiting += [pool.submit(_do, piece) for piece in pieces[: AHEAD * workers]]
            for number in range(len(pieces)):
                yield waiting.pop(0).result()
                waiting += [pool.submit(_do, piece) for piece in pieces[number + AHEAD * workers :][:1]]
        except BrokenProcessPool:
            raise RuntimeError("a process was killed (out of memory?); try fewer workers") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_job: tuple[Callable[[Any, Any], Any], Any] | None = None


def _begin(work: Callable[[Any, Any], Any], shared: Any) -> None:
    global _job
    _job = work, shared


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
