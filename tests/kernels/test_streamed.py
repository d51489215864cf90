"""Attention in blocks that are streamed, against sums and their gradients written out in float64."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from itjax.kernels import attention, plain, streamed
from itjax.kernels.attention import Scores, Segments, Stripes
from itjax.kernels.streamed import Blocks

B, T, H = 2, 24, 4
SINKS = np.array([0.3, -1.2, 4.0, 0.9])  # 4.0: above all scores of its head, so it is the softmax's maximum
PACKED = np.array([[1] * 3 + [2] * 9 + [3] * 8 + [0] * 4, [1] * 24], np.int32)
SWITCHES = {  # scores, sinks, (query heads, key/value heads), parts of stripes, blocks
    "plain": (Scores(0.5), False, (4, 2), 1, Blocks(8, 5, False)),
    "everything": (Scores(0.7, softcap=2.0, window=7), True, (4, 2), 1, Blocks(5, 8, True)),
    "everything in 2 parts": (Scores(0.7, softcap=2.0, window=7), True, (4, 1), 2, Blocks(4, 8, True)),
    "4 parts, rows together": (Scores(0.7, window=9), True, (4, 4), 4, Blocks(4, 4, False)),
    "one block": (Scores(0.5, window=1), True, (4, 4), 1, Blocks(512, 512, False)),
}
each_switch = pytest.mark.parametrize("switch", SWITCHES)
any_segments = st.lists(st.lists(st.integers(-1, 3), min_size=T, max_size=T), min_size=B, max_size=B)


def inputs(heads, seed=0):
    """Queries, keys, values, and what the results are multiplied with before they are added up."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(B, T, n, H)) for n in (*heads, heads[1], heads[0])]


def places_of(part, parts):
    return np.asarray(Stripes(part, parts, T // parts**2 or 1).places_Q(T // parts))


def sees(segments_BT, window):
    back_TT = np.arange(T)[:, None] - np.arange(T)
    near_TT = (back_TT >= 0) & (back_TT < window) if window else back_TT >= 0
    return (segments_BT[:, :, None] == segments_BT[:, None]) & near_TT


def written_out(q_BTNH, k_BTKH, v_BTKH, mix_BTNH, segments_BT, scores, sinks_N):
    """What heads read, and the gradients of Σ read·mix by queries, keys, values and sinks; all in float64."""
    (_, _, N, _), K = q_BTNH.shape, k_BTKH.shape[2]
    k_BTNH, v_BTNH = (np.repeat(x, N // K, axis=2) for x in (k_BTKH, v_BTKH))
    raw_BNTS = np.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH) * scores.scale
    capped_BNTS = scores.softcap * np.tanh(raw_BNTS / scores.softcap) if scores.softcap else raw_BNTS
    exp_BNTS = np.exp(capped_BNTS) * sees(segments_BT, scores.window)[:, None]
    sink_1N1 = np.zeros((1, N, 1)) if sinks_N is None else np.exp(sinks_N)[None, :, None]
    total_BNT = exp_BNTS.sum(-1) + sink_1N1
    p_BNTS = exp_BNTS / total_BNT[..., None]
    read_BTNH = np.einsum("BNTS,BSNH->BTNH", p_BNTS, v_BTNH)
    average_BNT = (read_BTNH * mix_BTNH).sum(-1).swapaxes(1, 2)
    grad_BNTS = p_BNTS * (np.einsum("BTNH,BSNH->BNTS", mix_BTNH, v_BTNH) - average_BNT[..., None]) * scores.scale
    if scores.softcap:
        grad_BNTS *= 1 - np.tanh(raw_BNTS / scores.softcap) ** 2
    of_group = (B, T, K, N // K, H)
    return read_BTNH, [
        np.einsum("BNTS,BSNH->BTNH", grad_BNTS, k_BTNH),
        np.einsum("BNTS,BTNH->BSNH", grad_BNTS, q_BTNH).reshape(of_group).sum(3),
        np.einsum("BNTS,BTNH->BSNH", p_BNTS, mix_BTNH).reshape(of_group).sum(3),
        *([] if sinks_N is None else [-(sink_1N1 / total_BNT * average_BNT).sum((0, 2))]),
    ]


@cache
def compiled(switch, way="streamed"):
    """What one part of the stripes reads, and its gradients."""
    scores, _, _, parts, blocks = SWITCHES[switch]

    @jax.jit
    def read_and_grads(q, k, v, sinks, mix, queries_BQ, keys_BT, part):
        stripes = Stripes(part, parts, T // parts**2 or 1)

        def read(q, k, v, sinks):
            about = (Segments(queries_BQ, keys_BT), scores, sinks, stripes)
            if way == "reference":
                return plain.reference(q, k, v, *about)
            return streamed.in_blocks(q, k, v, *about, blocks=blocks)

        values, pull = jax.vjp(read, q, k, v, sinks)
        return values, pull(mix)

    return read_and_grads


def run(switch, arrays, segments_BT, *, way="streamed", part=None):
    """Values and gradients of a whole row, put together from all parts of its stripes; or those of one part."""
    _, has_sinks, heads, parts, _ = SWITCHES[switch]
    q, k, v, mix = (jnp.asarray(x, jnp.float32) for x in arrays)
    sinks = jnp.asarray(SINKS[: heads[0]], jnp.float32) if has_sinks else None
    values, q_grad, others = np.zeros(q.shape), np.zeros(q.shape), []
    for one in range(parts) if part is None else [part]:
        places = places_of(one, parts)
        read, (q_grad[:, places], *rest) = compiled(switch, way)(
            q[:, places], k, v, sinks, mix[:, places], segments_BT[:, places], segments_BT, one
        )
        values[:, places] = read
        others.append([np.asarray(x, np.float64) for x in rest if x is not None])
    return values, [q_grad, *(sum(same) for same in zip(*others, strict=True))]


def close(ours, theirs):
    (read, grads), (expected, slopes) = ours, theirs
    assert len(grads) == len(slopes)
    for a, b in zip([read, *grads], [expected, *slopes], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(b).max()))


@each_switch
@settings(max_examples=8, deadline=None)
@given(segments=any_segments, seed=st.integers(0, 2**16))
@example(PACKED.tolist(), 0)
@example([[0] * T] * B, 0)  # nothing but padding
@example([[1] * 5 + [7] * 9 + [0] * 10, [3, 1] * 12], 0)  # numbers with gaps, documents in pieces
def test_values_and_gradients_are_those_of_the_sums_written_out_for_any_segments(switch, segments, seed):
    scores, has_sinks, heads, *_ = SWITCHES[switch]
    arrays, segments = inputs(heads, seed), np.array(segments, np.int32)
    expected = written_out(*arrays, segments, scores, SINKS[: heads[0]] if has_sinks else None)
    close(run(switch, arrays, segments), expected)


@pytest.mark.parametrize("switch", ["everything", "4 parts, rows together"])
def test_values_and_gradients_are_those_of_the_definition(switch):
    arrays = inputs(SWITCHES[switch][2])
    close(run(switch, arrays, PACKED), run(switch, arrays, PACKED, way="reference"))


@each_switch
def test_other_documents_have_exactly_no_influence_and_get_exactly_no_gradient(switch):
    q, k, v, mix = inputs(SWITCHES[switch][2])
    own = PACKED == 2
    before, _ = run(switch, (q, k, v, mix), PACKED)
    k, v = (np.where(own[..., None, None], x, 1e3 * x + 7) for x in (k, v))
    after, grads = run(switch, (q, k, v, mix * own[..., None, None]), PACKED)
    np.testing.assert_array_equal(after[own], before[own])
    assert np.abs(after - before)[~own].max() > 1
    for grad in grads[:3]:
        np.testing.assert_array_equal(grad[~own], 0.0)
        assert np.abs(grad[own]).max() > 0.01


def test_blocks_of_keys_that_a_block_of_queries_does_not_meet_are_never_read():
    q, k, v, mix = inputs((4, 2))
    segments = np.array([[1] * 8 + [2] * 16] * B, np.int32)  # document 2 begins with a block of queries
    k[:, :5], v[:, :5] = np.nan, np.nan  # the first block of keys, all of document 1
    read, (q_grad, k_grad, v_grad) = run("plain", (q, k, v, mix), segments)
    assert np.isnan(read[:, :8]).all()
    for x in (read, q_grad):
        assert np.isfinite(x[:, 8:]).all()
    for x in (k_grad, v_grad):
        assert np.isfinite(x[:, 10:]).all()  # positions 8 and 9 are in one block with the last of document 1


@partial(jax.jit, static_argnums=(3, 4))
def reach_of(queries_BQ, keys_BT, places_Q, blocks, window):
    return streamed.reach(Segments(queries_BQ, keys_BT), places_Q, blocks, window=window)


def reach(segments_BT, places_Q, blocks, window):
    return [np.asarray(x) for x in reach_of(segments_BT[:, places_Q], segments_BT, places_Q, blocks, window)]


def test_blocks_of_queries_meet_the_blocks_of_keys_that_documents_touch():
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 0, 0]])
    first, stop = reach(segments, np.arange(12), Blocks(4, 4, True), 0)
    assert (first.tolist(), stop.tolist()) == ([[0, 0, 0]], [[1, 2, 3]])
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 0, 0], [1] * 12])
    first, stop = reach(segments, np.arange(12), Blocks(4, 4, True), 0)
    assert (first.tolist(), stop.tolist()) == ([[0, 1, 1], [0, 0, 0]], [[1, 2, 3]] * 2)
    first, stop = reach(segments, np.arange(12), Blocks(4, 4, False), 0)  # what any row needs
    assert (first.tolist(), stop.tolist()) == ([[0, 0, 0]], [[1, 2, 3]])
    first, stop = reach(segments, np.arange(12), Blocks(4, 4, True), 5)  # position 8 sees 4 to 8
    assert (first.tolist(), stop.tolist()) == ([[0, 1, 1], [0, 0, 1]], [[1, 2, 3]] * 2)


@settings(max_examples=40, deadline=None)
@given(
    segments=any_segments,
    setting=st.sampled_from(
        [
            (Blocks(4, 4, True), 1, 0),
            (Blocks(3, 8, False), 1, 9),
            (Blocks(4, 5, True), 2, 4),
            (Blocks(1, 1, True), 1, 1),
        ]
    ),
    is_packed=st.booleans(),
)
def test_every_key_that_is_seen_is_met_and_the_first_and_last_blocks_that_are_met_are_seen(
    segments, setting, is_packed
):
    (blocks, parts, window), segments = setting, np.array(segments, np.int32)
    if is_packed:
        segments = np.sort(np.where(segments <= 0, 9, segments), axis=1) % 9
    for part in range(parts):
        places = places_of(part, parts)
        first, stop = reach(segments, places, blocks, window)
        seen_BQS = sees(segments, window)[:, places]
        for number in range(-(-len(places) // blocks.queries)):
            here_BS = seen_BQS[:, number * blocks.queries : (number + 1) * blocks.queries].any(1)
            for row, seen_S in enumerate(here_BS if blocks.by_row else here_BS.any(0)[None]):
                needed = np.flatnonzero(seen_S) // blocks.keys
                assert first[row, number] <= needed.min()
                assert stop[row, number] > needed.max()
                if is_packed and not window:  # a window is looked at for a block of queries, and not for each
                    assert (first[row, number], stop[row, number]) == (needed.min(), needed.max() + 1)


def layer(x, segments):
    q = x * 2
    return x + streamed.attend(q, q, x, Segments(segments, segments), Scores(0.3), platform="cpu")


def test_memory_grows_with_the_length_and_not_with_its_square():
    def scratch(length):
        x, segments = (jax.ShapeDtypeStruct(*one) for one in (((1, length, 2, 16), "float32"), ((1, length), "int32")))
        grad = jax.jit(jax.grad(lambda x, segments: layer(x, segments).sum()))
        return grad.lower(x, segments).compile().memory_analysis().temp_size_in_bytes

    assert scratch(4096) / scratch(2048) == pytest.approx(2, rel=0.05)


def test_what_is_left_for_the_backward_pass_has_a_name_and_who_keeps_it_does_not_read_again():
    def loops(policy):
        made_again = layer if policy is None else jax.checkpoint(layer, policy=policy)
        grad = jax.grad(lambda x: made_again(x, np.ones((1, 256), np.int32)).sum())
        return str(jax.make_jaxpr(grad)(np.ones((1, 256, 2, 16), np.float32))).count(" while[")

    policies = jax.checkpoint_policies
    assert loops(None) == loops(policies.save_only_these_names(streamed.ATTENDED)) == 2
    assert loops(policies.nothing_saveable) == 3


def test_bfloat16_stays_bfloat16_and_close():
    scores, _, heads, *_ = SWITCHES["plain"]
    q, k, v, mix = (jnp.asarray(x, jnp.bfloat16) for x in inputs(heads))
    read, grads = compiled("plain")(q, k, v, None, mix, PACKED, PACKED, 0)
    expected, slopes = written_out(*(np.asarray(x, np.float64) for x in (q, k, v, mix)), PACKED, scores, None)
    for ours, exact in zip([read, *grads[:3]], [expected, *slopes], strict=True):
        assert ours.dtype == jnp.bfloat16
        assert np.sqrt(((np.asarray(ours, np.float64) - exact) ** 2).mean() / (exact**2).mean()) < 2**-7


def test_parts_on_a_mesh_read_what_one_device_reads():
    arrays = [jnp.asarray(x, jnp.float32) for x in inputs((4, 4))]
    q, k, v, mix = arrays
    sinks = jnp.asarray(SINKS, jnp.float32)
    mesh = jax.make_mesh((2, 2), ("data", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    by_row, whole = jax.P("data"), jax.P()
    scores = Scores(0.7, softcap=2.0, window=7)
    order = np.concatenate([places_of(part, 2) for part in range(2)])

    def on_device(q, k, v, segments_BQ, segments_BT, sinks):
        stripes = Stripes(jax.lax.axis_index("context"), 2, T // 4)
        return streamed.in_blocks(
            q, k, v, Segments(segments_BQ, segments_BT), scores, sinks, stripes, blocks=Blocks(4, 8, True)
        )

    cut = jax.P("data", "context")
    read = jax.shard_map(on_device, mesh=mesh, in_specs=(cut, by_row, by_row, cut, by_row, whole), out_specs=cut)
    moved = jax.jit(
        jax.grad(lambda q, k, v, s: (read(q, k, v, PACKED[:, order], PACKED, s) * mix[:, order]).sum(), (0, 1, 2, 3))
    )
    grads = moved(q[:, order], k, v, sinks)
    _, slopes = written_out(*(np.asarray(x, np.float64) for x in arrays), PACKED, scores, SINKS)
    slopes[0] = slopes[0][:, order]
    for grad, slope in zip(grads, slopes, strict=True):
        np.testing.assert_allclose(grad, slope, atol=1e-5, rtol=1e-5)


def test_long_rows_are_streamed_where_nothing_better_can_be_had():
    def first(platform, length):
        case = attention.Case(platform, length, 4, 2, 8, "float32", Scores(0.5))
        return min(("blockwise", "streamed"), key=attention.best_first(case).index)

    assert [first("cpu", length) for length in (512, 1024, 8192)] == ["blockwise", "streamed", "streamed"]
    assert first("gpu", 512) == first("tpu", 512) == "streamed"
    assert attention.choose("auto", attention.Case("cpu", 4096, 4, 2, 8, "float32", Scores(0.5))) == "streamed"
