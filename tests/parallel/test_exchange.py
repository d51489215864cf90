"""What devices give each other by our own instructions is what one device would have made."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itjax.base.schema import Parallel
from itjax.parallel import exchange, layout
from itjax.parallel.mesh import mesh_for

B, T, V, D = 8, 16, 24, 32
RNG = np.random.default_rng(0)
TABLE_VD = RNG.normal(size=(V, D)).astype(np.float32)
TOKENS_BT = RNG.integers(0, V, (B, T)).astype(np.int32)
MIX_BTD = RNG.normal(size=(B, T, D)).astype(np.float32)

MESHES = [
    Parallel(data=8),
    Parallel(data=1, fsdp=8),
    Parallel(data=2, fsdp=2, expert=2),
    Parallel(data=1, fsdp=2, expert=2, context=2),
    Parallel(data=1, fsdp=2, context=2, tensor=2),
]


def words(parallel):
    return "-".join(f"{axis}{size}" for axis, size in vars(parallel).items() if isinstance(size, int) and size > 1)


each_mesh = pytest.mark.parametrize("parallel", MESHES, ids=words)


def placed(mesh, x, *names):
    return jax.device_put(x, layout.shardings(jax.P(*names), mesh, x))


def looked_up(parallel, tokens_BT=TOKENS_BT):
    """Vectors, the gradient of Σ vectors·mix by the table, and the program that makes both."""
    mesh = mesh_for(parallel)
    mix_BTD = MIX_BTD[: len(tokens_BT), : tokens_BT.shape[1]]

    @jax.jit
    def both(table_VD, tokens_BT, mix_BTD):
        x_BTD, pull = jax.vjp(lambda table_VD: exchange.look_up(table_VD, tokens_BT, dtype="float32"), table_VD)
        return x_BTD, layout.pin(pull(mix_BTD)[0], "vocab", "embed")

    with jax.set_mesh(mesh):
        arrays = (
            placed(mesh, TABLE_VD, "vocab", "embed"),
            placed(mesh, tokens_BT, "batch", "length"),
            placed(mesh, mix_BTD, "batch", "length", None),
        )
        return *both(*arrays), both.lower(*arrays).compile().as_text()


def gradient(tokens_BT):
    total_VD = np.zeros((V, D))
    np.add.at(total_VD, tokens_BT, MIX_BTD[: len(tokens_BT), : tokens_BT.shape[1]])
    return total_VD


@each_mesh
def test_vectors_are_those_of_the_tokens_and_gradients_add_up(parallel):
    x_BTD, grad_VD, program = looked_up(parallel)
    np.testing.assert_array_equal(x_BTD, TABLE_VD[TOKENS_BT])
    np.testing.assert_allclose(grad_VD, gradient(TOKENS_BT), atol=1e-5)
    if parallel.data == 1:
        whole = f"[{V},{D}]"
        assert not re.search(rf"f32\{whole[:-1]}\]\S* (all-gather|all-reduce)\(", program), (
            "the table stays where it is"
        )


def test_one_token_for_each_row_is_looked_up_too():
    tokens_BT = TOKENS_BT[:3, :1]
    x_BTD, grad_VD, _ = looked_up(Parallel(data=1, fsdp=4, context=2), tokens_BT)
    np.testing.assert_array_equal(x_BTD, TABLE_VD[tokens_BT])
    np.testing.assert_allclose(grad_VD, gradient(tokens_BT), atol=1e-5)


@each_mesh
def test_sums_of_shards_are_scattered_to_who_keeps_them(parallel):
    mesh = mesh_for(parallel)
    shards = parallel.data * parallel.fsdp * parallel.expert * parallel.context
    x_SVD = RNG.normal(size=(shards, V, D)).astype(np.float32)
    add = jax.jit(lambda x_SVD: exchange.added(x_SVD, "vocab", "embed"))
    with jax.set_mesh(mesh):
        x = placed(mesh, x_SVD, "shards", "vocab", None)
        total_VD, program = add(x), add.lower(x).compile().as_text()
    np.testing.assert_allclose(total_VD, x_SVD.sum(axis=0), atol=1e-5)
    assert total_VD.sharding.is_equivalent_to(layout.shardings(jax.P("vocab", "embed"), mesh, total_VD), 2)
    assert ("reduce-scatter" in program) == (shards > parallel.data)


def test_without_a_mesh_they_are_plain():
    np.testing.assert_array_equal(exchange.look_up(TABLE_VD, TOKENS_BT, dtype="float32"), TABLE_VD[TOKENS_BT])
    np.testing.assert_array_equal(exchange.added(jnp.ones((1, V, D)), "vocab", "embed"), np.ones((V, D)))
