"""Every command in the documents runs as written, made small by overrides that come after it."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract import runs

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CHAT = '{"messages": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}]}\n'


def commands(page: Path) -> list[str]:
    """Lines of the page's shell blocks that run itjax."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if "itjax." in line or line.startswith("python launch")]


EVERY = sorted({command for page in PAGES for command in commands(page)})


def small(words: list[str]) -> list[str]:
    """The command with what makes it take seconds."""
    config = next((word for word in words if word.startswith("--config=")), "")
    if not config:
        return words
    overrides = {**runs.SMALL, "steps": 2, "rows": 8}
    if "sft_files" in config:
        overrides = {name: value for name, value in overrides.items() if not name.startswith("sources.")}
    return [*words, *(f"--config.{name}={value}" for name, value in overrides.items())]


def run(command: str, folder: Path) -> subprocess.CompletedProcess:
    settings = dict(re.findall(r"^(\w+)=(\S+)(?=\s)", command))
    words = shlex.split(command.split(" ", 1)[1] if settings else command)
    assert words[0] == "python"
    return subprocess.run(
        [sys.executable, *small(words[1:])],
        cwd=folder,
        env={**runs.environment(), **settings},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A place that looks like a clone, with data of the user's own and one finished run."""
    place = tmp_path_factory.mktemp("clone")
    for name in ("configs", "launch"):
        os.symlink(ROOT / name, place / name)
    (place / "data").mkdir()
    (place / "data" / "mine.jsonl").write_text(CHAT * 40)
    for run_dir in ("runs/quickstart", "runs/short"):
        done = run(f"python -m itjax.main --config=configs/quickstart.py --config.run_dir={run_dir}", place)
        assert done.returncode == 0, done.stderr
        assert (place / run_dir / "report.html").exists()
    return place


@pytest.mark.parametrize("command", [command for command in EVERY if "itjax.verify" not in command])
def test_the_command_runs_as_written(folder, command):
    done = run(command, folder)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in EVERY if "itjax.verify" in command])
def test_verify_runs_as_written(folder, command):
    done = run(command, folder)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
