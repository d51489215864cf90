"""Two memories: a device's own, and its host's, pinned there so that copies run beside the device's work.

Numbers stay where they are put until something moves them; computing with both at once is an error of jax.
"""

from typing import Any

import jax

HOST = "pinned_host"


def on_host(shardings: Any, shapes: Any) -> Any:
    """The same shards, in the memory of the host. Single numbers stay on the device: programs branch and count with them."""

    def one(sharding: jax.sharding.NamedSharding, shape: Any) -> jax.sharding.NamedSharding:
        return sharding.with_memory_kind(HOST) if shape.ndim else sharding

    return jax.tree.map(one, shardings, shapes)


def to_device(arrays: Any) -> Any:
    """The same shards, in the memory of their devices; inside of a program, or outside."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if x.ndim else x, arrays)
