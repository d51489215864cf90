"""Adapters as leaves of the tree of parameters: which leaves move, how the others are kept, and the two made one.

An adapted kernel has its adapters beside it:

    layers/attn/q/kernel   (L, D, N, H)   stays as it is, in float32, bfloat16, int8 or nf4
    layers/attn/q/lora_a   (L, D, r)      drawn; x · A, scaled, times B is added to x · kernel
    layers/attn/q/lora_b   (L, r, N, H)   zero at first: the first step is the base, to the last bit
    layers/attn/q/lora_m   (L, N, H)      DoRA: the length of each column, the norm of W + scale · A · B at first
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from itjax.base import tree
from itjax.base.freeze import nearest
from itjax.base.schema import Lora
from itjax.models import quantize

Params = dict[str, Any]
Leaf = Any  # an array, or the quantised leaves of one

ADAPTERS = ("lora_a", "lora_b", "lora_m")
NOT_BY_DEFAULT = ("head", "router")


def scale(lora: Lora) -> float:
    """What A · B is multiplied with."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.rank_stabilized else lora.rank)


def adapts(lora: Lora, place: str) -> bool:
    """Whether the linear layer that stands at `layers/attn/q` has an adapter."""
    if lora.rank == 0:
        return False
    if lora.targets:
        return tree.matches(place, lora.targets)
    return place.rpartition(tree.SEPARATOR)[2] not in NOT_BY_DEFAULT


def stored(lora: Lora, base: str, place: str) -> str:
    """How the kernel at a place is kept: as the base says, unless it is trained in full."""
    return "float32" if tree.matches(f"{place}/kernel", lora.also) else base


def moving(abstract: Params, lora: Lora) -> dict[str, Any]:
    """Which leaves the optimizer moves: all without adapters, else these and what `lora.also` names."""
    flat = tree.flatten(abstract)
    moves = {path: lora.rank == 0 or is_adapter(path) or tree.matches(path, lora.also) for path in flat}
    if lora.rank:
        _check_patterns(flat, lora)
    for path, leaf in flat.items():
        if moves[path] and leaf.dtype != jnp.float32:
            raise ValueError(
                f"{path}: kept in {leaf.dtype}, which is for parameters that are not trained; "
                "set lora.rank, or lora.base=float32"
            )
    return tree.unflatten(moves)


def split(params: Params, moves: Mapping[str, Any]) -> tuple[Params, Params]:
    """(what moves, what is frozen); `models.model.join` is the inverse."""
    flat, chosen = tree.flatten(params), tree.flatten(moves)
    assert flat.keys() == chosen.keys(), sorted(flat.keys() ^ chosen.keys())
    moved, frozen = ({path: leaf for path, leaf in flat.items() if chosen[path] == side} for side in (True, False))
    return tree.unflatten(moved), tree.unflatten(frozen)


def keep(params: Params, lora: Lora, *, base: str) -> Params:
    """The tree with every leaf in the dtype that it is kept in. With a small base, all that is frozen is bfloat16."""
    if base == "float32":
        return params

    def kept(path: str, leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or path.endswith("kernel/scales"):
            return leaf
        moves = is_adapter(path) or tree.matches(path, lora.also)
        return leaf.astype(jnp.float32 if moves else jnp.bfloat16)

    return tree.unflatten({path: kept(path, leaf) for path, leaf in tree.flatten(params).items()})


def begin(params: Params, lora: Lora) -> Params:
    """Adapters as they start on this base: DoRA's lengths are those of the kernels, which may have come from a folder."""
    started: Params = {}
    for name, below in params.items():
        if isinstance(below, Mapping):
            started[name] = begin(dict(below), lora)
            if "lora_m" in below:
                started[name]["lora_m"] = _lengths(dict(below), scale=scale(lora))
        else:
            started[name] = below
    return started


def merge(params: Params, lora: Lora, *, dtype: str) -> Params:
    """The network without adapters: every adapted kernel takes its own in, and quantised ones become `dtype`.

    A layer at a time and on the devices where the kernel lies. Float kernels are changed in place: `params` is not to be
    used again.
    """
    merged: Params = {}
    for name, below in params.items():
        if not isinstance(below, Mapping):
            merged[name] = below
        elif "lora_a" in below or isinstance(below.get("kernel"), Mapping):
            merged[name] = {leaf: value for leaf, value in below.items() if leaf not in ADAPTERS}
            merged[name]["kernel"] = _merged(below, scale(lora) if "lora_a" in below else 0.0, dtype=dtype)
        else:
            merged[name] = merge(dict(below), lora, dtype=dtype)
    return merged


def num_parameters(params: Params) -> int:
    """Parameters of a tree. One of a quantised kernel counts as one, and scales do not count."""
    flat = tree.flatten(params)
    return sum(
        math.prod(leaf.shape) * (2 if path.endswith("kernel/codes") and leaf.dtype == jnp.uint8 else 1)
        for path, leaf in flat.items()
        if not path.endswith("kernel/scales")
    )


def lengths(whole: jax.Array, inputs: int) -> jax.Array:
    """The norm of each column of a float32 kernel (inputs..., outputs...)."""
    return jnp.sqrt(jnp.square(whole).sum(axis=tuple(range(inputs))))


def whole(kernel: Leaf, a: jax.Array, b: jax.Array, *, scale: float) -> jax.Array:
    """W + scale · A · B of one layer, in float32."""
    product = jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
    return _wide(kernel) + scale * product


def is_adapter(path: str) -> bool:
    return path.rpartition(tree.SEPARATOR)[2] in ADAPTERS


def _check_patterns(flat: Mapping[str, Any], lora: Lora) -> None:
    """A pattern that fits nothing is a spelling mistake."""
    linear = sorted({path.partition("/kernel")[0] for path in flat if "/kernel" in path})
    for setting, patterns, known in (("targets", lora.targets, linear), ("also", lora.also, sorted(flat))):
        for pattern in patterns:
            if not any(tree.matches(path, [pattern]) for path in known):
                raise ValueError(
                    f"config.lora.{setting}: {pattern!r} fits nothing.{nearest(pattern, known)} There are {known}"
                )
    adapted = {path.rpartition(tree.SEPARATOR)[0] for path in flat if is_adapter(path)}
    for pattern in lora.targets:
        if not any(tree.matches(place, [pattern]) for place in adapted):
            raise ValueError(
                f"config.lora.targets: {pattern!r} fits nothing that takes an adapter; there are {sorted(adapted)}"
            )


def _wide(kernel: Leaf) -> jax.Array:
    return quantize.dequantize(kernel, jnp.float32) if isinstance(kernel, Mapping) else kernel.astype(jnp.float32)


def _lead(leaves: Mapping[str, Leaf]) -> int:
    """How many dimensions of layers and experts a kernel leads with. Those of codes are those of the kernel."""
    ndim = leaves["kernel"]["codes"].ndim if isinstance(leaves["kernel"], Mapping) else leaves["kernel"].ndim
    return leaves["lora_a"].ndim + leaves["lora_b"].ndim - 2 - ndim if "lora_a" in leaves else 1


@functools.partial(jax.jit, static_argnames="scale")
def _lengths(leaves: Mapping[str, Leaf], *, scale: float) -> jax.Array:
    """||W + scale · A · B|| of each column of a leaf, one layer after the other."""

    def of_layer(layer: Mapping[str, Leaf]) -> jax.Array:
        a, b = layer["lora_a"], layer["lora_b"]
        return lengths(whole(layer["kernel"], a, b, scale=scale), a.ndim - 1)

    return jax.lax.map(of_layer, leaves) if _lead(leaves) else of_layer(leaves)


def _merged(leaves: Mapping[str, Leaf], scale: float, *, dtype: str) -> jax.Array:
    kernel, lead = leaves["kernel"], _lead(leaves)
    adapters = {name: leaves[name] for name in ADAPTERS if name in leaves}
    is_float = not isinstance(kernel, Mapping)
    out = kernel.dtype if is_float else jnp.dtype(dtype)

    def of_layer(kernel: Leaf, adapters: Mapping[str, jax.Array]) -> jax.Array:
        if not adapters:
            return _wide(kernel).astype(out)
        a, b = adapters["lora_a"], adapters["lora_b"]
        merged = whole(kernel, a, b, scale=scale)
        if "lora_m" in adapters:
            ratio = adapters["lora_m"] / lengths(merged, a.ndim - 1)
            merged *= ratio.reshape((1,) * (a.ndim - 1) + ratio.shape)
        return merged.astype(out)

    def of_layers(kernel: Leaf, adapters: Mapping[str, jax.Array]) -> jax.Array:
        if lead == 0:
            return of_layer(kernel, adapters)
        of_one = jax.vmap(of_layer) if lead == 2 else of_layer  # experts at once

        def put(number: jax.Array, merged: jax.Array) -> jax.Array:
            source = (merged if is_float else kernel, adapters)
            layer = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), source)
            return jax.lax.dynamic_update_index_in_dim(merged, of_one(*layer), number, 0)

        start = kernel if is_float else jnp.zeros(_shape(kernel), out)
        return jax.lax.fori_loop(0, start.shape[0], put, start)

    sharding = kernel.sharding if is_float else kernel["codes"].sharding
    donated = (0,) if is_float else ()
    return jax.jit(of_layers, out_shardings=sharding, donate_argnums=donated)(kernel, adapters)


def _shape(kernel: Mapping[str, jax.Array]) -> tuple[int, ...]:
    return jax.eval_shape(functools.partial(quantize.dequantize, dtype=jnp.float32), kernel).shape
