"""Why a run must not be started on a mesh: what does not divide, and what would be trained on nothing."""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from itjax.base import tree
from itjax.base.schema import Run
from itjax.models import lora
from itjax.models.config import ModelConfig
from itjax.models.model import build
from itjax.parallel.layout import RULES
from itjax.planning.case import Case


class Dimension(NamedTuple):
    """An extent that mesh axes are to split, and where it is said."""

    name: str
    extent: int
    rule: str  # in the table of rules
    place: str  # the setting


def refusals(case: Case) -> list[str]:
    """A line for each reason not to start; none when there is none."""
    return list(undivided(case.run, case.config, dict(case.mesh.shape)))


def undivided(run: Run, config: ModelConfig, sizes: Mapping[str, int]) -> Iterator[str]:
    """Work that several devices would all do, as an axis does not divide it: correct, and paid for more than once."""
    micro = run.rows // run.accumulate
    what = "rows" if run.accumulate == 1 else f"rows of a micro-batch ({run.rows} / {run.accumulate})"
    dimensions = [
        Dimension(what, micro, "batch", "rows"),
        Dimension("query heads", config.heads, "heads", "model"),
        *([] if config.experts else [Dimension("feed-forward width", config.ffn, "ffn", "model")]),
        *([Dimension("experts", config.experts.number, "experts", "model")] if config.experts else []),
    ]
    yield from filter(None, (_undivided(dimension, sizes) for dimension in dimensions))
    parts = math.prod(sizes[axis] for axis in RULES["length"])
    if run.length % parts**2:
        good = _divisors(run.length, squared=True)
        yield (
            f"length: {run.length} positions do not divide over context {parts}, which needs a multiple of {parts**2}; "
            f"set config.length to {-(-run.length // parts**2) * parts**2}, or config.parallel.context to {good}"
        )
    if not config.experts and sizes["expert"] > 1:
        yield (
            f"expert: the mesh has {sizes['expert']} ways for experts and {run.model} has none; set config.parallel.expert to 1"
        )


def _undivided(dimension: Dimension, sizes: Mapping[str, int]) -> str:
    axes = [axis for axis in RULES[dimension.rule] if sizes[axis] > 1]
    parts = math.prod(sizes[axis] for axis in axes)
    if dimension.extent % parts == 0:
        return ""
    named = " x ".join(f"{axis} {sizes[axis]}" for axis in axes)
    total = f" = {parts}" if len(axes) > 1 else ""
    if dimension.place == "rows":
        up = -(-dimension.extent // parts) * parts
        way = (
            f"set config.rows and config.accumulate so that a micro-batch has {up} rows or another multiple of {parts}"
        )
    else:
        way = f"set config.parallel.{axes[-1]} to {_divisors(dimension.extent)}"
    return f"{dimension.rule}: {dimension.extent} {dimension.name} do not divide over {named}{total}; {way}"


def _divisors(number: int, *, squared: bool = False) -> str:
    """The sizes of an axis that would do, at most eight of them."""
    good = [size for size in range(1, min(number, 512) + 1) if number % (size**2 if squared else size) == 0]
    return ", ".join(map(str, good[:8]))


def wasted(case: Case) -> Iterator[str]:
    """What is whole where an axis could split it: more memory, no more work."""
    sizes, config = dict(case.mesh.shape), case.config
    tensor = sizes["tensor"]
    if config.vocab % tensor:
        up = -(-config.vocab // tensor) * tensor
        yield (
            f"vocab: {config.vocab} rows do not divide over tensor {tensor}, so embedding, head and logits are whole on every "
            f"device; config.architecture.vocab={up} divides"
        )
    if config.kv_heads % tensor:
        yield (
            f"kv_heads: {config.kv_heads} do not divide over tensor {tensor}, so keys and values are whole on every device"
        )
    gathered = math.prod(sizes[axis] for axis in RULES["embed"])
    if config.dim % gathered:
        yield (
            f"embed: a width of {config.dim} does not divide over {gathered} devices of fsdp, expert and context, so parameters "
            "are whole over some of them"
        )


def untrained(run: Run, config: ModelConfig) -> Iterator[str]:
    """Adapters that adapt nothing. (That the data has no trained token is told by the data, before there is a plan.)"""
    plain = linear_layers(config)
    if run.lora.rank and not any(lora.adapts(run.lora, place) for place in plain) and not run.lora.also:
        yield (
            f"nothing is trained: config.lora.targets {', '.join(map(repr, run.lora.targets))} fit no linear layer; "
            f"there are {', '.join(plain)}"
        )


def linear_layers(config: ModelConfig) -> list[str]:
    """Places of what adapters can adapt: `layers/attn/q`, ..."""
    model = build(config, dtype="float32", attention="auto", remat="none", platform="cpu")
    ends = "/kernel"
    return sorted(
        path.removesuffix(ends)
        for path in tree.flatten(model.abstract)
        if path.startswith("layers/") and path.endswith(ends)
    )
