"""How long a step takes at least: by its products, by its memory, by its links; the slowest of them bounds it from below.

Everything else is taken to be free and to overlap, so a real step is longer. What is not known of a chip bounds nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from itjax.models import families
from itjax.models.config import ModelConfig
from itjax.parallel.topology import Target
from itjax.planning import memory
from itjax.planning.case import Case
from itjax.planning.memory import State


class Again(NamedTuple):
    """What of a layer's forward pass a rematerialisation does again on the way back, see models/remat.py."""

    attention: bool  # of the products of its projections
    hidden: bool  # of the feed-forward's first two
    scores: bool  # of attention itself

    @property
    def any(self) -> bool:
        return self.attention or self.hidden


AGAIN: Mapping[str, Again] = {
    "none": Again(False, False, False),
    "dots": Again(False, False, False),
    "narrow": Again(False, True, False),
    "attention": Again(True, True, False),
    "full": Again(True, True, True),
    "offload": Again(True, True, True),
}


@dataclass(frozen=True)
class Load:
    """What a step of the run has to work on, over all devices."""

    lengths: Sequence[Sequence[int]]  # of the examples of a few steps; full rows where there is no data
    positions: int  # of a step, padding too
    trained: float  # positions of a step with a loss

    @property
    def tokens(self) -> float:
        return sum(map(sum, self.lengths)) / len(self.lengths)


@dataclass(frozen=True)
class Products:
    """FLOPs of a step, of all devices together."""

    model: float  # useful ones: real tokens, their own segments, nothing done again; what `mfu` counts
    again: float  # forward passes that rematerialisation repeats
    step: float  # what is done: padding goes through kernels too, the head sees trained positions only, and `again`


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device receives in a step."""

    link: float  # within a slice or node
    network: float  # between them


@dataclass(frozen=True)
class Bound:
    """Seconds of a step at least, by what bounds them; None where the chip's number is not known."""

    seconds: Mapping[str, float | None]
    step: float | None
    by: str  # which of them that is
    mfu: float | None  # at most, as metrics.jsonl counts it


def products(case: Case, load: Load) -> Products:
    config, moving = case.config, 0.0 if case.run.lora.rank else 1.0
    model = _mean(families.train_flops(config, lengths, moving=moving) for lengths in load.lengths)
    head = config.dim * config.vocab
    kernels = families.matmul_parameters(config) - head
    attention = model - (4.0 + 2.0 * moving) * (kernels + head) * load.tokens
    again = 2.0 * _repeated(config, AGAIN[case.run.remat]) * load.positions
    again += attention / 3 if AGAIN[case.run.remat].scores else 0.0
    forward_and_back = 4.0 + 2.0 * moving
    step = forward_and_back * (kernels * load.positions + head * load.trained) + attention + again
    return Products(model, again, step)


def _repeated(config: ModelConfig, again: Again) -> float:
    """Parameters that a token is multiplied by once more."""
    projections = config.dim * config.head_size * (2 * config.heads + 2 * config.kv_heads)
    hidden = 2 * config.dim * config.ffn * (config.experts.chosen if config.experts else 1)
    return config.layers * float(again.attention * projections + again.hidden * hidden)


def memory_traffic(case: Case, state: State, activations: float) -> float:
    """Bytes that one device reads and writes at least: its state once each way, what is kept for the way back once each way,
    and the layers' weights, put together, in every pass over them."""
    passes = 2 + AGAIN[case.run.remat].any
    layers = case.config.layers * memory.layer(case)
    moved = 2 * (state.parameters + state.optimizer) + state.frozen
    return moved + case.run.accumulate * (passes * layers + 2 * activations)


def bound(target: Target, flops: Products, traffic: Traffic, moved: float, *, hosted: float) -> Bound:
    """`moved` bytes through a device's memory, `hosted` between it and its host."""
    chip, num_devices = target.chip, len(target.devices)
    seconds = {
        "products": _over(flops.step / num_devices, chip.flops),
        "memory": _over(moved, chip.bandwidth),
        "link": _over(traffic.link, target.link),
        "network": _over(traffic.network, chip.network),
        "host": _over(hosted, chip.host_link),
    }
    if chip.flops is None:
        return Bound(seconds, None, "", None)
    by = max(seconds, key=lambda name: seconds[name] or 0.0)
    step = seconds[by] or 0.0
    return Bound(seconds, step, by, flops.model / (step * chip.flops * num_devices))


def _over(amount: float, rate: float | None) -> float | None:
    if not amount:
        return 0.0
    return amount / rate if rate else None


def _mean(numbers) -> float:
    listed = list(numbers)
    return sum(listed) / len(listed)


# --- traffic by shapes, before anything is compiled -------------------------------------------------------------------


def expected_traffic(case: Case) -> Traffic:
    """What a device receives for the case's mesh by the textbook; to put candidates in an order, not to be reported.

    Weights are gathered in every pass, gradients scattered once a micro-batch, copies of gradients added up over `data`;
    `tensor` adds up two activations per layer and pass; `context` gathers keys and values; `expert` sends tokens there and back.
    """
    sizes, run, config = dict(case.mesh.shape), case.run, case.config
    itemsize = np.dtype(case.dtype).itemsize
    passes = 2 + AGAIN[run.remat].any
    layers = config.layers * memory.layer(case) / itemsize  # elements, put together
    gathered = sizes["fsdp"] * sizes["expert"] * sizes["context"]
    moves = run.lora.rank == 0
    weights = layers * _rest(gathered) * (passes * itemsize + (4 if moves else 0)) * run.accumulate
    copies = 2 * 4 * layers / gathered * _rest(sizes["data"]) * run.accumulate * moves
    positions = run.rows * run.length / (memory.shards(case) * sizes["context"])
    width = positions * config.dim * itemsize * config.layers
    tensor = 2 * 2 * passes * width * _rest(sizes["tensor"])
    heads = config.kv_heads / math.gcd(config.kv_heads, sizes["tensor"])
    keys = 2 * heads * config.head_size * positions * sizes["context"] * itemsize * config.layers
    context = keys * _rest(sizes["context"]) * passes
    chosen = config.experts.chosen if config.experts else 0
    experts = 2 * passes * chosen * width * _rest(sizes["expert"])
    inside, slices = weights + tensor + context + experts, case.target.slices
    if slices == 1:
        return Traffic(inside + copies, 0.0)
    if sizes["data"] % slices == 0:  # slices hold copies: only those cross
        return Traffic(inside, copies)
    return Traffic(inside, copies + weights * _rest(slices) / (case.num_devices // slices))


def _rest(parts: int) -> float:
    """The share of a whole that a device of `parts` has not got."""
    return (parts - 1) / parts
