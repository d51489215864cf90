"""Runs small programs nobody has read: each in a child process of its own, with little time, little memory, no world.

The child never learns what it should return: it gets arguments and sends back values, and the comparison is made
here. A program can therefore fail its tests, but not pass them by printing "passed" or by patching the comparison.

What stops a program
  everywhere  an interpreter without site-packages or environment (`python -I -S`, nothing inherited), in a session
              that is killed as a whole after `wall_seconds`; at most `output_bytes` are read from it; CPU seconds,
              file growth (0 bytes) and where the system has it memory are limited; an audit hook refuses opening
              files, starting processes, sockets and native code
  on Linux    x86-64 and aarch64, with seccomp: the kernel itself refuses every call but those for memory, clocks and
              the open pipe, so that a way around the audit hook still finds no file, process or network
What does not: without seccomp the audit hook is a fence, not a wall, and macOS does not enforce the memory limit. No
sandbox of this kind protects from faults in the kernel. It is made for the answers of one's own small models; to run
programs of people who mean harm, put a virtual machine around the whole evaluation.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

INSIDE = Path(__file__).with_name("inside.py")
READY = b"ready\n"  # what the child says once it is sealed


@dataclass(frozen=True)
class Program:
    """Source text, the function in it to call, and the arguments of each call (values that JSON can say)."""

    source: str
    function: str
    calls: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Limits:
    cpu_seconds: int = 1
    wall_seconds: float = 4.0
    memory_bytes: int = 256 * 2**20
    output_bytes: int = 2**16


@dataclass(frozen=True)
class Outcome:
    """What became of a program; only "returned" has values, one for each call, as JSON carries them.

    returned   every call came back with a value
    raised     an error in the program or in a call; `detail` is its type
    stopped    a limit was reached, or the process ended without a report
    broken     the sandbox itself did not start: nothing is known about the program
    """

    status: str
    values: tuple[Any, ...] = ()
    detail: str = ""


def run(program: Program, *, limits: Limits) -> Outcome:
    """The program in a fresh process; whatever happens there, this returns within about `wall_seconds`."""
    job = {
        "source": program.source,
        "function": program.function,
        "calls": program.calls,
        "cpu_seconds": limits.cpu_seconds,
        "memory_bytes": limits.memory_bytes,
    }
    with tempfile.TemporaryFile() as stdin:  # a file, not a pipe: a child that does not read cannot block us
        stdin.write(json.dumps(job).encode())
        stdin.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(INSIDE)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,
        )
        assert process.stdout is not None
        with process.stdout as pipe:
            try:
                report, why = _read(pipe, limits)
            finally:
                _end(process)
    return _outcome(report, why or f"exit {process.returncode}")


def run_all(programs: Sequence[Program], *, limits: Limits) -> list[Outcome]:
    """All programs, in order, several at a time: still one process for each."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(lambda program: run(program, limits=limits), programs))


def _read(pipe: IO[bytes], limits: Limits) -> tuple[bytes, str]:
    """All the child says, and the limit that ended the reading, if one did."""
    deadline = time.monotonic() + limits.wall_seconds
    report = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while len(report) <= limits.output_bytes:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return report, f"ran longer than {limits.wall_seconds} s"
            if not (chunk := os.read(pipe.fileno(), 2**16)):
                return report, ""
            report += chunk
    return report, f"said more than {limits.output_bytes} bytes"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the child and all it may have started; its number is not reused before `wait`."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _outcome(report: bytes, why: str) -> Outcome:
    if not report.startswith(READY):
        return Outcome("broken", detail=why)
    try:
        answer = json.loads(report.removeprefix(READY))
        if "error" in answer:
            return Outcome("raised", detail=str(answer["error"]))
        return Outcome("returned", values=tuple(answer["values"]))
    except (ValueError, TypeError, KeyError, RecursionError):  # cut off, or not a report: a program may write here too
        return Outcome("stopped", detail=why)
