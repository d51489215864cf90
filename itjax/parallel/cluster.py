"""Many processes, one run: joining the cluster, waiting for each other, and letting only one process write."""

import os

import jax
from jax._src import distributed  # the only way to wait with a time limit of one's own, see `barrier`

LONGEST_WAIT = 24 * 3600  # seconds that processes wait for the one that prepares the data


def start() -> None:
    """Joins the cluster that the environment describes; does nothing where it describes none. Call before any other jax use.

    Understood: JAX's own JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; Slurm; a TPU pod.
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(
            os.environ["JAX_COORDINATOR_ADDRESS"],
            num_processes=_number("JAX_NUM_PROCESSES"),
            process_id=_number("JAX_PROCESS_ID"),
        )
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdigit():
        raise ValueError(f"{name}: {value!r} is not a number; set it beside JAX_COORDINATOR_ADDRESS, e.g. {name}=0")
    return int(value)


def writes() -> bool:
    """Whether this process is the one that writes files and talks to the terminal."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come to the barrier of this name, which is used once in a run.

    The coordination service waits, not a collective: on CPUs the first collective gives up after 30 seconds.
    """
    if jax.process_count() > 1:
        service = distributed.global_state.client
        assert service is not None, "processes that are several have a coordination service"
        service.wait_at_barrier(name, LONGEST_WAIT * 1000)
