"""What a layer keeps for its backward pass, by the names that its parts give their numbers; the rest is computed again there.

Per token and layer, in numbers, of a layer of width D with N query heads and K key/value heads of size H and a feed-forward
of F; what is computed again, of the products of a forward pass (D·(2N + 2K)·H + 3·D·F per token, attention apart):

    policy     kept                                                 computed again
    none       every number that the backward pass reads            nothing
    dots       results of products: D + (N + 2K)·H + N·H + D + 2F   norms and gates
    narrow     dots without the hidden numbers of feed-forwards     their two products: 2·D·F
    attention  D + N·H: the layer's input, and what heads read      all products but the last; not what kernels of attention did
    full       D: the layer's input                                 all products but the last, and attention
    offload    nothing on the device: the input goes to the host    as full; D numbers travel there and back

A kernel with a backward pass of its own names what it leaves for that (what heads read, and the logarithm of the sum that
they divided by); one in plain XLA is computed again for its gradient whatever is kept.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from itjax.kernels.case import ATTENDED

Policy = Callable[..., Any]

INPUT = "input"  # of a layer: the residual stream
HEADS = "heads"  # queries, keys and values, as attention takes them
BETWEEN = "between"  # the residual stream between attention and the feed-forward
HIDDEN = "hidden"  # the two products of a feed-forward that one gates the other of
ANSWERED = "answered"  # what the experts of a mixture say, before it is added up
WHOLE = "whole"  # a kernel that devices put together for a product
NAMES = (INPUT, HEADS, ATTENDED, BETWEEN, HIDDEN, ANSWERED)

named = checkpoint_name  # the same number, under a name that policies know

_only = jax.checkpoint_policies.save_only_these_names

POLICIES: Mapping[str, Policy | None] = {  # of schema.REMAT, the most memory and the least work first
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _only(ATTENDED, HIDDEN, ANSWERED)
    ),
    "narrow": _only(HEADS, ATTENDED, BETWEEN, ANSWERED),
    "attention": _only(ATTENDED),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def not_kept(function: Callable[..., Any]) -> Callable[..., Any]:
    """A product whose kernel, named WHOLE, is put together anew for the backward pass, whatever a layer keeps."""
    policy = jax.checkpoint_policies.save_anything_except_these_names(WHOLE)
    return jax.checkpoint(function, policy=policy, prevent_cse=False)


def layer(function: Callable[..., Any], policy: str, *, prevent_cse: bool) -> Callable[..., Any]:
    """A layer that keeps what the policy of this name says.

    `prevent_cse` keeps XLA from merging what is computed again with the original, which a scan does by itself.
    """
    if POLICIES[policy] is None:
        return function
    return jax.checkpoint(function, policy=POLICIES[policy], prevent_cse=prevent_cse)
