"""What every objective returns: sums over tokens, which add over micro-batches, devices and batches of an evaluation.

Only the step divides, once, so no mean of means can arise.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossSums:
    """`loss` / `weight` is the loss. `aux` holds more sums by name, scalars or one number per source, without gradient."""

    loss: jax.Array  # () float32
    weight: jax.Array  # () float32
    aux: dict[str, jax.Array]

    def __add__(self, other: "LossSums") -> "LossSums":
        return jax.tree.map(jnp.add, self, other)
