"""The child of the sandbox: runs one untrusted program, calls its function, and reports what it returned.

Started by `sandbox.py` as `python -I -S inside.py`, never imported. The program arrives on standard input as JSON and
the report leaves on what was standard output; between the two the process gives away, for good, all it does not need.
"""

import collections  # noqa: F401  what programs may import: after `seal` no other module can be loaded
import contextlib
import functools  # noqa: F401
import itertools  # noqa: F401
import json
import math  # noqa: F401
import os
import re  # noqa: F401
import resource
import string  # noqa: F401
import sys
import typing  # noqa: F401

READY = b"ready\n"

# What a calculating interpreter needs: memory, clocks, its own pipes, leaving. Numbers are Linux's, per machine.
_SYSCALLS = {
    machine: tuple(map(int, numbers.split()))
    for machine, numbers in {
        # read write close fstat lseek, mmap mprotect munmap mremap madvise brk, rt_sigaction rt_sigprocmask rt_sigreturn
        # sigaltstack, sched_yield futex getpid, gettimeofday clock_gettime clock_nanosleep nanosleep, getrandom,
        # exit exit_group
        "x86_64": "0 1 3 5 8 9 10 11 25 28 12 13 14 15 131 24 202 39 96 228 230 35 318 60 231",
        "aarch64": "63 64 57 80 62 222 226 215 216 233 214 134 135 139 132 124 98 172 169 113 115 101 278 93 94",
    }.items()
}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_FORBIDDEN = ("open", "os.", "subprocess.", "socket.", "ctypes.", "shutil.", "signal.", "fcntl.", "mmap.", "resource.")


def main() -> None:
    job = json.load(sys.stdin)
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.close(nothing)
    limit(cpu_seconds=job["cpu_seconds"], memory_bytes=job["memory_bytes"])
    seal()
    os.write(report, READY)
    answer = json.dumps(calls(job)).encode()
    while answer:
        answer = answer[os.write(report, answer) :]
    os._exit(0)


def limit(*, cpu_seconds: int, memory_bytes: int) -> None:
    """Seconds of computing, bytes of memory, and no file may grow, no process start and no core be written."""
    wanted = {
        "RLIMIT_CPU": cpu_seconds,
        "RLIMIT_AS": memory_bytes,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_NPROC": 0,
        "RLIMIT_CORE": 0,
    }
    for name, value in wanted.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):  # not every system has every limit
            resource.setrlimit(getattr(resource, name), (value, value))


def seal() -> None:
    """No files, processes, sockets or native code from here on: asked of Linux and of the interpreter."""
    if sys.platform == "linux":
        filter_syscalls()
    for name in ("ctypes", "_ctypes", "resource"):
        sys.modules.pop(name, None)

    def refuse(event: str, arguments: tuple[object, ...]) -> None:
        if event.startswith(_FORBIDDEN):
            raise PermissionError(f"{event} is not allowed in the sandbox")

    sys.addaudithook(refuse)


def filter_syscalls() -> bool:
    """A seccomp filter that answers every unlisted system call with "not permitted"; False where there is none."""
    machine = os.uname().machine
    if machine not in _SYSCALLS or sys.maxsize < 2**32:
        return False
    try:
        import ctypes
    except ImportError:
        return False

    class Instruction(ctypes.Structure):
        _fields_ = (
            ("code", ctypes.c_uint16),
            ("if_true", ctypes.c_uint8),
            ("if_false", ctypes.c_uint8),
            ("k", ctypes.c_uint32),
        )

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(Instruction)))

    load, equal, answer = 0x20, 0x15, 0x06  # BPF: load a word; jump if equal; return
    deny, allow = 0x00050001, 0x7FFF0000  # errno EPERM; allow
    numbers = _SYSCALLS[machine]
    code = [(load, 0, 0, 4), (equal, 1, 0, _AUDIT_ARCH[machine]), (answer, 0, 0, deny), (load, 0, 0, 0)]
    code += [(equal, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    code += [(answer, 0, 0, deny), (answer, 0, 0, allow)]
    program = Program(len(code), (Instruction * len(code))(*(Instruction(*line) for line in code)))

    prctl = ctypes.CDLL(None, use_errno=True).prctl
    no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    if prctl(no_new_privileges, 1, 0, 0, 0) != 0:
        return False
    return prctl(set_seccomp, filter_mode, ctypes.byref(program), 0, 0) == 0


def calls(job: dict) -> dict:
    """What the function returned for each list of arguments, or the first error."""
    try:
        namespace: dict[str, object] = {"__name__": "__program__"}
        exec(compile(job["source"], "program", "exec"), namespace)
        function = namespace[job["function"]]
        values = [function(*arguments) for arguments in job["calls"]]  # type: ignore[operator]
        return {"values": json.loads(json.dumps(values, allow_nan=False))}
    except BaseException as error:  # the program may raise anything, SystemExit too
        return {"error": type(error).__name__}


if __name__ == "__main__":
    main()
