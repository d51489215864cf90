"""Devices that are not here: "v5p:4x4x4" or "h100:16x8" to something a mesh is made of and programs are compiled for.

    v5e:16x16      256 chips of one slice          h200:8       one node of 8 GPUs
    2*v5e:16x16    two such slices                 h100:16x8    16 nodes of 8
    v5p:4x4x4      64 chips, a cube                cpu:8        fake devices of this machine

Compilers come in wheels that need no device: libtpu for TPUs, the CUDA plugin of jax for GPUs.
"""

import difflib
import importlib.metadata
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from itjax.base.chips import CHIPS, Chip

# Shapes of one slice that can be had: https://docs.cloud.google.com/tpu/docs/v5e, .../v6e, .../v4, .../v5p, .../tpu7x
FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
SMALL_CUBES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # larger ones are made of cubes of 4x4x4
PODS = {"v4": 4096, "v5p": 8960, "v7x": 9216}  # chips
LIBTPU_NAMES = {"v7x": "tpu7x"}  # where libtpu has another word
MEGACORE = ("v4",)  # chips of two cores that are one device only if libtpu is told so
# For a libtpu that drives nothing: it asks no metadata server (only Google's machines have one), says nothing about what it
# could not find, and shares the machine with others of its kind.
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
NODE = 8  # GPUs that NVLink joins, in the systems of base/chips.py


@dataclass(frozen=True)
class Target:
    """Devices to compile for. Several slices of TPUs, or nodes of GPUs, are joined by the slower network."""

    name: str  # as asked for: "2*v5e:16x16"
    chip: Chip
    devices: tuple[Any, ...]  # jax devices: compile-only ones, or fake CPU devices
    shape: tuple[int, ...]  # of one slice in chips, or of one node
    slices: int  # of TPUs, or nodes of GPUs

    @property
    def chips(self) -> int:
        """How many are rented."""
        return math.prod(self.shape) * self.slices

    @property
    def link(self) -> float | None:
        """Bytes/s that the worst placed device can receive from others of its slice or node, all its links together.

        0 where it is alone.
        Of a torus: two links per dimension that wraps around, one where the slice ends (the corner's), none where it is flat.
        """
        if self.chip.links is None or self.chip.link is None:
            return self.chip.link and self.chip.link * (self.shape[0] > 1)
        links = sum(0 if size == 1 else 2 if wraps else 1 for size, wraps in zip(self.shape, self.wraps, strict=True))
        return self.chip.link / self.chip.links * links

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Which dimensions of a slice of TPUs are rings: 16 of a flat one, all those made of whole cubes.

        Source: https://jax-ml.github.io/scaling-book/tpus
        """
        if len(self.shape) == 2:
            return tuple(size == 16 for size in self.shape)
        return (all(size % 4 == 0 for size in self.shape),) * len(self.shape)


@dataclass(frozen=True)
class Asked:
    """A text, understood."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int


def prepare(text: str) -> None:
    """Sets the environment for `target(text)`, before jax starts a backend: nothing here is looked for or waited for."""
    asked = parse(text)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # of libraries that running would need and compiling does not
    os.environ.update(ALONE)
    jax.config.update("jax_platforms", "cpu")  # jax has read its variable when it was imported
    if asked.chip.platform == "cpu":
        count = f"--xla_force_host_platform_device_count={asked.shape[0]}"
        others = re.sub(r"--xla_force_host_platform_device_count=\S*", "", os.environ.get("XLA_FLAGS", ""))
        os.environ["XLA_FLAGS"] = f"{others} {count}".strip()


def parse(text: str) -> Asked:
    """Raises ValueError that says what is possible where a text names no devices."""
    found = re.fullmatch(r"(?:(\d+)\*)?([a-z]\w*):(\d+(?:x\d+)*)", text.strip().lower())
    if not found:
        raise ValueError(
            f"--devices={text}: say chip:shape, as in v5e:16x16, v5p:4x4x4, 2*v6e:16x16 (slices), h200:8, h100:16x8 "
            "(nodes x GPUs) or cpu:8"
        )
    slices, name, numbers = int(found[1] or 1), found[2], tuple(int(size) for size in found[3].split("x"))
    if name not in CHIPS:
        near = difflib.get_close_matches(name, CHIPS, n=1, cutoff=0.4)
        raise ValueError(
            f"--devices={text}: chip {name!r} is unknown"
            + (f"; did you mean {near[0]!r}?" if near else "")
            + f" Known: {', '.join(CHIPS)}"
        )
    if 0 in (slices, *numbers):
        raise ValueError(f"--devices={text}: no devices; every number is 1 or more")
    chip = CHIPS[name]
    if chip.platform == "tpu":
        return Asked(chip, _slice(text, chip, numbers), slices)
    if found[1]:
        raise ValueError(f"--devices={text}: {name} comes in nodes, not slices; say {name}:{slices}x{NODE}")
    if chip.platform == "cpu":
        if len(numbers) > 1:
            raise ValueError(f"--devices={text}: say how many, as in cpu:{math.prod(numbers)}")
        return Asked(chip, numbers, 1)
    nodes, per_node = numbers if len(numbers) == 2 else (1, *numbers[:1])
    if len(numbers) > 2 or per_node > NODE:
        raise ValueError(
            f"--devices={text}: nodes have up to {NODE} GPUs; say {name}:{NODE}, or {name}:NODESx{NODE} for several"
        )
    return Asked(chip, (per_node,), nodes)


def _slice(text: str, chip: Chip, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that slices of this chip come in."""
    if chip.links == 4:
        possible = shape in FLAT
        shapes = ", ".join("x".join(map(str, flat)) for flat in FLAT)
    else:
        cubes = len(shape) == 3 and all(size % 4 == 0 for size in shape) and math.prod(shape) <= PODS[chip.name]
        possible = shape in SMALL_CUBES or (cubes and shape == tuple(sorted(shape)))
        shapes = ", ".join("x".join(map(str, small)) for small in SMALL_CUBES)
        shapes += (
            f" and AxBxC with A <= B <= C, multiples of 4, up to {PODS[chip.name]} chips: 4x4x4, 4x4x8, 8x8x8, ..."
        )
    if not possible:
        raise ValueError(
            f"--devices={text}: {chip.name} has no slice of {'x'.join(map(str, shape))}; there are {shapes}"
        )
    return shape


def target(text: str) -> Target:
    """The devices that a text names. Raises ValueError where it names none, or where what compiles for them is missing."""
    asked = parse(text)
    devices = {"tpu": _tpus, "gpu": _gpus, "cpu": _cpus}[asked.chip.platform](text, asked)
    return Target(text, asked.chip, tuple(devices), asked.shape, asked.slices)


def _cpus(text: str, asked: Asked) -> list[Any]:
    devices = jax.devices("cpu")
    if len(devices) < asked.shape[0]:
        raise ValueError(
            f"--devices={text}: jax has started with {len(devices)} CPU devices in this process; call topology.prepare "
            f"before anything asks jax for devices, or set XLA_FLAGS=--xla_force_host_platform_device_count={asked.shape[0]}"
        )
    return devices[: asked.shape[0]]


def _tpus(text: str, asked: Asked) -> list[Any]:
    name = LIBTPU_NAMES.get(asked.chip.name, asked.chip.name) + ":" + "x".join(map(str, asked.shape))
    options: dict[str, Any] = {"num_slices": asked.slices} if asked.slices > 1 else {}
    if asked.chip.name in MEGACORE:
        options["chip_config_name"] = "megacore"
    if math.prod(asked.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except RuntimeError as error:  # jax's own errors are RuntimeErrors, too
        if "not installed" in str(error):
            raise ValueError(
                f"--devices={text}: libtpu, which compiles for TPUs, is not installed; pip install '{_libtpu()}'"
            ) from error
        raise ValueError(f"--devices={text}: libtpu {_version('libtpu')} refuses it: {error}") from error


def _gpus(text: str, asked: Asked) -> list[Any]:
    try:
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name=asked.chip.name,
            topology=f"{asked.slices}x1x{asked.shape[0]}",
            target_config=target_config(asked.chip),
        ).devices
    except NotImplementedError as error:
        version = _version("jaxlib")
        raise ValueError(
            f"--devices={text}: jax's CUDA plugin, which compiles for GPUs, is not installed; "
            f"pip install jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}"
        ) from error
    except RuntimeError as error:
        raise ValueError(
            f"--devices={text}: the CUDA plugin refuses it: {error}. Its version must be jaxlib's: jax-cuda13-plugin "
            f"{_version('jax-cuda13-plugin')}, jaxlib {_version('jaxlib')}"
        ) from error


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _libtpu() -> str:
    """The libtpu that the installed jax asks for."""
    wanted = (line.split(";")[0].strip() for line in importlib.metadata.requires("jax") or ())
    return next((line for line in wanted if line.startswith("libtpu")), "libtpu")


def target_config(chip: Chip) -> str:
    """A GPU as XLA's compiler wants it described: the text of a stream_executor.GpuTargetConfigProto.

    What is written as a number here is the same for every GPU of compute capability 8.0 to 10.0: table "Technical
    Specifications per Compute Capability" of https://docs.nvidia.com/cuda/cuda-c-programming-guide. Versions are of CUDA and
    cuDNN as jax's wheels bring them along.
    """
    silicon = chip.silicon
    if silicon is None:
        raise ValueError(f"--devices={chip.name}: what XLA needs to know to compile for it is not in base/chips.py")
    extension = "ACCELERATED_FEATURES" if silicon.accelerated else "NONE"
    return f"""
        gpu_device_info {{
          name: "{chip.kinds[0]}"
          device_vendor: "NVIDIA Corporation"
          cuda_compute_capability {{ major: {silicon.capability} feature_extension: {extension} }}
          core_count: {silicon.cores}
          fpus_per_core: {silicon.lanes}
          clock_rate_ghz: {silicon.clock}
          memory_bandwidth: {round(chip.bandwidth or 0)}
          device_memory_size: {chip.memory}
          l2_cache_size: {silicon.cache}
          shared_memory_per_core: {silicon.shared}
          shared_memory_per_block_optin: {silicon.shared_block}
          shared_memory_per_block: 49152
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          threads_per_core_limit: 2048
          threads_per_block_limit: 1024
          threads_per_warp: 32
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
          dnn_version: "9.10.0"
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        device_description_str: "{chip.kinds[0]}"
    """
