"""Attention on a mesh reads what one device reads, whichever way rows, positions and heads are shared."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itjax.base.schema import Parallel
from itjax.kernels import attention, plain
from itjax.kernels.attention import Case, Implementation, Scores
from itjax.models import attending
from itjax.parallel import stripes
from itjax.parallel.mesh import mesh_for

B, T, H = 4, 64, 8
SCORES = Scores(H**-0.5, window=20)
SEGMENTS_BT = np.sort(np.random.default_rng(1).integers(1, 4, (B, T)), axis=1).astype(np.int32)
SEGMENTS_BT[:, T - 6 :] = 0

WHOLE_ROWS = Implementation(
    plain.reference, lambda case: "" if case.parts == 1 else "it wants whole rows; take fewer devices", ("cpu",)
)
with_one_of_whole_rows = mock.patch.dict(attention.IMPLEMENTATIONS, {"whole_rows": WHOLE_ROWS})


def inputs(heads: int, kv_heads: int):
    rng = np.random.default_rng(0)
    shapes = [(B, T, n, H) for n in (heads, kv_heads, kv_heads)] + [(heads,), (B, T, heads, H)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def value_and_grads(wanted, heads, kv_heads):
    q, k, v, sinks, mix = inputs(heads, kv_heads)

    def total(arrays):
        q, k, v, sinks = arrays
        striped = [stripes.striped(x) for x in (q, k, v, jnp.asarray(SEGMENTS_BT))]
        o = attending.attend(*striped, sinks, wanted=wanted, platform="cpu", scores=SCORES)
        return (stripes.natural(o) * mix).sum()

    return jax.jit(jax.value_and_grad(total))((q, k, v, sinks))


@with_one_of_whole_rows
@pytest.mark.parametrize("wanted", ["reference", "blockwise", "whole_rows"])
@pytest.mark.parametrize(
    "parallel, heads, kv_heads",
    [
        (Parallel(data=2, context=4), 4, 2),
        (Parallel(data=1, fsdp=2, context=2, tensor=2), 4, 4),
        (Parallel(data=1, context=2, tensor=4), 8, 2),  # one key head for the two query heads of a device
        (Parallel(data=1, fsdp=2, tensor=4), 12, 3),  # the three query heads of a device read keys of two heads
    ],
)
def test_every_mesh_reads_the_same(wanted, parallel, heads, kv_heads):
    expected, slopes = value_and_grads("reference", heads, kv_heads)
    with jax.set_mesh(mesh_for(parallel)):
        value, grads = value_and_grads(wanted, heads, kv_heads)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for grad, slope in zip(grads, slopes, strict=True):
        np.testing.assert_allclose(grad, slope, atol=2e-5)


def case(**changes):
    plain_one = Case("cpu", T, heads=8, kv_heads=2, head_size=H, dtype="float32", scores=SCORES)
    return plain_one._replace(**changes)


def test_devices_exchange_positions_for_heads_where_both_divide():
    assert attending.of_whole_rows(case(parts=2)) == case(heads=4, kv_heads=1)
    assert attending.of_whole_rows(case(parts=8)) == case(heads=1, kv_heads=1)
    assert attending.of_whole_rows(case(parts=16)) is None
    assert attending.of_whole_rows(case(parts=3)) is None
    assert attending.of_whole_rows(case()) is None


@with_one_of_whole_rows
def test_an_implementation_of_whole_rows_is_used_by_heads_or_refused():
    assert attending.choose("whole_rows", case(parts=4)) == attending.Way("whole_rows", by_heads=True)
    assert attending.choose("blockwise", case(parts=4)) == attending.Way("blockwise", by_heads=False)
    with pytest.raises(ValueError, match=r"config.attention: whole_rows: it wants whole rows; .*possible here: auto"):
        attending.choose("whole_rows", case(parts=3))


def test_a_device_groups_the_heads_that_it_has():
    with jax.set_mesh(mesh_for(Parallel(data=1, fsdp=2, tensor=4))):
        three = attending.on_device_case("cpu", T, (12, 3), H, "float32", SCORES, sinks=False)
        two = attending.on_device_case("cpu", T, (8, 2), H, "float32", SCORES, sinks=False)
    assert (three.heads, three.kv_heads) == (3, 3)
    assert (two.heads, two.kv_heads) == (2, 1)


def test_nothing_is_read_across_segments():
    q, k, v, sinks, _ = inputs(4, 2)
    parallel = Parallel(data=2, context=4)

    def read(k, v):
        striped = [stripes.striped(jnp.asarray(x)) for x in (q, k, v, SEGMENTS_BT)]
        return stripes.natural(attending.attend(*striped, sinks, wanted="auto", platform="cpu", scores=SCORES))

    first_BT11 = (SEGMENTS_BT == 1)[..., None, None]
    with jax.set_mesh(mesh_for(parallel)):
        apart = np.asarray(jax.jit(read)(k, v)) - np.asarray(jax.jit(read)(k + first_BT11, v + first_BT11))
    assert np.abs(apart[SEGMENTS_BT == 1]).max() > 0.1
    assert np.abs(apart[SEGMENTS_BT != 1]).max() == 0
