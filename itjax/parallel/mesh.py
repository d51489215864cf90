"""Sizes of axes to a mesh of devices: each axis splits something else.

`data` splits rows, `fsdp` splits rows and parameters, `expert` splits rows and experts, `tensor` splits inside layers.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from itjax.base.schema import Parallel

AXES = ("data", "fsdp", "expert", "context", "tensor")


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
    """A mesh over all devices (or those given), neighbours on the innermost axis, with Auto axis types."""
    devices = list(jax.devices() if devices is None else devices)
    shape = tuple(sizes(parallel, len(devices)).values())
    kinds = (AxisType.Auto,) * len(AXES)
    if devices[0].platform == "cpu":
        return Mesh(np.array(devices).reshape(shape), AXES, axis_types=kinds)
    return jax.make_mesh(shape, AXES, devices=devices, axis_types=kinds)
