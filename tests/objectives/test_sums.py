"""Sums add; nothing is divided on the way."""

import jax
import jax.numpy as jnp

from itjax.objectives.sums import LossSums


def test_sums_add_in_every_part():
    a = LossSums(jnp.float32(2), jnp.float32(1), {"correct": jnp.float32(1), "source_loss": jnp.array([2.0, 0.0])})
    b = LossSums(jnp.float32(9), jnp.float32(3), {"correct": jnp.float32(0), "source_loss": jnp.array([4.0, 5.0])})
    total = a + b
    assert (float(total.loss), float(total.weight), float(total.aux["correct"])) == (11, 4, 1)
    assert total.aux["source_loss"].tolist() == [6, 5]


def test_sums_are_a_tree():
    sums = LossSums(jnp.float32(2), jnp.float32(1), {"correct": jnp.float32(1)})
    assert len(jax.tree.leaves(sums)) == 3
    assert isinstance(jax.tree.map(lambda x: 2 * x, sums), LossSums)
