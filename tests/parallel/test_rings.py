"""Groups along an axis, by where devices are, and what goes through them."""

import jax
import numpy as np
import pytest

from itjax.base.schema import Parallel
from itjax.parallel import exchange, layout, rings
from itjax.parallel.mesh import mesh_for


@pytest.mark.parametrize(
    "places, sizes",
    [
        ([(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)], (3, 2)),
        ([(0, y) for y in range(4)], (4,)),
        ([(x, y, z) for x in range(2) for y in range(4) for z in range(4)], (2, 4, 4)),
        ([(0, 0), (0, 1), (1, 1), (1, 0)], (2, 2)),  # a snake: the groups are as long
        ([(0, 0), (1, 1), (2, 2), (3, 3)], (4,)),
    ],
)
def test_digits_go_in_one_direction_each(places, sizes):
    assert rings.digits(places) == sizes


@pytest.mark.parametrize("ways", [(8,), (2, 4), (2, 2, 2)])
def test_digit_by_digit_it_is_the_same(monkeypatch, ways):
    mesh = mesh_for(Parallel(data=1, fsdp=8))
    monkeypatch.setitem(rings._SIZES, tuple(mesh.shape.items()), {"fsdp": ways})
    names, x = jax.P("embed", "ffn"), np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
    mix = np.random.default_rng(1).normal(size=(8, 32, 6)).astype(np.float32)

    def total(x, mix):
        def on_device(mix, x):
            whole = exchange.gather(x, names, x_shape, keep=("ffn",), dtypes=np.float32)
            return (whole[None] * mix).sum(keepdims=True)

        return layout.per_device(on_device, mix, x, names=(jax.P("batch", None, None), names), everywhere=False).sum()

    x_shape = x.shape
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, layout.shardings(names, mesh, x))
        grad = jax.jit(jax.grad(total))(placed, jax.device_put(mix, layout.shardings(jax.P("batch"), mesh, mix)))
    np.testing.assert_allclose(grad, mix.sum(axis=0), atol=1e-5)
