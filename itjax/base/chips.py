"""What accelerators can do, by public numbers: peak FLOP/s, memory, and how fast bytes travel.

One entry is one of jax's devices: half a chip where a chip is two of them. Rates are per second and peaks, so that what is
computed from them bounds a time from below. A number nobody published is None.
"""

from dataclasses import dataclass
from types import MappingProxyType

GB = 10**9
GiB = 2**30

# Share of a GPU's memory that jax takes for programs unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
# https://docs.jax.dev/en/latest/gpu_memory_allocation.html
MEM_FRACTION = 0.75


@dataclass(frozen=True)
class Silicon:
    """What XLA needs to know of a GPU to compile for it; limits that all of these have are in parallel/topology.py.

    Sources: tables 3 and 4 of NVIDIA's H100 white paper for Ampere and Hopper; the CUDA programming guide's technical
    specifications per compute capability; L2 caches and clocks as the CUDA driver reports them, in
    https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config/specs
    """

    capability: int  # major compute capability
    accelerated: bool  # whether it has instructions of its own kind alone: sm_90a, sm_100a
    cores: int  # streaming multiprocessors
    lanes: int  # float32 units of each
    clock: float  # GHz, boost
    shared: int  # bytes of shared memory of a core, all blocks together
    shared_block: int  # bytes of it that one block can ask for
    cache: int  # bytes of L2


@dataclass(frozen=True)
class Chip:
    """One kind of device, and where its numbers are from."""

    name: str  # as in --devices
    kinds: tuple[str, ...]  # what jax calls it: `device_kind`
    platform: str  # "tpu", "gpu", "cpu"
    flops: float | None  # dense bf16 products, FLOP/s
    flops_8bit: float | None  # dense products of 8 bits, FLOP/s: fp8 where there is fp8, else int8
    memory: int | None  # bytes
    bandwidth: float | None  # of its memory, bytes/s
    link: float | None  # to devices of the same slice (ICI) or node (NVLink): bytes/s it sends, all links together
    links: int | None  # of a TPU: how many those are, two per dimension of the torus
    network: float | None  # between slices or nodes, bytes/s it sends: its share of the host's, or its own card's
    host_link: float | None  # to the host's memory, bytes/s in one direction
    per_chip: int  # devices that are rented together as one
    source: str
    silicon: Silicon | None = None  # of a GPU that can be compiled for without one

    def limit(self, fraction: float = MEM_FRACTION) -> int | None:
        """Bytes that a program can have: of a GPU the share that jax takes, of a TPU all that libtpu leaves."""
        return int(self.memory * fraction) if self.memory and self.platform == "gpu" else self.memory


CLOUD = "https://docs.cloud.google.com/tpu/docs"
BOOK = "https://jax-ml.github.io/scaling-book"
SPECS = "https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config/specs"


def _tpu(name: str, kinds: tuple[str, ...], page: str, **numbers) -> Chip:
    """`memory` is what libtpu 0.0.42 to 0.0.50 compiles against, a little less than the chip has."""
    source = f"{CLOUD}/{page}; network and host_link: {BOOK}/tpus; memory: libtpu's message when a program exceeds it"
    return Chip(name=name, kinds=kinds, platform="tpu", source=source, **{"per_chip": 1, **numbers})


def _gpu(name: str, kinds: tuple[str, ...], page: str, **numbers) -> Chip:
    """`memory` is what the driver reports; `network` is a card of its own for every GPU, as in NVIDIA's DGX systems."""
    source = f"https://www.nvidia.com/en-us/data-center/{page}; link: {BOOK}/gpus; memory and silicon: {SPECS}"
    return Chip(name=name, kinds=kinds, platform="gpu", links=None, per_chip=1, source=source, **numbers)


_A100 = Silicon(
    capability=8, accelerated=False, cores=108, lanes=64, clock=1.41, shared=167936, shared_block=166912, cache=40 << 20
)
_HOPPER = Silicon(
    capability=9, accelerated=True, cores=132, lanes=128, clock=1.98, shared=233472, shared_block=232448, cache=50 << 20
)
_B200 = Silicon(
    capability=10, accelerated=True, cores=148, lanes=128, clock=1.965, shared=233472, shared_block=232448,
    cache=132644864,
)  # fmt: skip

_TABLE = (
    _tpu(
        "v4", ("TPU v4",), "v4", flops=275e12, flops_8bit=275e12, memory=int(30.75 * GiB), bandwidth=1200 * GB,
        link=6 * 45 * GB, links=6, network=6.25 * GB, host_link=16 * GB,  # link: the book, Google's page has none
    ),
    _tpu(
        "v5e", ("TPU v5 lite", "TPU v5e"), "v5e", flops=197e12, flops_8bit=393e12, memory=int(15.75 * GiB),
        bandwidth=819 * GB, link=200 * GB, links=4, network=3.125 * GB, host_link=16 * GB,
    ),
    _tpu(
        "v5p", ("TPU v5", "TPU v5p"), "v5p", flops=459e12, flops_8bit=918e12, memory=int(95.74 * GiB),
        bandwidth=2765 * GB, link=600 * GB, links=6, network=6.25 * GB, host_link=16 * GB,
    ),
    _tpu(
        "v6e", ("TPU v6 lite", "TPU v6e"), "v6e", flops=918e12, flops_8bit=1836e12, memory=int(31.25 * GiB),
        bandwidth=1638 * GB, link=400 * GB, links=4, network=12.5 * GB, host_link=32 * GB,
    ),
    _tpu(  # a chip is two devices; every number here is half of the page's
        "v7x", ("TPU7x", "TPU v7x"), "tpu7x", flops=2307e12 / 2, flops_8bit=4614e12 / 2, memory=int(94.75 * GiB),
        bandwidth=3690 * GB, link=300 * GB, links=6, network=6.25 * GB, host_link=None, per_chip=2,
    ),
    _gpu(
        "a100", ("NVIDIA A100-SXM4-80GB",), "a100", flops=312e12, flops_8bit=624e12, memory=85100068864,
        bandwidth=2039 * GB, link=300 * GB, network=25 * GB, host_link=32 * GB, silicon=_A100,
    ),
    _gpu(
        "h100", ("NVIDIA H100 80GB HBM3",), "h100", flops=989.4e12, flops_8bit=1978.9e12, memory=84942979072,
        bandwidth=3350 * GB, link=450 * GB, network=50 * GB, host_link=64 * GB, silicon=_HOPPER,
    ),
    _gpu(  # memory: 139.80 GiB is what programs find; the specification's 141 GB are not all theirs
        "h200", ("NVIDIA H200",), "h200", flops=989.4e12, flops_8bit=1978.9e12, memory=int(139.80 * GiB),
        bandwidth=4800 * GB, link=450 * GB, network=50 * GB, host_link=64 * GB, silicon=_HOPPER,
    ),
    _gpu(
        "b200", ("NVIDIA B200",), "dgx-b200", flops=2250e12, flops_8bit=4500e12, memory=191514411008,
        bandwidth=8000 * GB, link=900 * GB, network=50 * GB, host_link=64 * GB, silicon=_B200,
    ),
    Chip(
        name="cpu", kinds=("cpu",), platform="cpu", flops=None, flops_8bit=None, memory=None, bandwidth=None, link=None,
        links=None, network=None, host_link=None, per_chip=1, source="differs from machine to machine",
    ),
)  # fmt: skip

CHIPS = MappingProxyType({chip.name: chip for chip in _TABLE})


def chip_of(device_kind: str) -> Chip | None:
    """The chip that jax calls by this `device_kind`; None where its numbers are not known."""
    return next((chip for chip in _TABLE if device_kind in chip.kinds), None)
