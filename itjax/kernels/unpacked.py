"""Attention over packed rows with nothing but jax's public attention: segments are taken out of their rows and put back.

That function takes rows of one sequence and how long each is. Segments of like lengths are taken together as such rows, so
that no more than half of a row is padding:

    up to 128 positions, up to 256, up to 512, ... up to T; each kind in rounds of a quarter of the batch, as many as it takes

How many rounds there are is only known when the program runs. Any packing can be read, and memory grows with the batch and
not with T². It costs a copy of what goes in and out, and the way back reads everything again. It is what GPUs before Hopper
have, for which cuDNN takes no packed rows, and what is left should the call of `kernels/cudnn.py` go.

B rows, T positions, N query heads, K key/value heads, H head size, X positions of the whole batch, S segments, R of them in
a round, L positions that a round has for each.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from itjax.kernels import cudnn
from itjax.kernels.case import ATTENDED, Case, Scores, Segments, Stripes

SHORTEST = 128  # positions: rows of fewer are no quicker
SHARES = 4  # rounds that a batch takes if all its segments are of one kind


class Kind(NamedTuple):
    """Segments of more than `above` positions, up to L."""

    above: int
    L: int


class Reading(NamedTuple):
    """What stays the same from round to round."""

    scores: Scores
    implementation: Literal["cudnn", "xla"]


def refuses(case: Case) -> str:
    """Why this cannot be done, or nothing."""
    if case.scores.softcap:
        return "jax's public attention has no softcap of scores"
    if case.sinks:
        return "jax's public attention has no sinks"
    if case.parts > 1:
        return "it wants whole rows; let parallel.context divide the heads, or be 1"
    if case.platform != "gpu":
        return ""
    if why := cudnn.refuses_scores(case):
        return why
    found = cudnn.device()
    if found is None:
        return "no NVIDIA GPU with cuDNN is attached; pip install 'itjax[cuda]' on a machine that has one"
    if cudnn.number(found.capability) < (8, 0):
        return f"cuDNN's attention needs a GPU of compute capability 8.0, Ampere, or newer; this one has {found.capability}"
    return cudnn.refuses_version(found) or cudnn.refuses_head_size(case, found)


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments: Segments,
    scores: Scores,
    sinks_N: jax.Array | None = None,
    stripes: Stripes = Stripes(),  # noqa: B008 (a tuple of numbers)
    *,
    platform: str = "cpu",
) -> jax.Array:
    """Packed attention; what padding reads is 0. Outside of GPUs it is made of XLA's operations."""
    assert sinks_N is None, "refused"
    assert not scores.softcap, "refused"
    assert stripes.parts == 1, "refused"
    reading = Reading(scores, "cudnn" if platform == "gpu" else "xla")
    return checkpoint_name(_read(reading, q_BTNH, k_BTKH, v_BTKH, segments.queries_BQ), ATTENDED)


def kinds(length: int) -> list[Kind]:
    """Of rows of 300 positions: up to 128, up to 256, up to 300."""
    doubled = itertools.takewhile(lambda L: length > L, (SHORTEST * 2**i for i in itertools.count()))
    return [Kind(*pair) for pair in itertools.pairwise([0, *doubled, length])]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(
    reading: Reading, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    qkv = (q_BTNH, k_BTKH, v_BTKH)

    def add(places_RL: jax.Array, lengths_R: jax.Array, o_BTNH: jax.Array) -> jax.Array:
        o_RLNH = _rows_of_one(reading, lengths_R, *(_taken(x, places_RL) for x in qkv))
        return _put_back(o_BTNH, places_RL, o_RLNH)

    return _rounds(add, _zeros_like(q_BTNH), segments_BT)


def _forward(reading: Reading, *arguments: jax.Array) -> tuple[jax.Array, Any]:
    return _read(reading, *arguments), arguments


def _backward(reading: Reading, kept: Any, do_BTNH: jax.Array) -> tuple[Any, ...]:
    *qkv, segments_BT = kept

    def add(places_RL: jax.Array, lengths_R: jax.Array, grads: list[jax.Array]) -> list[jax.Array]:
        rows = [_taken(x, places_RL) for x in qkv]
        _, pull = jax.vjp(lambda q, k, v: _rows_of_one(reading, lengths_R, q, k, v), *rows)
        led_back = pull(_taken(do_BTNH, places_RL))
        return [_put_back(grad, places_RL, part) for grad, part in zip(grads, led_back, strict=True)]

    return (*_rounds(add, [_zeros_like(x) for x in qkv], segments_BT), None)


_read.defvjp(_forward, _backward)


def _rows_of_one(
    reading: Reading, lengths_R: jax.Array, q_RLNH: jax.Array, k_RLKH: jax.Array, v_RLKH: jax.Array
) -> jax.Array:
    """Rows of one sequence each, with padding at the end."""
    window = reading.scores.window
    return jax.nn.dot_product_attention(
        q_RLNH,
        k_RLKH,
        v_RLKH,
        scale=reading.scores.scale,
        is_causal=True,
        query_seq_lengths=lengths_R,
        key_value_seq_lengths=lengths_R,
        local_window_size=(window - 1, 0) if window else None,
        implementation=reading.implementation,
    )


# --- rounds -----------------------------------------------------------------------------------------------------------


def _rounds(add: Callable[[jax.Array, jax.Array, Any], Any], sums: Any, segments_BT: jax.Array) -> Any:
    """`add(places_RL, lengths_R, sums)` for all segments; `places` of positions that no segment has are beyond the batch."""
    for first_S, lengths_S, count, L, R in _tables(segments_BT):

        def one_round(now: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            number, sums = now
            first_R, lengths_R = (jax.lax.dynamic_slice(x, (number * R,), (R,)) for x in (first_S, lengths_S))  # noqa: B023
            return number + 1, add(_places(first_R, lengths_R, L, segments_BT.size), lengths_R, sums)  # noqa: B023

        _, sums = jax.lax.while_loop(lambda now: now[0] * R < count, one_round, (count * 0, sums))  # noqa: B023
    return sums


def _tables(segments_BT: jax.Array) -> Iterator[tuple[jax.Array, jax.Array, jax.Array, int, int]]:
    """For each kind: where its segments begin in the batch, how long they are, how many there are, and L and R."""
    B, T = segments_BT.shape
    lengths_X = _lengths(segments_BT).ravel()
    for above, L in kinds(T):
        R = -(-B * T // (SHARES * L))
        most = B * (T // (above + 1))
        is_of_kind_X = (lengths_X > above) & (lengths_X <= L)
        (first_S,) = jnp.nonzero(is_of_kind_X, size=-(-most // R) * R, fill_value=B * T)
        lengths_S = lengths_X.at[first_S].get(mode="fill", fill_value=0)
        yield first_S, lengths_S, is_of_kind_X.sum(dtype=jnp.int32), L, R


def _lengths(segments_BT: jax.Array) -> jax.Array:
    """Where a segment begins, how long it is; 0 elsewhere.

    1 1 1 2 2 0 0     3 0 0 2 0 0 0
    """
    changes_BT = jnp.diff(segments_BT, axis=1, prepend=-1) != 0
    places_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1])[None], segments_BT.shape)
    next_BT = jnp.where(changes_BT, places_BT, segments_BT.shape[1])  # the nearest change from here on
    next_BT = jax.lax.cummin(
        jnp.pad(next_BT[:, 1:], ((0, 0), (0, 1)), constant_values=next_BT.shape[1]), 1, reverse=True
    )
    return jnp.where(changes_BT & (segments_BT != 0), next_BT - places_BT, 0)


def _places(first_R: jax.Array, lengths_R: jax.Array, L: int, beyond: int) -> jax.Array:
    """Positions of the batch that a round reads, (R, L); different ones beyond its end where there is none."""
    within_RL = jnp.broadcast_to(jnp.arange(L)[None], (len(first_R), L))
    nowhere_RL = beyond + jnp.arange(within_RL.size).reshape(within_RL.shape)
    return jnp.where(within_RL < lengths_R[:, None], first_R[:, None] + within_RL, nowhere_RL)


def _taken(x_BTNH: jax.Array, places_RL: jax.Array) -> jax.Array:
    x_XNH = x_BTNH.reshape(-1, *x_BTNH.shape[2:])
    return x_XNH.at[places_RL].get(mode="fill", fill_value=0, unique_indices=True)


def _put_back(x_BTNH: jax.Array, places_RL: jax.Array, rows_RLNH: jax.Array) -> jax.Array:
    """Set and not added: what padding holds does not matter, nor does what was never written."""
    x_XNH = x_BTNH.reshape(-1, *x_BTNH.shape[2:])
    return x_XNH.at[places_RL].set(rows_RLNH, mode="drop", unique_indices=True).reshape(x_BTNH.shape)


def _zeros_like(x: jax.Array) -> jax.Array:
    """Varying over the axes of the mesh that `x` varies over, as what a loop carries has to."""
    zeros = jnp.zeros_like(x)
    missing = jax.typeof(x).manual_axis_type.varying - jax.typeof(zeros).manual_axis_type.varying
    return jax.lax.pcast(zeros, tuple(missing), to="varying") if missing else zeros
