"""What cuDNN's packed call is specified to do, one segment after the other in float64, over flat memory."""

import functools

import jax
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo as lower


def packed(q_BTNH, k_BTKH, v_BTKH, lengths_BM, offsets_BM, scores):
    """In the place of `itjax.kernels.cudnn.packed`."""
    handed_over = lower._fix_seqlen_offsets(lengths_BM, lengths_BM, offsets_BM, offsets_BM, q_BTNH, k_BTKH)
    return _attend(scores, q_BTNH, k_BTKH, v_BTKH, *handed_over)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scores, q, k, v, *segments):
    return _forward(scores, q, k, v, *segments)[0]


def _forward(scores, q, k, v, *segments):
    o = jax.pure_callback(
        functools.partial(_values, scores), jax.ShapeDtypeStruct(q.shape, q.dtype), q, k, v, *segments
    )
    return o, (q, k, v, segments)


def _backward(scores, kept, do):
    q, k, v, segments = kept
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v))
    grads = jax.pure_callback(functools.partial(_gradients, scores), shapes, q, k, v, do, *segments)
    return (*grads, *(None,) * len(segments))


_attend.defvjp(_forward, _backward)


class Memory:
    """An array as cuDNN has it: an address, heads and a head size. What is never written is NaN."""

    def __init__(self, x, shape):
        self.token = shape[2] * shape[3]
        self.heads = shape[2:]
        self.numbers = np.full(np.prod(shape), np.nan) if x is None else np.asarray(x, np.float64).ravel()

    def load(self, offset, length):
        """Beyond the end there is something, and nobody knows what."""
        there = np.full(length * self.token, np.nan)
        found = self.numbers[offset : offset + length * self.token]
        there[: len(found)] = found
        return there.reshape(length, *self.heads)

    def store(self, offset, values):
        self.numbers[offset : offset + values.size] = values.ravel()


def _values(scores, q, k, v, *segments):
    o = Memory(None, q.shape)
    for place, (_, _, v_SNH, p_NTS, *_) in _each(scores, q, k, v, *segments):
        o.store(place, np.einsum("nts,snh->tnh", p_NTS, v_SNH))
    return o.numbers.reshape(q.shape).astype(q.dtype)


def _gradients(scores, q, k, v, do, *segments):
    dq, dk, dv = (Memory(None, x.shape) for x in (q, k, v))
    do = Memory(do, q.shape)
    for place, (q_TNH, k_SNH, v_SNH, p_NTS, kv_place, group) in _each(scores, q, k, v, *segments):
        do_TNH = do.load(place, len(q_TNH))
        dp_NTS = np.einsum("tnh,snh->nts", do_TNH, v_SNH)
        ds_NTS = p_NTS * (dp_NTS - (p_NTS * dp_NTS).sum(axis=-1, keepdims=True)) * scores.scale
        dq.store(place, np.einsum("nts,snh->tnh", ds_NTS, k_SNH))
        for grad, of_heads in (
            (dk, np.einsum("nts,tnh->snh", ds_NTS, q_TNH)),
            (dv, np.einsum("nts,tnh->snh", p_NTS, do_TNH)),
        ):
            S, N, H = of_heads.shape
            grad.store(kv_place, of_heads.reshape(S, N // group, group, H).sum(axis=2))
    return tuple(grad.numbers.reshape(x.shape).astype(x.dtype) for grad, x in zip((dq, dk, dv), (q, k, v), strict=True))


def _each(scores, q, k, v, q_lengths, kv_lengths, q_offsets, kv_offsets):
    """Every segment that has a length, with its probabilities; keys and values repeated for the heads that read them."""
    group = q.shape[2] // k.shape[2]
    memory = [Memory(x, x.shape) for x in (q, k, v)]
    slots = zip(*(np.ravel(x).tolist() for x in (q_lengths, kv_lengths)), strict=True)
    offsets = zip(*(np.ravel(x).tolist() for x in (q_offsets, kv_offsets)), strict=True)
    for (length, kv_length), (place, kv_place) in zip(slots, offsets, strict=False):  # offsets have places to spare
        if length == 0:
            continue
        q_TNH = memory[0].load(place, length)
        k_SNH, v_SNH = (np.repeat(x.load(kv_place, kv_length), group, axis=1) for x in memory[1:])
        back_TS = np.arange(length)[:, None] - np.arange(kv_length)
        sees_TS = (back_TS >= 0) & (back_TS < (scores.window or length))
        s_NTS = np.where(sees_TS, np.einsum("tnh,snh->nts", q_TNH, k_SNH) * scores.scale, -np.inf)
        p_NTS = np.exp(s_NTS - s_NTS.max(axis=-1, keepdims=True))
        yield place, (q_TNH, k_SNH, v_SNH, p_NTS / p_NTS.sum(axis=-1, keepdims=True), kv_place, group)
