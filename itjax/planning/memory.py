"""What lies in the memory of a device during a step, by kind: exactly where shapes decide it, by the compiler where it does.

State and gradients are shapes and where they lie. What a backward pass keeps is asked of its own program, traced for one
and for two rows: what grows is kept per row. Only the compiler knows the peak; the parts say what it is made of.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from itjax.base import tree
from itjax.models.model import Params
from itjax.objectives.sft import sft
from itjax.parallel import layout
from itjax.planning.case import Case
from itjax.train.state import TrainState

HOST = "host"
STATES: dict[tuple[Any, ...], TrainState] = {}  # by everything that they depend on


@dataclass(frozen=True)
class State:
    """Bytes on one device of what a run carries from step to step, and of its batch."""

    parameters: int  # that are trained, and their running mean where one is kept
    optimizer: int
    frozen: int
    batch: int
    host: int  # of these, what is kept in the host's memory instead


@dataclass(frozen=True)
class Kept:
    """Bytes that all devices together keep for the backward pass, per row."""

    narrow: float  # of arrays as wide as the residual stream, which `tensor` does not split
    wide: float  # of heads and feed-forward, which it does
    host: float  # in the host's memory


def abstract_state(case: Case) -> TrainState:
    """Shapes of the state and where they lie: the same for any number of micro-batches and any rematerialisation."""
    run = case.run
    key = (case.target.name, tuple(case.mesh.shape.items()), case.config, case.dtype, run.lora, repr(run.optimizer))
    if key not in STATES:
        STATES[key] = case.compiled.abstract
    return STATES[key]


def state(case: Case) -> State:
    abstract = abstract_state(case)
    step = {
        "parameters": (abstract.params, abstract.average),
        "optimizer": abstract.opt_state,
        "frozen": abstract.frozen,
    }
    rows = layout.batch_shapes(case.mesh, rows=case.run.rows, length=case.run.length)
    leaves = [(kind, leaf) for kind, tree in {**step, "batch": rows}.items() for leaf in jax.tree.leaves(tree)]
    sums = dict.fromkeys((*step, "batch", HOST), 0)
    for kind, leaf in leaves:
        sums[HOST if on_host(leaf.sharding.memory_kind) else kind] += on_device(leaf)
    return State(**sums)


def on_device(leaf: Any) -> int:
    """Bytes that one device has of an array."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def on_host(kind: str | None) -> bool:
    return kind is not None and "host" in kind


def gradients(case: Case) -> int:
    """Of the trained parameters, float32, laid out as they are; twice where micro-batches add up."""
    once = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 for leaf in jax.tree.leaves(abstract_state(case).params)
    )
    return once * (2 if case.run.accumulate > 1 else 1)


def kept(case: Case) -> Kept:
    """What the case's rematerialisation keeps, from the program of its backward pass."""
    rows = case.micro_rows
    one, two = _residuals(case, rows), _residuals(case, 2 * rows)
    sums = {"narrow": 0.0, "wide": 0.0, HOST: 0.0}
    for less, more in zip(one, two, strict=True):
        grows = _size(more) - _size(less)
        place = (
            HOST if "host" in str(getattr(more, "memory_space", "")).lower() else _width(more.shape, case.config.dim)
        )
        sums[place] += grows / rows
    return Kept(**sums)


def _residuals(case: Case, rows: int) -> list[Any]:
    loss_fn = sft(case.model, loss=case.run.loss)
    abstract = case.compiled.abstract

    def backward(params: Params, frozen: Params, batch: Any) -> Any:
        return jax.vjp(lambda params: loss_fn(params, frozen, batch, None).loss, params)[1]

    batch = layout.batch_shapes(case.mesh, rows=rows, length=case.run.length)
    with case.scope():
        return list(jax.make_jaxpr(backward)(abstract.params, abstract.frozen, batch).out_avals)


def _size(aval: Any) -> int:
    return math.prod(aval.shape) * np.dtype(aval.dtype).itemsize


def _width(shape: tuple[int, ...], dim: int) -> str:
    return "narrow" if dim in shape[1:] or len(shape) <= 2 else "wide"


def per_device(case: Case, of_rows: Kept) -> tuple[float, float]:
    """Bytes that one device keeps for the backward pass of a micro-batch: in its own memory and in the host's."""
    sizes = dict(case.mesh.shape)
    share = case.micro_rows / shards(case) / sizes["context"]
    return share * (of_rows.narrow + of_rows.wide / sizes["tensor"]), share * of_rows.host


def shards(case: Case) -> int:
    """Into how many parts the mesh splits the rows of a micro-batch."""
    shape = (case.micro_rows, case.run.length)
    return case.micro_rows // layout.batch_sharding(case.mesh, *shape).shard_shape(shape)[0]


def parts(case: Case, of_rows: Kept) -> dict[str, float]:
    """Bytes on one device by what they are for: those that are there all the time, then those of the busiest moment."""
    own = state(case)
    activations, _ = per_device(case, of_rows)
    head = _head(case)
    layers = {"gradients": float(gradients(case)), "weights of a layer": layer(case)}
    moment = head if sum(head.values()) > sum(layers.values()) else layers
    return {
        "parameters": own.parameters,
        "optimizer": own.optimizer,
        "frozen": own.frozen,
        "activations": activations,
        **moment,
    }


def _head(case: Case) -> dict[str, float]:
    """While the loss is computed: the head whole over the width, the logits of a chunk and their gradient, its own gradient."""
    config, itemsize = case.config, np.dtype(case.dtype).itemsize
    vocab = config.vocab / (case.mesh.shape["tensor"] if config.vocab % case.mesh.shape["tensor"] == 0 else 1)
    positions = case.micro_rows / shards(case) * case.run.length / case.mesh.shape["context"]
    chunk = min(case.run.loss.chunk, positions)
    table = vocab * config.dim
    moves = case.run.lora.rank == 0
    return {"logits": chunk * vocab * (4 + 4 + itemsize), "head": table * itemsize + (table * 4 if moves else 0)}


def layer(case: Case) -> float:
    """The kernels of one layer as they are multiplied with: put together over the axes that shard them, not over what splits
    heads, feed-forward and experts."""
    axes = tree.flatten(case.model.axes)
    return sum(
        _whole_over_width(leaf.shape[1:], tuple(axes[path])[1:], dict(case.mesh.shape)) * np.dtype(case.dtype).itemsize
        for path, leaf in tree.flatten(case.model.abstract).items()
        if path.startswith("layers/")
    )


def _whole_over_width(shape: tuple[int, ...], names: tuple[str, ...], sizes: Mapping[str, int]) -> float:
    inside = ("tensor", "expert") if "experts" in names else ("tensor",)
    rules = {name: tuple(axis for axis in axes if axis in inside) for name, axes in layout.RULES.items()}
    split = layout.spec(names, shape, sizes, {**rules, "embed": ()})
    return math.prod(shape) / math.prod(sizes[axis] for axis in jax.tree.leaves(tuple(split)))


def total(parts: Mapping[str, float]) -> float:
    return sum(parts.values())


def dominates(parts: Mapping[str, float], other: float) -> str:
    """The name of the largest part; `other` is what the compiler needs beyond them."""
    named = {**parts, "what the compiler needs beside": other}
    return max(named, key=lambda name: named[name])
