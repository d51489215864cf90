"""Options of XLA for the train step, per platform: what lets devices compute while they exchange.

They are options of one program and not XLA_FLAGS, of which one unknown name ends the process. Names come and go between
versions of XLA and libtpu, so each is tried on a program of one line before it is used.
"""

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

Value: TypeAlias = bool | int | float | str

LARGE = 1 << 30  # bytes: more than one layer of what devices exchange, so that a layer's parameters travel together

OPTIONS: Mapping[str, Mapping[str, Value]] = {
    # libtpu hides latencies and fuses collectives by itself: with its seven options for that, a step has the same ones.
    "tpu": {},
    # Of the step of a small model on 8 H200, a gather then runs beside 9 to 30 other kernels, and beside 1 to 17 without.
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_enable_pipelined_all_gather": True,
        "xla_gpu_enable_pipelined_reduce_scatter": True,
        "xla_gpu_enable_pipelined_all_reduce": True,
        "xla_gpu_enable_while_loop_double_buffering": True,
        "xla_gpu_all_gather_combine_threshold_bytes": LARGE,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": LARGE,
        "xla_gpu_all_reduce_combine_threshold_bytes": LARGE,
    },
}


@dataclass(frozen=True)
class Options:
    """Options for `jax.jit(compiler_options=)`, and what this version of the compiler does not take, with its reason."""

    accepted: Mapping[str, Value]
    refused: Mapping[str, str]


def options(platform: str, device: Any, *, extra: Mapping[str, str]) -> Options:
    """The options of a platform that the compiler of a device takes, attached or of a topology, and a user's own above them.

    An empty `extra` value takes an option out. Raises ValueError for one of `extra` that the compiler does not take.
    """
    ours = {name: value for name, value in OPTIONS.get(platform, {}).items() if name not in extra}
    reasons = {name: refusal(device, name, value) for name, value in ours.items()}
    accepted = {name: value for name, value in ours.items() if not reasons[name]}
    for name, text in extra.items():
        if text == "":
            continue
        value = parsed(text)
        if why := refusal(device, name, value):
            known = [option for of in OPTIONS.values() for option in of]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            raise ValueError(
                f"config.parallel.flags.{name}: {text!r} is not taken by the compiler for {device.device_kind}: {why}"
                + (
                    f"; did you mean {near[0]}?"
                    if near and near[0] != name
                    else "; leave it out, or give another value"
                )
            )
        accepted[name] = value
    return Options(accepted, {name: why for name, why in reasons.items() if why})


def device_of(mesh: Mesh) -> Any:
    """A device of a mesh that this process can compile a program for: one of its own, or any where none is attached."""
    devices = list(mesh.devices.flat)
    return next((device for device in devices if device.process_index == jax.process_index()), devices[0])


def parsed(text: str) -> Value:
    """true, 65536 and 0.5 as what they are: the compiler does not read all of them from text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@functools.lru_cache(maxsize=None, typed=True)  # True is another value than 1
def refusal(device: Any, name: str, value: Value) -> str:
    """Why the compiler of a device does not take an option; "" if it does."""
    x = jax.ShapeDtypeStruct((1,), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        _program(x).compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def _program(x: jax.ShapeDtypeStruct) -> Any:
    return jax.jit(lambda x: x + 1).lower(x)
