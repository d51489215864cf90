"""From tokens to the rows of their experts and back, on one device and over the mesh axis `expert`.

B rows of a batch, T positions, D width, E experts, C experts that a token chooses. On one device: N tokens, P = N·C pairs
of a token and one of its experts, M rows of an array that is sorted by expert.

    experts of 3 tokens   b c | a c | b -      "-" is nowhere: padding, or an expert that was full
    pairs                 0 1   2 3   4 5
    pairs, sorted         2 0 4 1 3 5          rows of the experts  a b b c c -

Where the mesh splits experts, tokens travel in one of two ways. All tokens go to all devices of the axis, each answers
for its own experts, and answers are added up on the way back: nothing is dropped whatever is chosen, and the arrays are
as large as if all had chosen alike. With a capacity only chosen tokens go, to places that are kept for them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from itjax.kernels import grouped
from itjax.parallel import layout, stripes

AXIS = "expert"  # of the mesh


class Routes(NamedTuple):
    """Where each token goes: numbers of experts, E for nowhere, and what each answer is multiplied with."""

    experts_BTC: jax.Array  # int32
    weights_BTC: jax.Array  # float32
    slots_BTC: jax.Array | None = None  # its place among its row's tokens for that expert, where places are limited


class Groups(NamedTuple):
    """How the rows of an array belong to experts: sorted, so many for each; None: equally many for each."""

    sizes_E: jax.Array | None

    def product(self, x_MI: jax.Array, kernel_EIO: jax.Array) -> jax.Array:
        """Every row times the matrix of its expert. Rows of no expert come last and are zeros."""
        if self.sizes_E is not None:
            return grouped.product(x_MI, kernel_EIO, self.sizes_E)
        x_ESI = x_MI.reshape(len(kernel_EIO), -1, x_MI.shape[1])
        return jnp.einsum("ESI,EIO->ESO", x_ESI, kernel_EIO).reshape(len(x_MI), -1)


FeedForward = Callable[[jax.Array, Groups], jax.Array]  # x_MD of the experts that a device has -> y_MD


@dataclass(frozen=True)
class Ways:
    """The mesh axes in scope that split the tokens of a batch, the experts, and the hidden numbers of each."""

    tokens: tuple[str, ...]
    experts: tuple[str, ...]
    hidden: tuple[str, ...]

    @property
    def meets_others(self) -> bool:
        """Whether the tokens of a device choose experts that it does not have."""
        return AXIS in self.tokens and AXIS in self.experts

    @property
    def parts(self) -> int:
        """On how many devices the hidden numbers of one expert are."""
        return math.prod(layout.scope()[axis] for axis in self.hidden)

    def own(self, key: jax.Array) -> jax.Array:
        """A key of this device, the same where hidden numbers of the same tokens are."""
        axes = tuple(dict.fromkeys((*self.tokens, *self.experts)))
        return jax.random.fold_in(key, jax.lax.axis_index(axes)) if axes else key

    def total(self, y_BTD: jax.Array) -> jax.Array:
        """Added up over devices with other experts or hidden numbers for the same tokens."""
        sizes = layout.scope()
        others = tuple(axis for axis in sizes if axis not in self.tokens)
        if math.prod(sizes.values()) == 1 or not others:
            return y_BTD
        copies = math.prod(sizes[axis] for axis in others if axis not in (*self.experts, *self.hidden))
        return jax.lax.psum(y_BTD, others) / copies


def ways(*, rows: int, length: int, experts: int, width: int) -> Ways:
    """How the mesh in scope splits a batch of so many rows and positions, and experts of this hidden width."""
    by_rows, by_length = layout.split(("batch", "length"), (rows, length))
    return Ways(by_rows + by_length, *layout.split(("experts", "ffn"), (experts, width)))


def limited(routes: Routes, capacity: int | None, number: int) -> Routes:
    """The same routes, but nowhere for those that find the places of their expert taken, which are so many per row."""
    if capacity is None:
        return routes
    slots_BTC = stripes.striped(jax.vmap(partial(_slots, number=number))(stripes.natural(routes.experts_BTC)))
    return Routes(jnp.where(slots_BTC < capacity, routes.experts_BTC, number), routes.weights_BTC, slots_BTC)


def _slots(experts_TC: jax.Array, *, number: int) -> jax.Array:
    """How many took the same expert before: all first choices in order, then all second ones.

    experts  b a | b c | a b        slots  0 0 | 1 0 | 0 2        (the last b comes third, its a is a first choice)
    """
    experts_P = experts_TC.T.reshape(-1)
    order_P = jnp.argsort(experts_P, stable=True)
    sorted_P = experts_P[order_P]
    first_P = jnp.searchsorted(sorted_P, sorted_P, side="left")
    slots_P = jnp.zeros_like(order_P).at[order_P].set(jnp.arange(len(order_P)) - first_P, unique_indices=True)
    return slots_P.reshape(experts_TC.shape[::-1]).T


def answers(
    x_BTD: jax.Array, routes: Routes, feed_forward: FeedForward, ways: Ways, *, number: int, capacity: int | None
) -> jax.Array:
    """The weighted sum of what each token's experts say, on one device: with its rows, routes and experts."""
    local = number // (layout.scope()[AXIS] if ways.experts else 1)
    if not ways.meets_others:
        y_BTD = _here(x_BTD, routes, feed_forward, first=_first(ways, local), number=local)
    elif capacity is None:
        x_BTD, routes = jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, axis=0, tiled=True), (x_BTD, routes))
        y_BTD = _here(x_BTD, routes, feed_forward, first=_first(ways, local), number=local)
        y_BTD = jax.lax.psum_scatter(y_BTD, AXIS, scatter_dimension=0, tiled=True)
    else:
        y_BTD = _there(x_BTD, routes, feed_forward, number=number, capacity=capacity)
    return ways.total(y_BTD)


def _first(ways: Ways, local: int) -> jax.Array | int:
    """The number of the first expert that this device has."""
    return jax.lax.axis_index(AXIS) * local if ways.experts else 0


def _here(
    x_BTD: jax.Array, routes: Routes, feed_forward: FeedForward, *, first: jax.Array | int, number: int
) -> jax.Array:
    """What the experts from `first` on say, `number` of them; nothing for tokens that chose others."""
    C = routes.experts_BTC.shape[-1]
    experts_P = routes.experts_BTC.reshape(-1) - first
    experts_P = jnp.where((experts_P >= 0) & (experts_P < number), experts_P, number)
    pair_M = jnp.argsort(experts_P, stable=True)
    row_P = jnp.zeros_like(pair_M).at[pair_M].set(jnp.arange(len(pair_M)), unique_indices=True)
    groups = Groups(jnp.zeros(number, jnp.int32).at[experts_P].add(1, mode="drop"))
    y_MD = feed_forward(_spread(x_BTD.reshape(-1, x_BTD.shape[-1]), pair_M, row_P.reshape(-1, C)), groups)
    return _combined(y_MD, pair_M, row_P, experts_P < number, routes, like=x_BTD)


def _there(x_BTD: jax.Array, routes: Routes, feed_forward: FeedForward, *, number: int, capacity: int) -> jax.Array:
    """What all experts say: tokens go to the device of each, to `capacity` places that every row has there."""
    (B, _, D), C = x_BTD.shape, routes.experts_BTC.shape[-1]
    assert routes.slots_BTC is not None
    is_kept_P = (routes.experts_BTC < number).reshape(-1)
    row_BTC = (routes.experts_BTC * B + jnp.arange(B)[:, None, None]) * capacity + routes.slots_BTC
    M = number * B * capacity
    row_P = jnp.where(is_kept_P, row_BTC.reshape(-1), M)
    pair_M = jnp.full(M, len(row_P)).at[row_P].set(jnp.arange(len(row_P)), mode="drop")
    x_MD = _spread(x_BTD.reshape(-1, D), pair_M, row_P.reshape(-1, C))
    there = partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=1, tiled=True)
    back = partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=1, concat_axis=0, tiled=True)
    x_ESD = there(x_MD.reshape(number, -1, D))
    y_ESD = feed_forward(x_ESD.reshape(-1, D), Groups(None)).reshape(x_ESD.shape)
    return _combined(back(y_ESD).reshape(-1, D), pair_M, row_P, is_kept_P, routes, like=x_BTD)


def _combined(
    y_MD: jax.Array, pair_M: jax.Array, row_P: jax.Array, is_kept_P: jax.Array, routes: Routes, *, like: jax.Array
) -> jax.Array:
    """Weighted answers, added up for each token in float32."""
    C = routes.weights_BTC.shape[-1]
    y_NCD = _collect(y_MD, pair_M, row_P).reshape(-1, C, y_MD.shape[-1])
    weights_NC = jnp.where(is_kept_P, routes.weights_BTC.reshape(-1), 0).reshape(-1, C)
    y_ND = jnp.einsum("NCD,NC->ND", y_NCD, weights_NC, preferred_element_type=jnp.float32)
    return y_ND.astype(like.dtype).reshape(like.shape)


# --- gathers whose gradients are gathers too, where jax would scatter ---------------------------------------------------


@jax.custom_vjp
def _spread(x_ND: jax.Array, pair_M: jax.Array, row_NC: jax.Array) -> jax.Array:
    """The token of every row; zeros in rows of no pair. `row_NC` is the inverse of `pair_M`."""
    return _rows(x_ND, pair_M // row_NC.shape[1])


def _spread_forward(x_ND: jax.Array, pair_M: jax.Array, row_NC: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _spread(x_ND, pair_M, row_NC), row_NC


def _spread_backward(row_NC: jax.Array, dx_MD: jax.Array) -> tuple[jax.Array, None, None]:
    dx_NCD = _rows(dx_MD, row_NC.reshape(-1)).reshape(*row_NC.shape, -1)
    return dx_NCD.astype(jnp.float32).sum(axis=1).astype(dx_MD.dtype), None, None


@jax.custom_vjp
def _collect(y_MD: jax.Array, pair_M: jax.Array, row_P: jax.Array) -> jax.Array:
    """The row of every pair; zeros for pairs without one."""
    return _rows(y_MD, row_P)


def _collect_forward(y_MD: jax.Array, pair_M: jax.Array, row_P: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _collect(y_MD, pair_M, row_P), pair_M


def _collect_backward(pair_M: jax.Array, dy_PD: jax.Array) -> tuple[jax.Array, None, None]:
    return _rows(dy_PD, pair_M), None, None


_spread.defvjp(_spread_forward, _spread_backward)
_collect.defvjp(_collect_forward, _collect_backward)


def _rows(x: jax.Array, numbers: jax.Array) -> jax.Array:
    """Rows by number; zeros for numbers after the last."""
    return jnp.take(x, numbers, axis=0, mode="fill", fill_value=0)
