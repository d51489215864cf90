"""Many processes, one run: finding each other, agreeing before the first step, waiting, and letting only one write."""

import contextlib
import errno
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
from jax._src import cloud_tpu_init, clusters, distributed  # only there are waits with a time limit of one's own
from jax._src.clusters.ompi_cluster import OmpiCluster
from jax._src.clusters.slurm_cluster import SlurmCluster

LONGEST_WAIT = 24 * 3600  # seconds that processes wait for the one that prepares the data
LAST_WORDS = 5  # seconds that the first process, whose end ends all, gives the others to end by themselves
PERIOD = 1  # seconds from one look at what other processes say to the next
LEFT = "itjax: left"  # the key under which a process says with which code it ends
PEER_LOST = 6  # as in the table of exit codes of `cli.py`
PORT = "8476"  # of the coordinator where the environment names none

# Seconds of patience, by the environment variable that changes them.
PATIENCE = {
    "ITJAX_JOIN_SECONDS": 120,  # until all processes have found each other
    "ITJAX_HEARTBEAT_SECONDS": 15,  # without a sign of life, then a process counts as lost
    "ITJAX_LEAVE_SECONDS": 600,  # at the end, while the first process still writes the report
    "ITJAX_STUCK_SECONDS": 600,  # in one collective between CPUs
}


class Lost(RuntimeError):
    """Another process of the run was lost or is stuck: the command ends with exit code 6, and can be started again."""


class Disagreement(ValueError):
    """Processes of one run were started with other settings, versions or data."""


@dataclass(frozen=True)
class Place:
    """Which process this is, of how many, and where the first one is found."""

    coordinator: str  # host:port
    count: int
    number: int
    devices: int | None = None  # the only local device that is this process's own; None: all of the machine
    told_by: str = ""


# --- finding each other -----------------------------------------------------------------------------------------------


def place(environment: Mapping[str, str]) -> Place | None:
    """Where the environment says that this process stands; None where it is alone.

    Understood, in this order: JAX's own JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID; TPU slices, one
    or several; Slurm's srun; Open MPI; SkyPilot.
    """
    for finds in (_jax, _tpu, _slurm, _open_mpi, _skypilot):
        found = finds(environment)
        if found is not None:
            return found if found.count > 1 else None
    return None


def _jax(environment: Mapping[str, str]) -> Place | None:
    if "JAX_COORDINATOR_ADDRESS" not in environment:
        return None
    count, number = (_number(environment, name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    if number >= count:
        raise ValueError(
            f"JAX_PROCESS_ID: {number} is not among the {count} processes of JAX_NUM_PROCESSES; they count from 0"
        )
    return Place(environment["JAX_COORDINATOR_ADDRESS"], count, number, told_by="JAX_COORDINATOR_ADDRESS")


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not value.isdigit():
        raise ValueError(f"{name}: {value!r} is not a number; set it beside JAX_COORDINATOR_ADDRESS, e.g. {name}=0")
    return int(value)


def _tpu(environment: Mapping[str, str]) -> Place | None:
    """A TPU machine knows its slice from the cloud's metadata or from GKE's variables, which JAX reads.

    Only there: on other machines with libtpu, TPU_WORKER_HOSTNAMES holds a warning, commas and all.
    """
    if not cloud_tpu_init.running_in_cloud_tpu_vm:
        return None
    seconds = _patience(environment, "ITJAX_JOIN_SECONDS")
    try:
        address, count, number, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, seconds
        )
    except OSError:
        return None  # no metadata to ask: this machine is no cloud's part of a slice
    except Exception as error:
        raise Lost(
            f"TPU: the machine's place in its slice is not known ({type(error).__name__}: {error}). Start all hosts again, "
            "or set TPU_SKIP_MDS_QUERY=1 where there is only this one"
        ) from error
    return Place(address, count, number, told_by="the TPU slice") if address and count and number is not None else None


def _slurm(environment: Mapping[str, str]) -> Place | None:
    """A task of srun. In the shell of salloc or sbatch there is a number of tasks, too, but nobody who starts them."""
    if "SLURM_STEP_NODELIST" not in environment or not SlurmCluster.is_env_present():
        return None
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")  # "4", "8(x2)", "2,1": of the first node and so on
    shares = int(environment["SLURM_NTASKS"]) > 1 and max(map(int, re.findall(r"(?:^|,)(\d+)", tasks))) > 1
    return Place(
        SlurmCluster.get_coordinator_address(None, environment.get("JAX_COORDINATOR_PORT")),
        SlurmCluster.get_process_count(),
        SlurmCluster.get_process_id(),
        devices=_own_device(environment, SlurmCluster.get_local_process_id()) if shares else None,
        told_by="Slurm",
    )


def _open_mpi(environment: Mapping[str, str]) -> Place | None:
    if "OMPI_COMM_WORLD_SIZE" not in environment or not OmpiCluster.is_env_present():
        return None
    shares = int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")) > 1
    return Place(
        OmpiCluster.get_coordinator_address(None, environment.get("JAX_COORDINATOR_PORT")),
        OmpiCluster.get_process_count(),
        OmpiCluster.get_process_id(),
        devices=_own_device(environment, OmpiCluster.get_local_process_id()) if shares else None,
        told_by="Open MPI",
    )


def _own_device(environment: Mapping[str, str], local: int | None) -> int | None:
    """Tasks that share a machine take one device each, unless their launcher shows each task only its own."""
    shown = environment.get("CUDA_VISIBLE_DEVICES", environment.get("ROCR_VISIBLE_DEVICES"))
    return None if shown is not None and "," not in shown else local


def _skypilot(environment: Mapping[str, str]) -> Place | None:
    if "SKYPILOT_NODE_IPS" not in environment:
        return None
    hosts = environment["SKYPILOT_NODE_IPS"].split()
    return Place(
        f"{hosts[0]}:{environment.get('JAX_COORDINATOR_PORT', PORT)}",
        len(hosts),
        int(environment["SKYPILOT_NODE_RANK"]),
        told_by="SkyPilot",
    )


# --- joining and leaving ----------------------------------------------------------------------------------------------


def start() -> None:
    """Joins the cluster that the environment describes; does nothing where it describes none. Call before any other jax use.

    The environment is that of `place`; how long it waits for what is in PATIENCE.
    """
    found = place(os.environ)
    if found is None:
        return
    seconds = {name: _patience(os.environ, name) for name in PATIENCE}
    flag, flags = "xla_cpu_collective_timeout_seconds", os.environ.get("XLA_FLAGS", "")
    if jax.config.jax_platforms == "cpu" and flag not in flags:  # type: ignore[attr-defined]
        os.environ["XLA_FLAGS"] = f"{flags} --{flag}={seconds['ITJAX_STUCK_SECONDS']}".strip()
    # JAX's own service for preemption takes SIGTERM and lets the process run on; see `parallel/stopping.py`.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_enable_recoverability", True)  # a process that is lost is ours to tell of, see `_End.miss`
    with _in_time(found, seconds["ITJAX_JOIN_SECONDS"]):
        jax.distributed.initialize(
            found.coordinator,
            num_processes=found.count,
            process_id=found.number,
            local_device_ids=found.devices,
            cluster_detection_method="deactivate",
            coordinator_bind_address=_bound(found, os.environ) if found.number == 0 else None,
            initialization_timeout=2 * seconds["ITJAX_JOIN_SECONDS"],  # ours comes first, see `_in_time`
            heartbeat_timeout_seconds=seconds["ITJAX_HEARTBEAT_SECONDS"],
            shutdown_timeout_seconds=seconds["ITJAX_LEAVE_SECONDS"],
        )


def _patience(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, str(PATIENCE[name]))
    if not value.isdigit() or int(value) < 1:
        raise ValueError(f"{name}: {value!r} is not a number of seconds; e.g. {name}={PATIENCE[name]}")
    return int(value)


@contextlib.contextmanager
def _in_time(found: Place, seconds: int) -> Iterator[None]:
    """Ends the process with a message if what is within takes longer: a late `initialize` aborts, with a stack trace."""

    def too_late() -> None:
        whom = "not all of them have come" if found.number == 0 else "the first of them is not there"
        print(
            f"itjax: process {found.number} of {found.count}, as {found.told_by} has it, waited {seconds} s for the others at "
            f"{found.coordinator}: {whom}. Look whether each was started and reaches that address, then start all again; "
            f"ITJAX_JOIN_SECONDS={2 * seconds} waits longer",
            file=sys.stderr,
            flush=True,
        )
        os._exit(PEER_LOST)

    timer = threading.Timer(seconds, too_late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _bound(found: Place, environment: Mapping[str, str]) -> str | None:
    """The one address of this machine at which the first process listens; None is all of them.

    That is where the name leads if it leads here: behind a translated address, or where a machine knows its own name as
    127.0.1.1, others would not reach it.
    """
    if "JAX_COORDINATOR_BIND_ADDRESS" in environment:
        return environment["JAX_COORDINATOR_BIND_ADDRESS"]
    host, _, port = found.coordinator.rpartition(":")
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{found.told_by}: {found.coordinator!r} is no address of a first process ({error}); give host:port"
        ) from error
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what a run that just ended leaves is no hindrance
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return None
            raise ValueError(
                f"{found.told_by}: port {port} of {host} is taken by another program; end it, or choose another port for all "
                "processes (in JAX_COORDINATOR_ADDRESS, or JAX_COORDINATOR_PORT where that is not set)"
            ) from error
    is_hidden = str(address[0]).startswith("127.") and not re.fullmatch(r"localhost|127\.[\d.]+", host)
    return None if is_hidden else f"[{address[0]}]:{port}" if family == socket.AF_INET6 else f"{address[0]}:{port}"


def together(command: Callable[[], int | None], *, explain: Callable[[Exception], int]) -> int:
    """Runs a whole command as one process of the cluster; the exit code where it is alone, else it ends here.

    Where something is raised, `explain` prints it and says the exit code, and the process ends without waiting for the
    others; when another one ends so or is lost, this one does, too. A process that is alone raises as ever.
    """
    start()
    service = _service()
    if service is None:
        return command() or 0
    end = _End(explain)
    for watch in (end.follow, end.miss):
        threading.Thread(target=watch, name=f"itjax: {watch.__name__}", daemon=True).start()
    try:
        code = command() or 0
        service.wait_at_barrier("itjax: all are done", 1000 * _patience(os.environ, "ITJAX_LEAVE_SECONDS"))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        code = 130
    except Exception as error:
        end.raised(error)
    end.exit(code)


class _End:
    """How one process of several ends: always at once, for the interpreter's own exit waits for processes that never come.

    The first process is the last to go, because the service that all depend on goes with it.
    """

    def __init__(self, explain: Callable[[Exception], int]):
        self._explain, self._service = explain, _service()
        self._number, self._count = distributed.global_state.process_id, distributed.global_state.num_processes
        self._patience = _patience(os.environ, "ITJAX_HEARTBEAT_SECONDS")
        self._alive = set(range(self._count))
        self._ends = threading.Lock()  # one thread ends the process, and never gives it back

    def raised(self, error: Exception) -> NoReturn:
        """The end of a process that failed, or was stopped."""
        if _of_others(error):
            time.sleep(self._patience)  # meanwhile `miss` finds out which one it is that is gone
            error = Lost(
                f"process {self._number} of {self._count}: another process is stuck ({_first_line(error)}). See the messages "
                "of all; the same command, for all processes, goes on from the last checkpoint"
            )
        self._ends.acquire()
        self.exit(self._explain(error))

    def follow(self) -> None:
        """Ends this process soon after another one has ended with an error."""
        while True:
            time.sleep(PERIOD)
            for key, code in self._said():
                other = int(key.rpartition("/")[2])
                # Those that stop have all saved the same step, and those that are done are done.
                if other != self._number and code not in ("0", "143"):
                    self._ends.acquire()
                    lost = self._explain(Lost(f"process {other} has ended with exit code {code}; see there"))
                    self.exit(int(code) if code in ("2", "5") else lost)

    def miss(self) -> None:
        """Ends this process when another one has given no sign of life for as long as patience lasts.

        The service counts heartbeats and answers when all that live have asked; a thread of Python may be late for that.
        """
        while True:
            time.sleep(PERIOD)
            try:
                self._alive = set(self._service.get_live_nodes(list(range(self._count))))
            except jax.errors.JaxRuntimeError:
                return  # the service ends, and with it this process
            gone = sorted(
                set(range(self._count)) - self._alive - {int(key.rpartition("/")[2]) for key, _ in self._said()}
            )
            if gone:
                self._ends.acquire()
                message = (
                    f"process {self._number} of {self._count}: no sign of life from {_processes(gone)} for {self._patience} s. "
                    "The same command, for all processes, goes on from the last checkpoint"
                )
                self.exit(self._explain(Lost(message)))

    def _said(self) -> list[tuple[str, str]]:
        try:
            return self._service.key_value_dir_get(LEFT)
        except jax.errors.JaxRuntimeError:
            return []

    def exit(self, code: int) -> NoReturn:
        """Says so, and goes; the first process waits for the others to say so."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service is gone, and with it those who would hear
            self._service.key_value_set(f"{LEFT}/{self._number}", str(code), allow_overwrite=True)
        until = time.monotonic() + LAST_WORDS
        while self._number == 0 and len(self._said()) < len(self._alive) and time.monotonic() < until:
            time.sleep(0.05)
        if self._number == 0:
            time.sleep(0.2)  # those who have just said so are gone by then
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _of_others(error: Exception) -> bool:
    """Whether it was raised because another process is gone: what transports and the coordination service say then."""
    words = r"Gloo|Connection (reset|closed|refused)|Socket closed|UNAVAILABLE|DEADLINE_EXCEEDED|[Hh]eartbeat|[Bb]arrier|NCCL"
    raised = isinstance(error, (jax.errors.JaxRuntimeError, ValueError, TimeoutError))
    return raised and not isinstance(error, Disagreement) and re.search(words, str(error)) is not None


def _processes(numbers: list[int]) -> str:
    return ("process " if len(numbers) == 1 else "processes ") + ", ".join(map(str, numbers))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


# --- agreeing and waiting ---------------------------------------------------------------------------------------------

_times = itertools.count()


def agree(facts: Mapping[str, str], *, seconds: int) -> None:
    """Compares facts of all processes, by name. Where one differs all raise the same Disagreement. All call it, in one order.

    A process compares itself with the first one and says how it differs; the first one collects that and tells everybody.
    Raises Lost where that takes longer than so many seconds.
    """
    service = _service()
    if service is None:
        return
    number, count = distributed.global_state.process_id, distributed.global_state.num_processes
    key = f"itjax: agree {next(_times)}"

    def said(what: str, by: int) -> str:
        try:
            return service.blocking_key_value_get(f"{key}/{what}", 1000 * seconds)
        except jax.errors.JaxRuntimeError as error:
            raise Lost(
                f"process {number} of {count}: no word from process {by} for {seconds} s, to compare settings and data. "
                f"See its messages, and start all processes again ({_first_line(error)})"
            ) from error

    if number == 0:
        service.key_value_set(f"{key}/facts", json.dumps(dict(facts)))
        found = [said(str(other), by=other) for other in range(1, count)]
        service.key_value_set(f"{key}/verdict", "; ".join(difference for difference in found if difference))
    else:
        mine = differences(json.loads(said("facts", by=0)), facts, number=number)
        service.key_value_set(f"{key}/{number}", "; ".join(mine))
    if verdict := said("verdict", by=0):
        raise Disagreement(
            f"the {count} processes of this run were not started alike: {verdict}. Start all of them with the same command, "
            "the same installation and the same files, and one run_dir that all of them see"
        )


def differences(first: Mapping[str, str], mine: Mapping[str, str], *, number: int) -> list[str]:
    """What process `number` has otherwise than the first one: `process 3 has config.seed=1, process 0 has 0`."""
    return [
        f"process {number} has {name}={mine.get(name, 'nothing')}, process 0 has {first.get(name, 'nothing')}"
        for name in {**first, **mine}
        if first.get(name) != mine.get(name)
    ]


@contextlib.contextmanager
def looking(look: Callable[[], bool]) -> Iterator[None]:
    """Within, a thread looks every second, until `look` returns False.

    It waits here and not in the service: an interpreter that ends while a thread is in there aborts.
    """
    ended = threading.Event()

    def run() -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service is gone: whoever needs it, says so
            while not ended.wait(PERIOD) and look():
                pass

    thread = threading.Thread(target=run, name="itjax: looking", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def writes() -> bool:
    """Whether this process is the one that writes files and talks to the terminal."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come to the barrier of this name, which is used once in a run.

    The coordination service waits, not a collective: on CPUs the first collective gives up after 30 seconds.
    """
    if jax.process_count() > 1:
        service = _service()
        assert service is not None, "processes that are several have a coordination service"
        service.wait_at_barrier(name, LONGEST_WAIT * 1000)


def _service() -> Any:
    """The client of the coordination service; None in a process that is alone."""
    return distributed.global_state.client
