"""Devices that are not here: "v5p:4x4x4" or "h100:16x8" to something a mesh is made of and programs are compiled for."""

from dataclasses import dataclass
from typing import Any

from itjax.base.chips import Chip


@dataclass(frozen=True)
class Target:
    """Devices to compile for. Several slices of TPUs, or nodes of GPUs, are joined by the slower network."""

    name: str  # as asked for: "2*v5e:16x16"
    chip: Chip
    devices: tuple[Any, ...]  # jax devices: compile-only ones, or fake CPU devices
    shape: tuple[int, ...]  # of one slice in chips, or (GPUs,) of one node
    slices: int  # of TPUs, or nodes of GPUs

    @property
    def link(self) -> float | None:
        """Bytes/s that the worst placed device of a slice or node receives over all its links to others there."""
        return self.chip.link


def prepare(text: str) -> None:
    """Sets the environment for `target(text)`. Before jax starts a backend; it raises ValueError where that is too late."""
    raise NotImplementedError


def target(text: str) -> Target:
    """The devices that a text names; raises ValueError that says what is possible where it names none."""
    raise NotImplementedError
