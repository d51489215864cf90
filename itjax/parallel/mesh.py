"""Sizes of axes to a mesh of devices: each axis splits something else.

`data` splits rows, `fsdp` splits rows and parameters, `expert` splits rows and experts, `context` splits the positions of a
row, `tensor` splits inside layers. Whatever talks most is innermost, where devices are nearest.

Devices come in islands: slices of TPUs, or nodes of GPUs, with a fast network inside and a slow one between. The outermost
axes go between islands: `data` first, as it talks once a step, then `fsdp`.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from itjax.base.schema import Parallel
from itjax.parallel import rings

AXES = ("data", "fsdp", "expert", "context", "tensor")
BETWEEN = ("data", "fsdp")  # axes that may go from one island to another


def sizes(parallel: Parallel, num_devices: int) -> dict[str, int]:
    """The size of every axis; -1 takes the devices that the others leave. Raises ValueError where they do not fit."""
    wanted = {axis: getattr(parallel, axis) for axis in AXES}
    fixed = math.prod(size for size in wanted.values() if size != -1)
    free = [axis for axis, size in wanted.items() if size == -1]
    if num_devices % fixed or (not free and fixed != num_devices):
        shape = " x ".join(f"{axis}={size}" for axis, size in wanted.items() if size != -1)
        raise ValueError(
            f"config.parallel: {shape} needs {'a multiple of ' if free else ''}{fixed} devices and there are {num_devices}; "
            f"set one axis to -1 to take what is left"
        )
    return {axis: num_devices // fixed if axis in free else size for axis, size in wanted.items()}


def mesh_for(parallel: Parallel, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices (or those given), with Auto axis types; devices that talk much are near each other."""
    devices = list(jax.devices() if devices is None else devices)
    wanted = sizes(parallel, len(devices))
    shape, kinds = tuple(wanted.values()), (AxisType.Auto,) * len(AXES)
    splits = {"allow_split_physical_axes": True}  # an axis of 4 on a torus of 8 x 8 x 8
    count = len(set(islands(devices)))
    if devices[0].platform == "cpu":
        array = np.array(devices).reshape(shape)
    elif count == 1:
        array = mesh_utils.create_device_mesh(shape, devices, **splits)
    else:
        between = shared_out(wanted, count)
        inside = [size // between[axis] for axis, size in wanted.items()]
        by_process = _processes_are_islands(devices)
        array = mesh_utils.create_hybrid_device_mesh(
            inside, list(between.values()), devices, process_is_granule=by_process, **splits
        )
    mesh = Mesh(array, AXES, axis_types=kinds)
    rings.learn(mesh)  # also where there are none: a mesh of this shape may have been of TPUs before
    return mesh


def islands(devices: Sequence[jax.Device]) -> list[int]:
    """Of each device, the number of its island: its slice, or where GPUs tell of none, the process that has it."""
    if _processes_are_islands(devices):
        return [device.process_index for device in devices]
    return [getattr(device, "slice_index", None) or 0 for device in devices]


def _processes_are_islands(devices: Sequence[jax.Device]) -> bool:
    """Whether devices are GPUs that tell of one slice only, several in each process: then a process is a node."""
    is_told = len({getattr(device, "slice_index", None) for device in devices}) > 1
    return devices[0].platform == "gpu" and not is_told and len({d.process_index for d in devices}) < len(devices)


def shared_out(wanted: Mapping[str, int], count: int) -> dict[str, int]:
    """Over how many of `count` islands each axis goes. Raises ValueError where axes that stay inside are too large.

    data 4, fsdp 16, tensor 2 over 8 islands    ->    data 4, fsdp 2, tensor 1
    """
    left, between = count, dict.fromkeys(wanted, 1)
    for axis in BETWEEN:
        between[axis] = math.gcd(left, wanted[axis])
        left //= between[axis]
    if left > 1:
        words = " x ".join(f"{axis}={wanted[axis]}" for axis in BETWEEN)
        raise ValueError(
            f"config.parallel: {count} slices or nodes have to be a part of {words}, as the other axes would go through the "
            f"slow network between them; make data or fsdp a multiple of {count}"
        )
    return between
