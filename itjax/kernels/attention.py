"""Attention within packed examples: a position sees itself and what came before it in its own segment.

B rows, T positions, Q of them with a query, N query heads, K key/value heads, H head size.
Segment 0 is padding: it sees only padding, so its numbers stay finite and nobody else's depend on them.

A head may have a sink (https://arxiv.org/abs/2309.17453, learned as in GPT-OSS): one more score in the sum that
probabilities are divided by. It gives no value, so a head can read less than one whole position.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from itjax.base.freeze import nearest
from itjax.kernels import cudnn, plain, splash, streamed, unpacked
from itjax.kernels.case import Case, Scores, Segments, Stripes
from itjax.kernels.plain import read

__all__ = ["IMPLEMENTATIONS", "Case", "Scores", "Segments", "Stripes", "attend", "available", "check", "choose", "read"]


def anywhere(case: Case) -> bool:
    del case
    return True


class Implementation(NamedTuple):
    attend: Callable[..., jax.Array]  # (q_BQNH, k_BTKH, v_BTKH, segments, scores, sinks_N, stripes, *, platform)
    refuses: Callable[[Case], str]  # why it cannot do a case, and the way out; "": it can
    platforms: tuple[str, ...]  # where it runs as it is meant to
    suits: Callable[[Case], bool] = anywhere  # where not, "auto" takes anything else before it
    tracked: bool = True  # whether its results say over which axes of a mesh they vary, see `layout.per_device`


EVERYWHERE = ("cpu", "gpu", "tpu")

IMPLEMENTATIONS = {  # best first
    "cudnn": Implementation(cudnn.attend, cudnn.refuses, ("gpu",)),
    "unpacked": Implementation(unpacked.attend, unpacked.refuses, ("gpu",)),
    "splash": Implementation(splash.attend, splash.refuses, ("tpu",), tracked=False),
    "streamed": Implementation(streamed.attend, streamed.refuses, EVERYWHERE, suits=streamed.suits),
    "blockwise": Implementation(plain.blockwise, plain.refuses, EVERYWHERE),
    "reference": Implementation(plain.reference, plain.refuses, EVERYWHERE),
}


def attend(
    q_BQNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments: Segments,
    *,
    implementation: str,
    scores: Scores,
    sinks_N: jax.Array | None = None,
    stripes: Stripes = Stripes(),  # noqa: B008 (a tuple of numbers)
    platform: str = "cpu",
) -> jax.Array:
    """Causal attention within equal segments: what each head reads, (B, Q, N, H) in the type of the values.

    segments   1 1 1 2 0        sees   x . . . .        with a window of 2   x . . . .
                                       x x . . .                             x x . . .
                                       x x x . .                             . x x . .
                                       . . . x .                             . . . x .
                                       . . . . x                             . . . . x

    Keys and values are of whole rows; queries too, or of those of their positions that `stripes` says. `platform` is what
    the program is made for, which jax itself only learns when it is lowered.
    """
    read = IMPLEMENTATIONS[implementation].attend
    return read(q_BQNH, k_BTKH, v_BTKH, segments, scores, sinks_N, stripes, platform=platform)


def best_first(case: Case) -> list[str]:
    """Names of all implementations in the order to try them in."""
    return sorted(IMPLEMENTATIONS, key=lambda name: not IMPLEMENTATIONS[name].suits(case))


def available(case: Case) -> tuple[str, ...]:
    """Names of the implementations that can do a case on its platform, best first."""

    def can(implementation: Implementation) -> bool:
        return case.platform in implementation.platforms and not implementation.refuses(case)

    return tuple(name for name in best_first(case) if can(IMPLEMENTATIONS[name]))


def check(name: str) -> None:
    """Raises ValueError for a name from a config that nothing has."""
    known = ("auto", *IMPLEMENTATIONS)
    if name not in known:
        raise ValueError(f"config.attention: {name!r} is unknown;{nearest(name, known)} Known: {', '.join(known)}")


def choose(name: str, case: Case) -> str:
    """The implementation behind a name from a config; "auto" is the best one that can do the case.

    Raises ValueError where the one that is named cannot: what would ignore a part of the case is not used.
    """
    check(name)
    if name == "auto":
        return available(case)[0]
    if why := IMPLEMENTATIONS[name].refuses(case):
        raise ValueError(f"config.attention: {name}: {why}; possible here: {', '.join(('auto', *available(case)))}")
    return name
