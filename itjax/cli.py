"""The `itjax` command, and how every command ends: exit codes, and one message instead of a traceback for a user's mistake."""

import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

COMMANDS = {
    "train": ("itjax.main", "train; resumes by itself"),
    "show": ("itjax.show", "print rows as they will be trained"),
    "plan": ("itjax.plan", "what a run needs on devices that you do not have: memory, time, traffic"),
    "verify": ("itjax.verify", "prove the invariances on your config and devices"),
    "audit": ("itjax.audit", "say what is in the data: duplicates, leaks, personal data, offensive and faulty rows"),
    "export": ("itjax.export", "a run as the folder of a published model, which other libraries open"),
    "report": ("itjax.report", "report.html of one run, or a comparison of several"),
}

FAULT_OF_OURS, FAULT_OF_USER, ABORTED, PEER_LOST, STOPPED = 1, 2, 5, 6, 143


def main() -> NoReturn:
    """`itjax train --config=...` is `python -m itjax.main --config=...`."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: itjax COMMAND --config=FILE.py [--config.setting=value]\n")
        for name, (_, does) in COMMANDS.items():
            print(f"  itjax {name:<8} {does}")
        sys.exit(0)
    name = sys.argv.pop(1)
    if name not in COMMANDS:
        print(f"itjax: {name!r}: no such command; there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(FAULT_OF_USER)
    module = importlib.import_module(COMMANDS[name][0])
    run(module.command)


def run(command: Callable[[Sequence[str]], int]) -> NoReturn:
    """Runs a command on `sys.argv` and exits with the code that contracts give its outcome."""
    try:
        code = command(sys.argv)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        code = 130
    except Exception as error:
        code = explain(error)
    sys.stdout.flush()
    sys.exit(code)


def explain(error: Exception) -> int:
    """Prints what went wrong, as one message where the user can mend it, and returns the exit code."""
    kind = type(error).__name__
    if kind == "Stopped":
        return STOPPED
    if kind in ("Aborted", "Lost"):
        print(f"itjax: {error}", file=sys.stderr)
        return ABORTED if kind == "Aborted" else PEER_LOST
    if is_message(error):
        print(f"itjax: {error}", file=sys.stderr)
        return FAULT_OF_USER
    traceback.print_exception(error)
    return FAULT_OF_OURS


def is_message(error: Exception) -> bool:
    """Whether the error is written for the user: a ValueError raised by our own code, or the system's word on a file."""
    if isinstance(error, OSError) and error.filename is not None:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError) and bool(frames) and Path(__file__).parent in Path(frames[-1].filename).parents


if __name__ == "__main__":
    main()
