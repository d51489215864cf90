"""Many processes, one run: joining the cluster, waiting for each other, and letting only one process write."""

import os

import jax
from jax.experimental import multihost_utils


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
    """Waits until every process has come to the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
