"""The leaves of a linear layer as plain trees, for code that runs on one device of a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from itjax.base import tree
from itjax.parallel import layout

KEEP = ("experts", "heads", "kv_heads", "ffn")  # dimensions of kernels that stay split where they are used


def names_of(state: nnx.State) -> dict[str, Any]:
    """Logical names of the dimensions of every leaf, in the tree that the leaves are in."""
    axes = {
        tree.SEPARATOR.join(map(str, path)): PartitionSpec(*variable.get_metadata()["axes"])
        for path, variable in nnx.to_flat_state(state)
    }
    return tree.unflatten(axes)


def shapes_of(leaves: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: leaf.shape, leaves)


def travelling(leaves: dict[str, Any], dtype: jnp.dtype) -> dict[str, Any]:
    """In which types leaves travel: that of products, before they do; scales of quantised kernels in their own."""
    flat = tree.flatten(leaves)
    small = {path for path, leaf in flat.items() if leaf.dtype == jnp.float32 and not path.endswith("scales")}
    return tree.unflatten({path: jnp.dtype(dtype) if path in small else leaf.dtype for path, leaf in flat.items()})


def names_of_kernel(names: dict[str, Any]) -> PartitionSpec:
    """The names of a kernel's dimensions, quantised or not."""
    return names["kernel"]["codes"] if isinstance(names["kernel"], dict) else names["kernel"]


def uneven_blocks(leaves: dict[str, Any], names: dict[str, Any]) -> tuple[tuple[str, ...], int] | None:
    """The mesh axes that split codes but not the blocks of their scales, and how many blocks there are; None without any.

    Codes and scales must be split alike where each device makes numbers of its own part.
    """
    if not isinstance(leaves["kernel"], dict):
        return None
    codes, scales = leaves["kernel"]["codes"], leaves["kernel"]["scales"]
    axes = tuple(names_of_kernel(names))
    splits = zip(axes, layout.split(axes, codes.shape), layout.split(axes, scales.shape), scales.shape, strict=True)
    uneven = ((ways, blocks) for name, ways, other, blocks in splits if name in KEEP and blocks > 1 and ways != other)
    return next(uneven, None)
