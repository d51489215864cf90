"""Sizes of axes to a mesh, and which rows a process holds."""

import pytest

from itjax.base.schema import Parallel
from itjax.parallel import layout
from itjax.parallel.mesh import mesh_for, sizes


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
