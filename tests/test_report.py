"""What `itjax.report` promises: a page for one run, a comparison for several, one message for a mistake."""

import subprocess
import sys

import pytest

from itjax import report
from tests.evaluation.test_report import a_run


def test_one_run_gives_its_report(tmp_path, capsys):
    run = a_run(tmp_path / "one")
    assert report.command(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").is_file()


def test_several_runs_give_a_comparison_beside_the_first(tmp_path, capsys):
    runs = [a_run(tmp_path / name) for name in ("one", "two")]
    assert report.command(["report", *map(str, runs)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "comparison.html")
    assert "2 runs" in (tmp_path / "comparison.html").read_text()


@pytest.mark.parametrize(
    "arguments, message", [([], "RUN: missing"), (["--html=x"], "--html=x: there is no such flag")]
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        report.command(["report", *arguments])


def test_a_folder_without_a_run_exits_with_two(tmp_path):
    done = subprocess.run([sys.executable, "-m", "itjax.report", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr == f"itjax: {tmp_path}: no config.json and no metrics.jsonl; give the run_dir of a training run\n"
    )


def test_no_jax_is_needed(tmp_path):
    code = f"import sys; from itjax import report; report.command(['report', {str(a_run(tmp_path / 'one'))!r}]); "
    code += "print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
