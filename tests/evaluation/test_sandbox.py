"""The sandbox: good programs return, bad ones end soon and touch nothing, and no failure looks like a success."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from itjax.evaluation import sandbox
from itjax.evaluation.sandbox import Limits, Program, run

LIMITS = Limits()


def outcome(body: str, *, limits: Limits = LIMITS, calls=((3,),), before: str = "") -> sandbox.Outcome:
    """The fate of `def f(x)` with this body."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return run(Program(f"{before}\ndef f(x):\n{lines}\n", "f", calls), limits=limits)


def test_values_come_back_in_the_order_of_the_calls():
    assert outcome("return [x, x > 1]", calls=((1,), (2,))) == sandbox.Outcome("returned", ([1, False], [2, True]))


def test_programs_may_calculate_with_the_harmless_modules():
    assert outcome(
        "return math.floor(x) + len(List)", before="import math\nfrom string import digits as List"
    ).values == (13,)


def test_programs_do_not_share_anything():
    many = [Program(f"import math\nmath.pi = {n}\ndef f():\n    return math.pi", "f", ((),)) for n in range(6)]
    many += [Program("import math\ndef f():\n    return round(math.pi)", "f", ((),))]
    assert [fate.values for fate in sandbox.run_all(many, limits=LIMITS)] == [(n,) for n in range(6)] + [(3,)]


@pytest.mark.parametrize("source", ["", "def f(:", "f = 3", "raise SystemExit(0)", "def f(x, y): return 1", "1 / 0"])
def test_programs_that_do_not_work_raise(source):
    assert run(Program(source, "f", ((1,),)), limits=LIMITS).status == "raised"


@pytest.mark.parametrize("value", ["object()", "float('nan')", "{1, 2}", "f"])
def test_values_that_json_cannot_say_are_errors(value):
    assert outcome(f"return {value}").status == "raised"


def test_an_endless_loop_runs_out_of_processor_time():
    started = time.monotonic()
    assert outcome("while True: pass").status == "stopped"
    assert time.monotonic() - started < LIMITS.wall_seconds + 2


def test_sleeping_runs_out_of_wall_time():
    fate = outcome("import time\ntime.sleep(60)", limits=Limits(wall_seconds=0.7))
    assert fate.status in ("stopped", "broken")  # broken: on a busy machine it may not even have started


def test_a_loop_that_catches_everything_ends_too():
    assert (
        outcome("while True:\n    try:\n        while True: pass\n    except BaseException: pass").status == "stopped"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not enforce the limit")
def test_memory_is_limited():
    assert outcome("return len(bytearray(2_000_000_000))") == sandbox.Outcome("raised", detail="MemoryError")
    assert outcome("a = [0]\nwhile True: a = a + a").status in ("raised", "stopped")


def test_files_cannot_be_written_or_read(tmp_path):
    target, secret = tmp_path / "made", tmp_path / "secret"
    secret.write_text("secret")
    assert outcome(f"open({str(target)!r}, 'w').write('x')").detail == "PermissionError"
    assert outcome(f"return os.open({str(target)!r}, os.O_CREAT | os.O_WRONLY)", before="import os").status == "raised"
    assert outcome(f"return open({str(secret)!r}).read()").status == "raised"
    assert outcome(f"return os.remove({str(secret)!r})", before="import os").status == "raised"
    assert outcome("return os.listdir('/')", before="import os").status == "raised"
    assert not target.exists()
    assert secret.exists()


@pytest.mark.parametrize(
    "body",
    ["while True: os.fork()", "os.system('true')", "os.execv('/bin/true', ['true'])", "os.kill(os.getppid(), 9)",
     "return os.posix_spawn('/bin/true', ['true'], {})"],
)  # fmt: skip
def test_no_process_can_be_started_or_signalled(body):
    assert outcome(body, before="import os") == sandbox.Outcome("raised", detail="PermissionError")


def test_no_thread_and_no_socket():
    assert outcome("_thread.start_new_thread(print, ())\nreturn 1", before="import _thread").status in (
        "raised",
        "stopped",
    )
    assert outcome("import socket\nreturn 1").status == "raised"
    assert outcome("import ctypes\nreturn 1").status == "raised"


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    (environment,) = outcome("return dict(os.environ)", before="import os").values
    assert set(environment) <= {"LC_CTYPE", "__CF_USER_TEXT_ENCODING"}  # set by the interpreter itself


def test_too_much_output_is_cut_and_is_no_success():
    assert outcome("return 'x' * 10_000_000").status == "stopped"
    assert outcome("while True: os.write(3, b'x' * 9999)", before="import os").status in ("stopped", "raised")
    assert outcome("print('x' * 10_000_000)\nreturn x").values == (3,)  # prints go nowhere


def test_a_program_that_leaves_without_a_report_is_stopped():
    assert outcome("os._exit(0)", before="import os").status == "stopped"


@pytest.mark.parametrize("report", ["passed", "[]", "null", "[[[[", "{}", '{"values": 3}', "[" * 20000])
def test_a_report_that_a_program_made_up_is_no_success(report):
    said = f"for i in range(3, 9):\n    try: os.write(i, {report!r}.encode())\n    except OSError: pass\nos._exit(0)"
    fate = outcome(said, before="import os")
    assert fate.status == "stopped"


def test_a_sandbox_that_cannot_start_knows_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "INSIDE", tmp_path / "missing.py")
    assert outcome("return 1").status == "broken"


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")
def test_the_kernel_refuses_even_without_the_audit_hook():
    """The filter alone, no hook: what a program would meet that found a way around the interpreter."""
    code = (
        "import sys, runpy; inside = runpy.run_path(sys.argv[1]); import os\n"
        "if not inside['filter_syscalls'](): print('absent'); raise SystemExit\n"
        "for name, act in {'open': lambda: open('/etc/hostname'), 'fork': os.fork,\n"
        "                  'kill': lambda: os.kill(os.getppid(), 0), 'list': lambda: os.listdir('/')}.items():\n"
        "    try: act(); print(name, 'allowed')\n"
        "    except PermissionError: pass\n"
        "print('sealed')"
    )
    command = [sys.executable, "-I", "-S", "-c", code, str(sandbox.INSIDE)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    if said == ["absent"]:
        pytest.skip("this kernel or machine has no seccomp")
    assert said == ["sealed"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_is_left_running():
    outcome("while True: pass")
    mine = [Path(f"/proc/{child}") for child in Path("/proc/thread-self/children").read_text().split()]
    assert not [child for child in mine if str(sandbox.INSIDE) in (child / "cmdline").read_text()]
