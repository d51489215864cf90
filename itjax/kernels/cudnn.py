"""Attention of NVIDIA's cuDNN over packed rows: each segment is a sequence of its own, and nothing between them is computed.

cuDNN reads sequences of any lengths out of one array, by where each begins and how long it is. The public function of jax
takes lengths of whole rows only, so this calls the one below it, whose arguments are

    segments   1 1 1 2 2 0      lengths   3 2 -1      offsets   0 3 -1 -1       -1: a slot that no segment has
               1 1 1 1 1 1                6 -1 -1               0 -1 -1 -1

A row has a fixed number of slots. Rows with more segments go round again: the next round takes the next segments of every
row, and there are as many rounds as the fullest row needs, which a program finds out when it runs.

Memory of positions that are in no slot is never written, so what is read from there is replaced by zeros, forward and back.

B rows, T positions, N query heads, K key/value heads, H head size, M slots of a row.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from itjax.kernels.case import ATTENDED, Case, Scores, Segments, Stripes

lower: Any
try:
    from jax._src.cudnn import fused_attention_stablehlo as lower
except ImportError:  # it is not public, so a jax to come may be without it
    lower = None

POSITIONS_PER_SLOT = 64  # rows of documents half as long as usual still take one round
MOST_SLOTS = 128  # sums of exponents take 4·M·N bytes a position while a layer is worked on
OFFSETS = 2**31  # numbers that offsets, which are int32, tell apart

# Before jax 0.11.1 segments of fewer key/value heads than query heads were looked for in wrong places, without an error:
# https://github.com/jax-ml/jax/pull/39521
GROUPS_HEADS = jax.__version_info__ >= (0, 11, 1)


class Device(NamedTuple):
    capability: str  # compute capability, "9.0" for Hopper
    version: int  # of cuDNN, 91002 for 9.10.2; 0: jax does not say


_ABSENT: ContextVar[Device | None] = ContextVar("absent", default=None)


@contextlib.contextmanager
def absent(capability: str = "9.0", *, version: int = 91002) -> Iterator[None]:
    """In this scope programs are lowered for a device that is not attached, with this compute capability and cuDNN.

    jax asks the attached device what it can, while it traces; here this answers. Nothing that is compiled can run here.
    """
    answers = {
        "check_cudnn_version": lambda: version,
        "check_compute_capability": lambda wanted: number(capability) >= number(wanted),
        "is_cuda_compute_capability_equal": lambda wanted: capability == wanted,
    }
    asked = {name: getattr(lower, name) for name in answers}
    token = _ABSENT.set(Device(capability, version))
    try:
        for name, answer in answers.items():
            setattr(lower, name, answer)
        yield
    finally:
        for name, question in asked.items():
            setattr(lower, name, question)
        _ABSENT.reset(token)


def device() -> Device | None:
    """The device that programs are lowered for: of the `absent` scope or attached; None where there is none with cuDNN."""
    if (said := _ABSENT.get()) is not None:
        return said
    if jax.default_backend() != "gpu":
        return None
    attached = jax.local_devices()[0]
    versions = getattr(lower, "cuda_versions", None)
    if "cuda" not in attached.client.platform_version or (lower is not None and versions is None):
        return None
    return Device(attached.compute_capability, versions.cudnn_get_version() if versions else 0)


def refuses(case: Case) -> str:
    """Why this cannot be done, or nothing."""
    if case.platform != "gpu":
        return f"cuDNN is for NVIDIA GPUs, and this is for {case.platform}"
    if why := refuses_scores(case):
        return why
    if case.parts > 1:
        return "it wants whole rows; let parallel.context divide the heads, or be 1"
    if case.length * max(case.heads, case.kv_heads) * case.head_size >= OFFSETS:
        return f"a row of {case.length} positions has more numbers than its offsets can count; split it over parallel.context"
    if lower is None:
        return f"jax {jax.__version__} has no such call; 'unpacked' is made of what is public"
    found = device()
    if found is None:
        return "no NVIDIA GPU with cuDNN is attached; pip install 'itjax[cuda]' on a machine that has one"
    if number(found.capability) < (9, 0):
        return f"packed rows need a GPU of compute capability 9.0, Hopper, or newer; this one has {found.capability}"
    return refuses_version(found) or refuses_head_size(case, found)


def refuses_scores(case: Case) -> str:
    """What cuDNN cannot do on any device: the same for packed rows and for rows of one sequence."""
    if case.dtype not in ("bfloat16", "float16"):
        return f"it reads bfloat16 and float16, not {case.dtype}; set dtype"
    if case.scores.softcap:
        return "it has no softcap of scores"
    if case.sinks:
        return "it has no sinks"
    if case.head_size % 8 or case.head_size > 256:
        return f"heads of {case.head_size} are not a multiple of 8 up to 128, or to 256 on Hopper"
    return ""


def refuses_version(found: Device) -> str:
    if 0 < found.version < 90600 or found.version in (91000, 91001):
        return f"cuDNN has to be 9.6 or newer, and not 9.10.0 or 9.10.1 which have faults; this is {found.version}"
    return ""


def refuses_head_size(case: Case, found: Device) -> str:
    if case.head_size > 128 and number(found.capability)[0] != 9:
        return f"heads of {case.head_size} are for Hopper only; on {found.capability} they are 128 at most"
    return ""


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments: Segments,
    scores: Scores,
    sinks_N: jax.Array | None = None,
    stripes: Stripes = Stripes(),  # noqa: B008 (a tuple of numbers)
    *,
    platform: str = "gpu",
) -> jax.Array:
    """Packed attention; what padding reads is 0. Rows are worked on together, as many as offsets can count."""
    del platform  # a GPU
    assert sinks_N is None, "refused"
    assert not scores.softcap, "refused"
    assert stripes.parts == 1, "refused"
    B, T, N, H = q_BTNH.shape
    if not GROUPS_HEADS:
        k_BTKH, v_BTKH = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k_BTKH, v_BTKH))
    together = min(B, (OFFSETS - 1) // (T * N * H))
    parts = [
        _read(scores, *(x[first : first + together] for x in (q_BTNH, k_BTKH, v_BTKH, segments.queries_BQ)))
        for first in range(0, B, together)
    ]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def slots(length: int) -> int:
    """Slots of a row; jax takes rows of one slot for rows that are not packed."""
    return max(2, min(MOST_SLOTS, length // POSITIONS_PER_SLOT))


def numbered(segments_BT: jax.Array) -> jax.Array:
    """Which segment of its row each position is in, from 0; padding, at the end, has the number after the last."""
    starts_BT = jnp.diff(segments_BT, axis=1, prepend=-1) != 0
    return jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32) - 1


def table(numbers_BT: jax.Array, real_BT: jax.Array, first: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Lengths (B, M) and offsets (B, M + 1) of the segments from number `first` on, as jax takes them."""
    wanted_11M = first + jnp.arange(slots(numbers_BT.shape[1]))[None, None, :]
    offsets_BM = (numbers_BT[:, :, None] < wanted_11M).sum(axis=1, dtype=jnp.int32)
    lengths_BM = ((numbers_BT[:, :, None] == wanted_11M) & real_BT[:, :, None]).sum(axis=1, dtype=jnp.int32)
    taken_BM = lengths_BM > 0
    offsets_BM = jnp.where(taken_BM, offsets_BM, -1)
    return jnp.where(taken_BM, lengths_BM, -1), jnp.pad(offsets_BM, ((0, 0), (0, 1)), constant_values=-1)


# --- rounds -----------------------------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """What a round keeps for its way back."""

    pull: Callable[[jax.Array], tuple[jax.Array, ...]]  # a tree, whose leaves are arrays
    o_BTNH: jax.Array  # one of them
    mine_BT: jax.Array  # positions that its slots have


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(scores: Scores, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array) -> jax.Array:
    return _forward(scores, q_BTNH, k_BTKH, v_BTKH, segments_BT)[0]


def _forward(
    scores: Scores, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array
) -> tuple[jax.Array, Any]:
    qkv = (q_BTNH, k_BTKH, v_BTKH)
    o_BTNH, kept = _round(scores, 0, qkv, segments_BT)

    def further(number: jax.Array, o_BTNH: jax.Array) -> jax.Array:
        return o_BTNH + _round(scores, number, qkv, segments_BT)[0]

    o_BTNH = checkpoint_name(_further_rounds(further, o_BTNH, segments_BT), ATTENDED)
    return o_BTNH, (_named(kept, o_BTNH, qkv), qkv, segments_BT)


def _named(kept: Kept, o_BTNH: jax.Array, qkv: tuple[jax.Array, ...]) -> Kept:
    """Names for policies of rematerialisation; and what all rounds have read in place of what one has, to keep it once."""

    def one(leaf: jax.Array) -> jax.Array:
        if leaf is kept.o_BTNH:
            return o_BTNH
        given = any(leaf is x for x in qkv) or not jnp.issubdtype(leaf.dtype, jnp.inexact)
        return leaf if given else checkpoint_name(leaf, ATTENDED)

    return Kept(jax.tree.map(one, kept.pull), o_BTNH, kept.mine_BT)


def _backward(scores: Scores, kept: Any, do_BTNH: jax.Array) -> tuple[Any, ...]:
    """The first round has kept what it needs; others are read again, because nobody knows beforehand how many there are."""
    first, qkv, segments_BT = kept

    def further(number: jax.Array, grads: Any) -> Any:
        _, kept = _round(scores, number, qkv, segments_BT)
        return jax.tree.map(jnp.add, grads, _led_back(kept, do_BTNH))

    return (*_further_rounds(further, _led_back(first, do_BTNH), segments_BT), None)


_read.defvjp(_forward, _backward)


def _further_rounds(further: Callable[[jax.Array, Any], Any], first: Any, segments_BT: jax.Array) -> Any:
    """What the first round gave, and all others add to it."""
    M = slots(segments_BT.shape[1])
    last = jnp.max(numbered(segments_BT), where=segments_BT != 0, initial=0)
    count = last // M + 1
    one = jnp.ones_like(count)  # which varies over the axes of the mesh that the count varies over
    return jax.lax.while_loop(
        lambda now: now[0] < count, lambda now: (now[0] + 1, further(now[0], now[1])), (one, first)
    )[1]


def _round(
    scores: Scores, number: jax.Array | int, qkv: tuple[jax.Array, ...], segments_BT: jax.Array
) -> tuple[jax.Array, Kept]:
    """What the segments of one round read; 0 elsewhere."""
    M = slots(segments_BT.shape[1])
    numbers_BT, real_BT = numbered(segments_BT), segments_BT != 0
    lengths_BM, offsets_BM = table(numbers_BT, real_BT, number * M)
    o_BTNH, pull = jax.vjp(lambda q, k, v: packed(q, k, v, lengths_BM, offsets_BM, scores), *qkv)
    mine_BT = real_BT & (numbers_BT // M == number)
    return _only(mine_BT, o_BTNH), Kept(pull, o_BTNH, mine_BT)


def _led_back(kept: Kept, do_BTNH: jax.Array) -> tuple[jax.Array, ...]:
    """The gradient in queries, keys and values of what a round has read."""
    return tuple(_only(kept.mine_BT, grad) for grad in kept.pull(_only(kept.mine_BT, do_BTNH)))


def _only(mine_BT: jax.Array, x_BTNH: jax.Array) -> jax.Array:
    """Selected and not multiplied: what was never written may be NaN."""
    return jnp.where(mine_BT[:, :, None, None], x_BTNH, jnp.zeros((), x_BTNH.dtype))


def packed(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    lengths_BM: jax.Array,
    offsets_BM: jax.Array,
    scores: Scores,
) -> jax.Array:
    """The call itself; positions that are in no slot are left as they were in memory."""
    return lower.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        q_seqlen=lengths_BM,
        kv_seqlen=lengths_BM,
        q_offsets=offsets_BM,
        kv_offsets=offsets_BM,
        scale=scores.scale,
        mask_type=lower.MaskType.PADDING_CAUSAL,
        sliding_window_length=scores.window or None,
    )


def number(version: str) -> tuple[int, ...]:
    """What can be compared: (9, 0) for "9.0"."""
    return tuple(int(part) for part in version.split("."))
