"""Several processes on this machine, as one cluster.

    python launch/local.py --processes=4 --config=configs/quickstart.py
    python launch/local.py --processes=2 --devices_per_process=4 --command=verify --config=configs/quickstart.py

--processes=N            how many
--devices_per_process=K  fake CPU devices of each; without it, what the machine has
--command=NAME           a module of itjax: main (to train, the default), verify, ...

SIGTERM, SIGINT and SIGHUP go to all of them. When one ends with an error, the others get GRACE seconds to end, too; the exit
code is that of the first one that failed.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

GRACE = 30  # seconds from the first failure to SIGTERM for the others, and from there to SIGKILL
OURS = {"processes": "", "devices_per_process": "0", "command": "main"}  # flags with their defaults


def main(argv: Sequence[str]) -> int:
    flags, rest = parsed(argv)
    if not flags["processes"].isdigit() or int(flags["processes"]) < 1 or not flags["devices_per_process"].isdigit():
        print(f"{__doc__}\n--processes: {flags['processes']!r}; say how many, e.g. --processes=2", file=sys.stderr)
        return 2
    count = int(flags["processes"])
    printer = Printer()
    command = [sys.executable, "-m", f"itjax.{flags['command']}", *rest]
    address = f"127.0.0.1:{free_port()}"
    children: list[subprocess.Popen] = []

    def forward(number: int, _: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, forward)
    for i in range(count):
        given = environment(address, count, i, devices=int(flags["devices_per_process"]))
        # A session of its own: Ctrl-C reaches a child once, from here.
        child = subprocess.Popen(
            command,
            env=given,
            stdout=None if i == 0 else subprocess.PIPE,
            stderr=subprocess.PIPE if i == 0 else subprocess.STDOUT,
            start_new_session=True,
        )
        children.append(child)
        printer.follow(child.stderr if i == 0 else child.stdout, prefix=f"[{i}] " if i else "")
    code = wait(children)
    printer.finish()
    return code


def parsed(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Our own flags, and the rest, which the command gets."""
    flags, rest = dict(OURS), []
    for argument in argv:
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and equals and name in OURS:
            flags[name] = value
        else:
            rest.append(argument)
    return flags, rest


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(address: str, count: int, number: int, *, devices: int) -> dict[str, str]:
    """What a process finds the others by, and fake devices where they are asked for."""
    given = {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
    }
    if devices:
        flag = f"--xla_force_host_platform_device_count={devices}"
        given |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()}
    return given


def wait(children: Sequence[subprocess.Popen]) -> int:
    """The exit code of the first child that fails, else 0, when all have ended."""
    code, failed_at, sent = 0, 0.0, [signal.SIGTERM, signal.SIGKILL]
    while None in (codes := [child.poll() for child in children]):
        if not code and any(codes):
            code, failed_at = next(filter(None, codes)), time.monotonic()
        if code and sent and time.monotonic() - failed_at > GRACE:
            failed_at, number = time.monotonic(), sent.pop(0)
            for child in children:
                if child.poll() is None:
                    child.send_signal(number)
        time.sleep(0.05)
    code = code or next(filter(None, codes), 0)
    return code if code >= 0 else 128 - code


class Printer:
    """Lines of all children on our stderr; what several of them say is printed once."""

    def __init__(self) -> None:
        self._said: set[bytes] = set()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def follow(self, lines: IO[bytes] | None, *, prefix: str) -> None:
        thread = threading.Thread(target=self._copy, args=(lines, prefix), daemon=True)
        thread.start()
        self._threads.append(thread)

    def _copy(self, lines: IO[bytes], prefix: str) -> None:
        for line in lines:
            with self._lock:
                if line.strip() and line in self._said:
                    continue
                self._said.add(line)
                sys.stderr.buffer.write(prefix.encode() + line)
                sys.stderr.flush()

    def finish(self) -> None:
        for thread in self._threads:
            thread.join(timeout=5)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
