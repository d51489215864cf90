"""Attention within packed examples, against sums written out in float64."""

from functools import cache
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from itjax.kernels import attention, plain
from itjax.kernels.attention import Scores, Segments

PLAIN_XLA = ("blockwise", "reference")
PLAIN = Scores(8**-0.5)
SINKS = np.array([0.3, -1.2, 4.0, 0.9])  # 4.0: above all scores of its head, so it is the softmax's maximum

SWITCHES = {
    "plain": (PLAIN, None),
    "softcap": (Scores(0.7, softcap=2.0), None),
    "window": (PLAIN._replace(window=20), None),
    "sinks": (PLAIN, SINKS),
    "all": (Scores(0.7, softcap=3.0, window=20), SINKS),
}

each_implementation = pytest.mark.parametrize("name", PLAIN_XLA)
each_switch = pytest.mark.parametrize("scores, sinks", SWITCHES.values(), ids=SWITCHES)


def inputs(*, rows: int, length: int, heads: int, kv_heads: int, head_size: int = 8, seed: int = 0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(rows, length, n, head_size)) for n in (heads, kv_heads, kv_heads))
    segments = np.sort(rng.integers(1, 4, (rows, length)), axis=1)
    segments[:, length - length // 4 :] = 0  # padding
    return q, k, v, segments.astype(np.int32)


def two_blocks():
    return inputs(rows=1, length=100, heads=4, kv_heads=2)


def written_out(q_BTNH, k_BTKH, v_BTKH, segments_BT, scores=PLAIN, sinks_N=None):
    """Every query by itself, float64."""
    out = np.zeros_like(q_BTNH)
    for b, t, n in np.ndindex(q_BTNH.shape[:3]):
        first = max(0, t - scores.window + 1) if scores.window else 0
        seen = [s for s in range(first, t + 1) if segments_BT[b, s] == segments_BT[b, t]]
        head = n * k_BTKH.shape[2] // q_BTNH.shape[2]
        row = k_BTKH[b, seen, head] @ q_BTNH[b, t, n] * scores.scale
        if scores.softcap:
            row = scores.softcap * np.tanh(row / scores.softcap)
        highest = row.max() if sinks_N is None else max(row.max(), sinks_N[n])
        total = np.exp(row - highest).sum() + (0.0 if sinks_N is None else np.exp(sinks_N[n] - highest))
        out[b, t, n] = np.exp(row - highest) @ v_BTKH[b, seen, head] / total
    return out


@cache
def compiled(name, scores, block):
    """Attention, and the gradient of Σ read·mix in queries, keys, values and sinks."""

    @jax.jit
    def attend(q, k, v, segments, sinks):
        with mock.patch.object(plain, "BLOCK", block):
            return attention.attend(
                q, k, v, Segments(segments, segments), implementation=name, scores=scores, sinks_N=sinks
            )

    def total(moved, segments, mix):
        *qkv, sinks = moved
        return (attend(*qkv, segments, sinks) * mix).sum()

    return attend, jax.jit(jax.grad(total))


def single(*arrays):
    return tuple(None if x is None else jnp.asarray(x, jnp.float32) for x in arrays)


def run(name, q, k, v, segments, scores=PLAIN, sinks=None, *, block=plain.BLOCK):
    q, k, v, sinks = single(q, k, v, sinks)
    return np.asarray(compiled(name, scores, block)[0](q, k, v, segments, sinks))


def slopes(name, q, k, v, segments, mix, scores, sinks):
    """Gradients in queries, keys, values and, where there are, sinks."""
    grads = compiled(name, scores, plain.BLOCK)[1](single(q, k, v, sinks), segments, *single(mix))
    return [np.asarray(grad) for grad in grads if grad is not None]


def seen(length, *, window):
    """Which positions each position reads, as a picture."""
    same, values = np.zeros((1, length, 1, length)), np.eye(length)[None, :, None]
    segments = np.array([[1] * 5 + [2] * (length - 6) + [0]])
    pictures = []
    for name in PLAIN_XLA:
        read = run(name, same, same, values, segments, PLAIN._replace(window=window), block=4)
        pictures.append(["".join("x" if value else "." for value in row) for row in read[0, :, 0]])
    assert pictures[0] == pictures[1]
    return pictures[0]


@each_implementation
@pytest.mark.parametrize("length, heads, kv_heads", [(1, 4, 2), (7, 4, 4), (7, 3, 1)])
def test_values_are_those_of_the_sums_written_out_for_any_heads(name, length, heads, kv_heads):
    q, k, v, segments = inputs(rows=2, length=length, heads=heads, kv_heads=kv_heads)
    np.testing.assert_allclose(run(name, q, k, v, segments), written_out(q, k, v, segments), atol=3e-6)


@each_switch
@each_implementation
def test_values_are_those_of_the_sums_written_out_for_every_switch(name, scores, sinks):
    q, k, v, segments = two_blocks()
    expected = written_out(q, k, v, segments, scores, sinks)
    np.testing.assert_allclose(run(name, q, k, v, segments, scores, sinks), expected, atol=3e-6)


@settings(max_examples=6, deadline=None)
@given(
    segments=st.lists(st.lists(st.integers(0, 3), min_size=24, max_size=24), min_size=4, max_size=4),
    sizes=st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)]),
    scores=st.builds(
        Scores, scale=st.floats(0.05, 2.0), softcap=st.sampled_from([0.0, 0.5, 30.0]), window=st.integers(0, 26)
    ),
    has_sinks=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example([[1] * 24] * 4, (2, 2), Scores(0.5, window=12), False, 0)  # a window of more than a block, and less than two
def test_values_hold_for_any_segments_windows_caps_and_sinks(segments, sizes, scores, has_sinks, seed):
    kv_heads, group = sizes
    heads = kv_heads * group
    q, k, v, _ = inputs(rows=4, length=24, heads=heads, kv_heads=kv_heads, head_size=4, seed=seed)
    sinks = np.random.default_rng(seed).normal(size=heads) * 3 if has_sinks else None
    segments = np.array(segments, np.int32)  # in any order: equality is all that counts
    expected = written_out(q, k, v, segments, scores, sinks)
    for name in PLAIN_XLA:
        read = run(name, q, k, v, segments, scores, sinks, block=8)
        np.testing.assert_allclose(read, expected, atol=5e-6)


def test_a_position_sees_what_came_before_it_in_its_own_segment():
    assert seen(9, window=0) == [
        "x........",
        "xx.......",
        "xxx......",
        "xxxx.....",
        "xxxxx....",
        ".....x...",
        ".....xx..",
        ".....xxx.",
        "........x",
    ]


def test_a_window_of_three_is_a_position_and_the_two_before_it():
    assert seen(9, window=3) == [
        "x........",
        "xx.......",
        "xxx......",
        ".xxx.....",
        "..xxx....",
        ".....x...",
        ".....xx..",
        ".....xxx.",
        "........x",
    ]


@each_implementation
def test_a_sink_takes_probability_and_gives_nothing(name):
    q, v = np.zeros((1, 3, 1, 8)), np.ones((1, 3, 1, 8))  # every key scores 0, and the sink as much as 3 keys
    read = run(name, q, q, v, np.ones((1, 3), np.int32), sinks=np.array([np.log(3.0)]))
    np.testing.assert_allclose(read[0, :, 0, 0], [1 / 4, 2 / 5, 3 / 6], rtol=1e-6)


@each_implementation
def test_no_score_is_beyond_the_cap(name):
    q, k, v = np.full((1, 2, 1, 8), 100.0), np.zeros((1, 2, 1, 8)), np.zeros((1, 2, 1, 8))
    k[:, 0], v[:, 0] = 100.0, 1.0  # the first key scores 28284 and the second 0
    read = run(name, q, k, v, np.ones((1, 2), np.int32), PLAIN._replace(softcap=2.0))
    np.testing.assert_allclose(read[0, 1, 0], np.exp(2) / (np.exp(2) + 1), rtol=1e-6)


@pytest.mark.parametrize("switch", ["plain", "all"])
@each_implementation
def test_gradients_are_slopes_of_the_sums_written_out(name, switch):
    scores, sinks = SWITCHES[switch]
    q, k, v, segments = two_blocks()
    rng = np.random.default_rng(1)
    mix = rng.normal(size=q.shape)
    moved = {"q_BTNH": q, "k_BTKH": k, "v_BTKH": v} | ({} if sinks is None else {"sinks_N": sinks})
    grads = slopes(name, q, k, v, segments, mix, scores, sinks)
    for (changed, x), grad in zip(moved.items(), grads, strict=True):
        way = rng.normal(size=grad.shape)
        ends = [
            (written_out(**(moved | {changed: x + step * way}), segments_BT=segments, scores=scores) * mix).sum()
            for step in (1e-4, -1e-4)
        ]
        slope = (ends[0] - ends[1]) / 2e-4
        assert float((np.asarray(grad, np.float64) * way).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-4)


@each_switch
def test_gradients_of_blocks_are_those_of_the_definition(scores, sinks):
    q, k, v, segments = two_blocks()
    mix = np.random.default_rng(1).normal(size=q.shape)
    ours, definition = (slopes(name, q, k, v, segments, mix, scores, sinks) for name in ("blockwise", "reference"))
    assert len(ours) == len(definition) == (3 if sinks is None else 4)
    for a, b in zip(ours, definition, strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@each_switch
@each_implementation
def test_other_segments_and_padding_have_exactly_no_influence(name, scores, sinks):
    q, k, v, segments = two_blocks()
    before = run(name, q, k, v, segments, scores, sinks)
    others = segments != 2
    k, v = (np.where(others[..., None, None], 1e3 * x + 7, x) for x in (k, v))
    after = run(name, q, k, v, segments, scores, sinks)
    assert (segments == 2).any()
    np.testing.assert_array_equal(after[segments == 2], before[segments == 2])
    assert np.isfinite(after).all()
    assert np.abs(after - before)[others].max() > 1


@each_switch
@each_implementation
def test_exactly_no_gradient_flows_to_other_segments(name, scores, sinks):
    q, k, v, segments = two_blocks()
    own = np.broadcast_to((segments == 2)[..., None, None], q.shape)
    _, k_grad, v_grad, *_ = slopes(name, q, k, v, segments, own, scores, sinks)
    for grad in (k_grad, v_grad):
        np.testing.assert_array_equal(grad[segments != 2], 0.0)
        assert np.abs(grad).max() > 0.1


@pytest.mark.parametrize("switch", ["plain", "all"])
@each_implementation
def test_bfloat16_stays_bfloat16_and_close(name, switch):
    scores, sinks = SWITCHES[switch]
    *qkv, segments = inputs(rows=1, length=130, heads=4, kv_heads=2)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv)
    sinks = None if sinks is None else jnp.asarray(sinks, jnp.bfloat16)
    read = compiled(name, scores, plain.BLOCK)[0](q, k, v, segments, sinks)
    assert read.dtype == jnp.bfloat16
    q, k, v, sinks = (None if x is None else np.asarray(x, np.float64) for x in (q, k, v, sinks))
    np.testing.assert_allclose(np.asarray(read, np.float64), written_out(q, k, v, segments, scores, sinks), atol=0.02)


@pytest.mark.parametrize("head_size", [64, 128])  # 128^-1/2 is no power of 2
def test_queries_in_bfloat16_are_not_rounded_a_second_time(head_size):
    q, k, v, segments = inputs(rows=1, length=64, heads=2, kv_heads=2, head_size=head_size)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (2 * q, 2 * k, v))
    scores = Scores(head_size**-0.5)
    exact = written_out(*(np.asarray(x, np.float64) for x in (q, k, v)), segments, scores)
    read = attention.attend(q, k, v, Segments(segments, segments), implementation="blockwise", scores=scores)
    error = np.asarray(read, np.float64) - exact
    assert np.sqrt((error**2).mean() / (exact**2).mean()) < 2**-9  # 1.7e-3; it would be 3.6e-3


def test_a_step_with_a_cache_reads_what_the_whole_row_reads():
    scores, sinks = SWITCHES["all"]
    q, k, v, _ = inputs(rows=2, length=40, heads=4, kv_heads=2)
    whole = run("reference", q, k, v, np.ones((2, 40), np.int32), scores, sinks)
    slots = np.arange(50)  # 10 of them not filled yet
    k_BSKH, v_BSKH = (np.pad(x, ((0, 0), (0, 10), (0, 0), (0, 0)), constant_values=9.0) for x in (k, v))
    sees_BTS = np.broadcast_to((slots <= 39) & (slots > 39 - scores.window), (2, 1, 50))
    arrays = single(q[:, 39:], k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2))
    step = attention.read(*arrays, sees_BTS, scores=scores, sinks_N=jnp.asarray(sinks, jnp.float32))
    np.testing.assert_allclose(step, whole[:, 39:], atol=1e-6)


@pytest.mark.parametrize("sinks, expected", [(None, 2.0), (np.array([0.0]), 0.0)])
def test_a_query_that_sees_nothing_reads_numbers(sinks, expected):
    q, k, v = jnp.ones((1, 1, 1, 8)), jnp.ones((1, 1, 3, 8)), jnp.full((1, 1, 3, 8), 2.0)
    read = attention.read(q, k, v, jnp.zeros((1, 1, 3), bool), scores=PLAIN, sinks_N=sinks)
    np.testing.assert_array_equal(read, np.full((1, 1, 1, 8), expected))


def test_keys_outside_of_the_window_are_not_computed():
    def flops(length, window):
        x = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)
        attend, _ = compiled("blockwise", Scores(1.0, window=window), plain.BLOCK)
        return attend.lower(x, x, x, jax.ShapeDtypeStruct((1, length), jnp.int32), None).cost_analysis()["flops"]

    whole, near = (64 + 1024) / 2, (64 + 15 * (63 + 64)) / 16  # keys for each of 16 blocks of 64 queries, on average
    assert flops(1024, 64) / flops(1024, 0) == pytest.approx(near / whole, rel=0.05)
    assert flops(1024, 64) / flops(512, 64) == pytest.approx(2, rel=0.05)


def case(**changes):
    plain = {"platform": "cpu", "length": 64, "heads": 4, "kv_heads": 2, "head_size": 8, "dtype": "float32"}
    return attention.Case(**{**plain, "scores": PLAIN, **changes})


def test_auto_is_the_best_one_of_a_platform():
    for platform in ("cpu", "gpu", "tpu"):
        assert attention.choose("auto", case(platform=platform)) == attention.available(case(platform=platform))[0]


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"config.attention: 'blockwize' is unknown.*'blockwise'"):
        attention.choose("blockwize", case())
