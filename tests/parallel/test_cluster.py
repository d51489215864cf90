"""Processes of one run find each other, are compared, and end together."""

import ast
import os
import socket
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path

import jax
import pytest
from jax._src import cloud_tpu_init, distributed
from jax._src.clusters import cloud_tpu_cluster

from itjax.parallel import cluster
from itjax.parallel.cluster import Place

ROOT = Path(__file__).resolve().parents[2]

SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}


# --- what the environment says ----------------------------------------------------------------------------------------


def placed(environment: dict[str, str]) -> Place | None:
    """The place that a process of this environment has; JAX reads some of it by itself."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        return cluster.place(os.environ)


def test_a_bare_environment_is_that_of_one_process():
    assert placed({}) is None


def test_jax_own_variables_come_first():
    own = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert placed({**SLURM, **own}) == Place("10.0.0.1:1234", 4, 3, told_by="JAX_COORDINATOR_ADDRESS")


@pytest.mark.parametrize("number, message", [("", "'' is not a number"), ("two", "'two'"), ("4", "count from 0")])
def test_a_wrong_number_is_named(number, message):
    own = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": number}
    with pytest.raises(ValueError, match=f"JAX_PROCESS_ID: .*{message}"):
        placed(own)


def test_a_slurm_task_among_several_of_a_node_takes_one_device():
    found = placed(SLURM)
    assert (found.coordinator.split(":")[0], found.count, found.number, found.devices) == ("gpu007", 16, 9, 1)


def test_a_slurm_task_that_has_its_node_for_itself_takes_all_devices():
    found = placed({**SLURM, "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"})
    assert (found.count, found.number, found.devices) == (2, 1, None)


def test_a_slurm_task_that_is_shown_one_gpu_takes_what_it_is_shown():
    assert placed({**SLURM, "CUDA_VISIBLE_DEVICES": "1"}).devices is None
    assert placed({**SLURM, "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}).devices == 1


def test_the_shell_of_an_allocation_is_alone():
    """salloc and sbatch say how many tasks there may be; only srun starts them."""
    assert placed({name: value for name, value in SLURM.items() if "STEP" not in name}) is None
    assert placed({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None


def test_open_mpi():
    uri = "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"
    variables = {"COMM_WORLD_SIZE": "4", "COMM_WORLD_RANK": "2", "COMM_WORLD_LOCAL_RANK": "0"}
    own = {"OMPI_MCA_orte_hnp_uri": uri, **{f"OMPI_{name}": value for name, value in variables.items()}}
    found = placed(own)
    assert (found.coordinator.split(":")[0], found.count, found.number) == ("10.96.0.1", 4, 2)


def test_skypilot():
    own = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8"}
    assert placed(own) == Place("10.0.0.7:8476", 2, 1, told_by="SkyPilot")
    assert placed({**own, "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.0.0.7"}) is None


def test_hosts_of_a_machine_without_tpus_do_not_count():
    """libtpu leaves this behind where it finds no TPU."""
    assert placed({"TPU_WORKER_HOSTNAMES": "WARNING: could not determine TPU worker hostnames, or address"}) is None


def test_a_tpu_slice_is_what_jax_finds(monkeypatch):
    monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    for name, value in {
        "TPU_WORKER_HOSTNAMES": "localhost,t1",
        "TPU_WORKER_ID": "1",
        "TPU_SKIP_MDS_QUERY": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: ("", 404))
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "localhost")
    for name, value in {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cluster.place(os.environ) == Place("localhost:8482", 4, 3, told_by="the TPU slice")


def test_a_tpu_where_nobody_can_be_asked_is_alone(monkeypatch):
    def nobody(key):
        raise ConnectionError("metadata.google.internal")

    monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", nobody)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    assert cluster.place({}) is None


def test_patience_is_a_number_of_seconds():
    assert cluster._patience({"ITJAX_HEARTBEAT_SECONDS": "60"}, "ITJAX_HEARTBEAT_SECONDS") == 60
    with pytest.raises(ValueError, match="ITJAX_HEARTBEAT_SECONDS: 'long' is not a number of seconds"):
        cluster._patience({"ITJAX_HEARTBEAT_SECONDS": "long"}, "ITJAX_HEARTBEAT_SECONDS")


# --- where the first process listens ----------------------------------------------------------------------------------


def bound(coordinator: str) -> str | None:
    return cluster._bound(Place(coordinator, 2, 0, told_by="a test"), {})


def test_the_first_process_listens_at_its_own_address_only():
    assert bound("127.0.0.1:50123") == "127.0.0.1:50123"


def test_an_address_that_leads_elsewhere_is_left_to_all():
    assert bound("192.0.2.1:50123") is None  # as behind a translated address


def test_a_port_that_is_taken_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"a test: port {port} of 127.0.0.1 is taken by another program"):
            bound(f"127.0.0.1:{port}")


# --- waiting and comparing --------------------------------------------------------------------------------------------


def test_processes_wait_for_each_other_longer_than_a_collective_would(monkeypatch):
    """The service is asked, with hours of patience: a large data set takes longer to prepare than 30 seconds."""
    waits = []
    service = types.SimpleNamespace(wait_at_barrier=lambda name, milliseconds: waits.append((name, milliseconds)))
    monkeypatch.setattr(distributed.global_state, "client", service)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    cluster.barrier("data encoded")
    assert waits == [("data encoded", 24 * 3600 * 1000)]


def test_a_difference_names_the_process_the_setting_and_both_values():
    first, mine = {"config.seed": "0", "steps": "12"}, {"config.seed": "1", "steps": "12", "jax": "0.10.2"}
    assert cluster.differences(first, mine, number=3) == [
        "process 3 has config.seed=1, process 0 has 0",
        "process 3 has jax=0.10.2, process 0 has nothing",
    ]


# --- real processes ---------------------------------------------------------------------------------------------------

JOINED = """
import os, sys, time
from itjax import cli
from itjax.parallel import cluster

def command():
    {body}


sys.exit(cluster.together(command, explain=cli.explain))
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(body: str, numbers: Sequence[int], *, count: int, port: int, **more: str) -> list[subprocess.Popen]:
    """Processes of a cluster that do what `body` says once they have joined; `sys.argv[1]` is their number."""
    given = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", JOINED.format(body=body), str(number)],
            env={**os.environ, **given, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(number), **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in numbers
    ]


def ends(processes: Sequence[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(exit code, what was printed, what was complained of) of each."""
    said = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def test_processes_that_differ_all_end_with_the_same_message():
    body = "cluster.agree({'config.seed': sys.argv[1], 'steps': '12'}, seconds=60)"
    for code, _, err in ends(start(body, range(2), count=2, port=free_port())):
        assert code == 2
        assert "2 processes of this run were not started alike: process 1 has config.seed=1, process 0 has 0." in err
        assert "Traceback" not in err


def test_processes_that_agree_go_on_and_only_one_address_listens():
    port = free_port()
    body = f"""cluster.agree({{'steps': '12'}}, seconds=60)
    lines = [line.split() for file in ('tcp', 'tcp6') for line in open(f'/proc/net/{{file}}')]
    print([words[1] for words in lines if words[3] == '0A' and words[1].endswith(':{port:04X}')])"""
    if not Path("/proc/net/tcp").exists():
        pytest.skip("the kernel says only under /proc/net who listens where")
    for code, out, err in ends(start(body, range(2), count=2, port=port)):
        assert code == 0, err
        (listens,) = ast.literal_eval(out)
        assert listens.endswith(f"0100007F:{port:04X}")  # 127.0.0.1, as IPv4 or as IPv6 has it


def test_one_that_is_killed_ends_the_others_with_its_number():
    number = 1
    body = f"print('joined', flush=True); cluster.barrier('b'); {number} != int(sys.argv[1]) or os.kill(os.getpid(), 9)"
    processes = start(f"{body}; time.sleep(100)", range(2), count=2, port=free_port(), ITJAX_HEARTBEAT_SECONDS="4")
    before = time.monotonic()
    for other, (code, _, err) in enumerate(ends(processes)):
        assert code == (-9 if other == number else 6), err
        assert other == number or f"no sign of life from process {number} for 4 s" in err
    assert time.monotonic() - before < 60


def test_the_exit_code_of_a_command_is_that_of_every_process():
    assert [code for code, _, _ in ends(start("return 4", range(2), count=2, port=free_port()))] == [4, 4]


def test_one_that_fails_ends_all():
    body = "cluster.writes() or cluster.place({'JAX_COORDINATOR_ADDRESS': ''}); time.sleep(100)"
    before = time.monotonic()
    first, other = ends(start(body, range(2), count=2, port=free_port()))
    assert time.monotonic() - before < 60
    assert other[0] == 2
    assert "JAX_NUM_PROCESSES: '' is not a number" in other[2]
    assert first[0] == 2
    assert "process 1 has ended with exit code 2; see there" in first[2]


@pytest.mark.parametrize("number, message", [(0, "not all of them have come"), (1, "the first of them is not there")])
def test_who_waits_in_vain_says_so(number, message):
    processes = start("pass", [number], count=2, port=free_port(), ITJAX_JOIN_SECONDS="2")
    ((code, _, err),) = ends(processes)
    assert code == 6
    assert f"process {number} of 2, as JAX_COORDINATOR_ADDRESS has it, waited 2 s" in err
    assert message in err
