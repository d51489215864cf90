"""Stripes of a row: which positions a device has, and that every device has as much to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itjax.base.schema import Parallel
from itjax.kernels.case import Stripes
from itjax.parallel import layout, stripes
from itjax.parallel.mesh import mesh_for


def on_mesh(parallel, function, *arrays):
    mesh = mesh_for(parallel)
    with jax.set_mesh(mesh):
        return jax.jit(function)(*(jax.device_put(x, layout.batch_sharding(mesh, *x.shape)) for x in arrays))


def rows(length):
    return np.arange(2 * length, dtype=np.int32).reshape(2, length)


def test_a_device_has_every_so_many_stripes():
    got = on_mesh(Parallel(data=2, context=4), stripes.striped, rows(32))
    assert got[0].tolist() == [
        *(0, 1, 14, 15, 16, 17, 30, 31),
        *(2, 3, 12, 13, 18, 19, 28, 29),
        *(4, 5, 10, 11, 20, 21, 26, 27),
        *(6, 7, 8, 9, 22, 23, 24, 25),
    ]
    assert got.sharding.shard_shape(got.shape) == (1, 8)


@pytest.mark.parametrize("context, length", [(1, 7), (2, 36), (4, 48), (4, 64), (8, 128)])
def test_natural_is_the_inverse(context, length):
    parallel = Parallel(data=-1, context=context)
    back = on_mesh(parallel, lambda x: stripes.natural(stripes.striped(x)), rows(length))
    np.testing.assert_array_equal(back, rows(length))


def test_kernels_know_the_positions_by_the_same_order():
    parallel = Parallel(data=2, context=4)
    got = np.asarray(on_mesh(parallel, stripes.striped, rows(64)))[0].reshape(4, 16)
    mesh = mesh_for(parallel)
    with jax.set_mesh(mesh):
        cut = stripes.cut(64)
    for part in range(4):
        own = Stripes(part, cut.parts, cut.size)
        np.testing.assert_array_equal(own.places_Q(16), got[part])
        np.testing.assert_array_equal(own.all_places_PQ(64)[part], got[part])


def test_whole_rows_in_the_order_of_stripes_come_into_order():
    cut = stripes.Cut(("context",), 4, 2)
    striped = on_mesh(Parallel(data=2, context=4), stripes.striped, rows(32))
    np.testing.assert_array_equal(stripes.in_order(jnp.asarray(striped), cut), rows(32))
    np.testing.assert_array_equal(stripes.in_stripes(jnp.asarray(rows(32)), cut), striped)


def test_a_length_that_stripes_cannot_share_is_an_error_with_the_next_one_that_they_can():
    with (
        jax.set_mesh(mesh_for(Parallel(data=2, context=4))),
        pytest.raises(ValueError, match=r"config.length: 40 .*parallel.context 4,.* 16; the next one is 48"),
    ):
        stripes.cut(40)


@pytest.mark.parametrize("context", [4, 8])
@pytest.mark.parametrize(
    "lengths, most", [([32768], 1.001), ([16000, 9, 9000, 700, 7000], 1.15), ([2100] * 15, 1.45), ([130] * 250, 1.01)]
)
def test_parts_have_as_many_scores_whatever_is_packed(lengths, most, context):
    """Contiguous quarters of one document would have 7 times as much in the last one as in the first.

    Documents of a few stripes each are the worst, and cost a model of 8B parameters 1 % of its work.
    """
    scores_T = np.zeros(32768, int)  # of a query: how many keys it sees
    seen = np.concatenate([np.arange(1, length + 1) for length in lengths])
    scores_T[: len(seen)] = seen
    with jax.set_mesh(mesh_for(Parallel(data=-1, context=context))):
        cut = stripes.cut(32768)
    work = scores_T[Stripes(0, cut.parts, cut.size).all_places_PQ(32768)].sum(axis=1)
    assert work.max() / work.mean() < most


@pytest.mark.parametrize("longest", [1, 2, 512])
def test_gradients_find_their_way_back(monkeypatch, longest):
    """Of short stripes a device gives several to each other."""
    monkeypatch.setattr(stripes, "LONGEST", longest)
    x, mix = (np.random.default_rng(seed).normal(size=(2, 64)).astype(np.float32) for seed in (0, 1))

    def total(x, mix):
        return (stripes.natural(jnp.sin(stripes.striped(x))) * mix).sum()

    grad = on_mesh(Parallel(data=2, context=4), jax.grad(total), x, mix)
    np.testing.assert_allclose(grad, np.cos(x) * mix, atol=1e-6)
