"""Sizes of axes to a mesh, and which rows a process holds."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from itjax.base.schema import Parallel
from itjax.parallel import layout
from itjax.parallel.mesh import islands, mesh_for, shared_out, sizes


def test_minus_one_takes_what_is_left():
    assert sizes(Parallel(data=-1, fsdp=2, tensor=2), 8) == {
        "data": 2,
        "fsdp": 2,
        "expert": 1,
        "context": 1,
        "tensor": 2,
    }
    assert sizes(Parallel(data=1, fsdp=2, expert=-1), 8) == {
        "data": 1,
        "fsdp": 2,
        "expert": 4,
        "context": 1,
        "tensor": 1,
    }


@pytest.mark.parametrize("parallel", [Parallel(data=-1, fsdp=3), Parallel(data=2, fsdp=2, tensor=1)])
def test_sizes_that_do_not_fit_the_devices_are_an_error(parallel):
    with pytest.raises(ValueError, match=r"config.parallel: .* there are 8"):
        sizes(parallel, 8)


def test_one_process_holds_every_row():
    mesh = mesh_for(Parallel(data=2, fsdp=2, tensor=2))
    assert layout.batch_copies(mesh, 8) == 1
    assert layout.local_rows(mesh, 8) == list(range(8))


def test_rows_that_the_devices_do_not_divide_are_computed_by_several():
    assert layout.batch_copies(mesh_for(Parallel(data=8)), 4) == 8
    assert layout.batch_copies(mesh_for(Parallel(data=4, fsdp=2)), 4) == 2


def test_rows_are_split_over_the_axis_of_experts_too():
    mesh = mesh_for(Parallel(data=2, expert=4))
    assert layout.batch_sharding(mesh, 8, 16).shard_shape((8, 16)) == (1, 16)


@pytest.mark.parametrize("parallel", [Parallel(data=2, context=4), Parallel(data=1, fsdp=2, context=2, tensor=2)])
def test_devices_have_their_part_of_every_row(parallel):
    batch = layout.batch_shapes(mesh_for(parallel), rows=8, length=64)
    (rows, length) = batch.tokens_BT.sharding.shard_shape((8, 64))
    assert (8 // rows, 64 // length) == (parallel.data * parallel.fsdp, parallel.context)
    assert batch.weights_BT.dtype == np.float32


# --- islands of devices ---


def gpus(nodes: int, each: int, *, slices: bool = False, together: bool = True):
    """GPUs as jax tells of them: of one process per node or per GPU, that know their node as their slice or not."""
    return [
        SimpleNamespace(
            platform="gpu",
            slice_index=node if slices else 0,
            process_index=node if together else node * each + number,
        )
        for node in range(nodes)
        for number in range(each)
    ]


def test_slices_are_islands_or_else_nodes():
    assert islands(gpus(2, 2, slices=True, together=False)) == [0, 0, 1, 1]
    assert islands(gpus(2, 2)) == [0, 0, 1, 1]
    assert islands(gpus(1, 4, together=False)) == [0, 0, 0, 0]  # processes of one GPU each, on one node
    assert islands(jax.devices()) == [0] * 8


def test_the_outermost_axes_go_between_islands():
    wanted = {"data": 4, "fsdp": 16, "expert": 1, "context": 1, "tensor": 2}
    assert shared_out(wanted, 8) == {"data": 4, "fsdp": 2, "expert": 1, "context": 1, "tensor": 1}
    assert shared_out(wanted, 1) == dict.fromkeys(wanted, 1)


def test_what_talks_in_every_layer_stays_inside_of_an_island():
    wanted = {"data": 2, "fsdp": 1, "expert": 1, "context": 1, "tensor": 16}
    with pytest.raises(ValueError, match=r"config.parallel: 4 slices .* data=2 x fsdp=1, .* multiple of 4"):
        shared_out(wanted, 4)
