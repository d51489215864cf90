"""Attention through jax's kernels for TPUs: which tiles they are given, what they read, and that TPUs can be compiled for."""

import importlib.util
import os
from functools import cache
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itjax.base.records import PackedBatch
from itjax.base.schema import Architecture, Loss, Parallel
from itjax.kernels import attention, plain, splash
from itjax.kernels.attention import Scores, Segments, Stripes
from itjax.kernels.case import sees_BQT
from itjax.kernels.splash import Tiles
from itjax.models import families
from itjax.models.model import build
from itjax.objectives.sft import sft
from itjax.parallel import layout, topology
from itjax.parallel.mesh import mesh_for
from tests.kernels.test_attention import written_out

DOCUMENTS = [1, 1, 1, 2, 3, 3, 4, 4]  # one position to a tile
SINKS = np.array([0.3, -1.2, 4.0, 0.9])
PLAIN = Scores(0.3)
ALL = Scores(0.3, softcap=3.0, window=100)


@cache
def masks(stripes, window, size):
    return jax.jit(lambda segments: splash.masks(segments, stripes, window=window, size=size))


def given_tiles(segments_BT, stripes=Stripes(), *, window=0, size=Tiles(1, 1)):  # noqa: B008 (tuples of numbers)
    """(B, I, J): which tiles the kernels compute; by their queries, and by their keys."""
    segments_BT = np.atleast_2d(segments_BT)
    B, T = segments_BT.shape
    Q = T // stripes.parts
    segments = Segments(segments_BT[:, stripes.places_Q(Q)], segments_BT)
    pictures = []
    for by_keys, info in enumerate(masks(stripes, window, size)(segments)):
        runs, tile = (np.asarray(x)[0].T if by_keys else np.asarray(x)[0] for x in (info.block_mask, info.data_next))
        X, Y = (T // size.keys, Q // size.queries)[:: 1 if by_keys else -1]
        picture = np.zeros((B, X, B, Y), bool)
        number, step = np.nonzero(runs)
        picture[number // X, number % X, tile[number, step] // Y, tile[number, step] % Y] = True
        own = picture[np.arange(B), :, np.arange(B)]
        assert own.sum() == picture.sum() == runs.sum()  # of the row itself, each once
        pictures.append(own.swapaxes(1, 2) if by_keys else own)
    return pictures


def drawn(picture_IJ):
    return ["".join("x" if value else "." for value in row) for row in picture_IJ]


def test_a_tile_is_given_the_keys_from_its_first_document_to_its_last_query():
    for picture in given_tiles(DOCUMENTS):
        assert drawn(picture[0]) == [
            "x.......",
            "xx......",
            "xxx.....",
            "...x....",
            "....x...",
            "....xx..",
            "......x.",
            "......xx",
        ]


def test_a_tile_is_given_no_keys_before_the_window():
    for picture in given_tiles([1] * 6, window=2):
        assert drawn(picture[0]) == ["x.....", "xx....", ".xx...", "..xx..", "...xx.", "....xx"]


def test_a_window_shortens_the_loop_over_tiles():
    row = np.ones((1, 64), np.int32)
    by_queries, by_keys = jax.eval_shape(masks(Stripes(), 9, Tiles(4, 4)), Segments(row, row))
    assert by_queries.data_next.shape == (1, 16, 3)
    assert by_keys.data_next.shape == (1, 3, 16)


def test_padding_is_given_padding_alone():
    for picture in given_tiles([1, 1, 0, 0]):
        assert drawn(picture[0]) == ["x...", "xx..", "..x.", "..xx"]


def test_a_part_of_the_stripes_is_given_the_keys_of_all_parts():
    for picture in given_tiles([1, 1, 1, 2, 2, 2, 2, 2], Stripes(1, 2, 2)):  # positions 2 3 4 5
        assert drawn(picture[0]) == ["xxx.....", "...x....", "...xx...", "...xxx.."]


def test_while_nothing_is_done_the_tile_that_comes_next_is_loaded():
    rows = np.array([[1, 1, 2], [1, 2, 2]])
    by_queries, _ = masks(Stripes(), 0, Tiles(1, 1))(Segments(rows, rows))
    np.testing.assert_array_equal(
        by_queries.block_mask[0], [[1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0]]
    )
    np.testing.assert_array_equal(
        by_queries.data_next[0], [[0, 0, 0], [0, 1, 2], [2, 3, 3], [3, 4, 4], [4, 4, 4], [4, 5, 0]]
    )


@pytest.mark.parametrize(
    "stripes, window, size",
    [
        (Stripes(), 0, Tiles(4, 4)),
        (Stripes(), 0, Tiles(2, 8)),
        (Stripes(), 13, Tiles(8, 2)),
        (Stripes(1, 2, 16), 0, Tiles(8, 8)),
        (Stripes(2, 4, 4), 9, Tiles(8, 4)),
        (Stripes(3, 4, 2), 0, Tiles(4, 2)),
    ],
)
def test_whatever_is_seen_is_in_a_tile_that_is_given(stripes, window, size):
    rng = np.random.default_rng(0)
    rows = [
        np.repeat(np.arange(1, 65), rng.integers(1, most, 64))[: rng.integers(1, 65)] for most in (2, 4, 12, 40, 70) * 8
    ]
    segments = np.array([np.pad(row, (0, 64 - len(row))) for row in rows])
    places = stripes.places_Q(64 // stripes.parts)
    seen = np.asarray(sees_BQT(Segments(segments[:, places], segments), places, window=window))
    needed = seen.reshape(len(rows), -1, size.queries, 64 // size.keys, size.keys).any(axis=(2, 4))
    for picture in given_tiles(segments, stripes, window=window, size=size):
        assert not (needed & ~picture).any()
        if stripes.parts == 1 and not window:
            np.testing.assert_array_equal(picture, needed)  # and not one more


def test_short_documents_take_few_of_the_tiles_that_a_causal_mask_leaves():
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(6, 0.95, 400)).clip(32, 4096).astype(int)  # 620 on average
    rows = np.repeat(np.arange(1, 401), lengths)[: 16 * 8192].reshape(16, 8192)
    packed, _ = given_tiles(rows, size=Tiles(512, 512))
    assert packed.sum() / (16 * 136) < 0.3


def inputs(*, rows, length, heads, kv_heads, head_size, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v, mix = (rng.normal(size=(rows, length, n, head_size)) for n in (heads, kv_heads, kv_heads, heads))
    segments = np.sort(rng.integers(1, 4, (rows, length)), axis=1)
    segments[:, length - length // 5 :] = 0
    return q, k, v, segments.astype(np.int32), mix


def small(**changes):
    """Two rows of two tiles."""
    return inputs(**{"rows": 2, "length": 256, "heads": 4, "kv_heads": 2, "head_size": 64} | changes)


def single(*arrays):
    return tuple(None if x is None else jnp.asarray(x, jnp.float32) for x in arrays)


@cache
def compiled(function, scores, parts=1, size=0):
    """What is read, and the gradient of Σ read·mix in queries, keys, values and sinks."""

    def total(moved, segments, mix, part):
        q, k, v, sinks = moved
        read = function(q, k, v, segments, scores, sinks, Stripes(part, parts, size))
        return (read.astype(jnp.float32) * mix).sum(), read

    return jax.jit(jax.grad(total, has_aux=True))


def run(function, q, k, v, segments, mix, scores=PLAIN, sinks=None, *, part=0, parts=1, size=0):
    places = Stripes(part, parts, size).places_Q(q.shape[1] // parts)
    q, k, v, sinks, mix = single(q[:, places], k, v, sinks, mix[:, places])
    of = Segments(segments[:, places], segments)
    with mock.patch.object(splash, "LARGEST", 128):
        grads, read = compiled(function, scores, parts, size)((q, k, v, sinks), of, mix, part)
    return [np.asarray(x) for x in (read, *grads) if x is not None]


def agree(ours, definition):
    assert len(ours) == len(definition)
    for a, b in zip(ours, definition, strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_values_and_gradients_are_those_of_the_definition():
    arrays = small()
    agree(run(splash.attend, *arrays, ALL, SINKS), run(plain.reference, *arrays, ALL, SINKS))


def test_values_are_those_of_the_sums_written_out_and_gradients_their_slopes():
    q, k, v, segments, mix = small()
    read, *grads = run(splash.attend, q, k, v, segments, mix, ALL, SINKS)
    np.testing.assert_allclose(read, written_out(q, k, v, segments, ALL, SINKS), atol=3e-6)
    rng = np.random.default_rng(1)
    moved = {"q_BTNH": q, "k_BTKH": k, "v_BTKH": v, "sinks_N": SINKS}
    for (changed, x), grad in zip(moved.items(), grads, strict=True):
        way = rng.normal(size=x.shape)
        ends = [
            (written_out(**(moved | {changed: x + step * way}), segments_BT=segments, scores=ALL) * mix).sum()
            for step in (1e-4, -1e-4)
        ]
        assert float((grad * way).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-5, abs=1e-4)


def test_one_program_serves_every_part_of_the_stripes():
    *qkv, segments, mix = small(rows=1, length=512, heads=2, kv_heads=1)
    before = compiled(splash.attend, PLAIN, 2, 128)._cache_size()
    for part in (0, 1):
        cut = {"part": part, "parts": 2, "size": 128}
        agree(run(splash.attend, *qkv, segments, mix, **cut), run(plain.reference, *qkv, segments, mix, **cut))
    assert compiled(splash.attend, PLAIN, 2, 128)._cache_size() - before <= 1


def test_other_documents_and_padding_have_exactly_no_influence():
    q, k, v, segments, mix = small()
    mix = np.where((segments == 2)[..., None, None], mix, 0)
    read, q_grad, k_grad, v_grad, _ = run(splash.attend, q, k, v, segments, mix, ALL, SINKS)
    others = segments != 2
    for grad in (q_grad, k_grad, v_grad):
        np.testing.assert_array_equal(grad[others], 0.0)
        assert np.abs(grad).max() > 0.1
    k, v = (np.where(others[..., None, None], 1e3 * x + 7, x) for x in (k, v))
    after = run(splash.attend, q, k, v, segments, mix, ALL, SINKS)[0]
    np.testing.assert_array_equal(after[~others], read[~others])
    assert np.isfinite(after).all()


def case(**changes):
    usual = {"platform": "tpu", "length": 1024, "heads": 4, "kv_heads": 2, "head_size": 64, "dtype": "bfloat16"}
    return attention.Case(**{**usual, "scores": PLAIN, **changes})


def test_it_is_what_tpus_get_and_what_others_are_not_given():
    assert attention.choose("auto", case()) == "splash"
    assert "splash" not in attention.available(case(platform="cpu"))
    assert attention.choose("splash", case(platform="cpu")) == "splash"  # by its name
    with pytest.raises(ValueError, match=r"config.attention: splash: its kernels are not for gpu.*possible here: auto"):
        attention.choose("splash", case(platform="gpu"))


def test_a_row_of_no_whole_tiles_is_refused_with_the_next_length_that_is_one():
    assert splash.refuses(case(length=1000)).endswith("the next that are: 1024")
    assert splash.refuses(case(length=1152, parts=4)).endswith(
        "128 positions on each of 4 devices; the next that are: 1536"
    )
    assert attention.choose("auto", case(length=1000)) != "splash"


def test_tiles_divide_what_a_device_has_and_stay_within_a_stripe():
    assert splash.tiles(4096, 4096, Stripes()) == (512, 512)
    assert splash.tiles(1152, 1152, Stripes()) == (384, 384)
    assert splash.tiles(1024, 4096, Stripes(0, 4, 256)) == (256, 512)
    assert splash.tiles(128, 512, Stripes(0, 4, 32)) == (128, 512)


def tpu(name):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the compiler for TPUs, is not installed: pip install itjax[tpu]")
    from jax.experimental import topologies

    with mock.patch.dict(os.environ, topology.ALONE):
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]


def kernels_for(
    device, *, length, heads=(4, 2), head_size=64, rows=1, dtype=jnp.bfloat16, scores=PLAIN, parts=1, size=0
):
    """Compiles attention and its gradient, and says which kernels there are."""

    def total(q, k, v, of, part):
        stripes = Stripes(part, parts, size)
        return splash.attend(q, k, v, of, scores, None, stripes, platform="tpu").astype(jnp.float32).sum()

    def shape(*extents, of=dtype):
        return jax.ShapeDtypeStruct(extents, of, sharding=jax.sharding.SingleDeviceSharding(device))

    N, K = heads
    q, k = shape(rows, length // parts, N, head_size), shape(rows, length, K, head_size)
    of = Segments(shape(rows, length // parts, of=jnp.int32), shape(rows, length, of=jnp.int32))
    program = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, k, of, shape(of=jnp.int32)).compile()
    text = program.as_text()
    return [phase for phase in ("fwd", "dq", "dkv") if f"splash_mha_{phase}_segmented" in text]


def test_a_tpu_can_be_compiled_for():
    assert kernels_for(tpu("v5e:2x2"), length=512) == ["fwd", "dq", "dkv"]


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(
    "shape",
    [
        {"length": 32768, "head_size": 256, "dtype": jnp.float32},
        {"length": 32768, "head_size": 128, "rows": 8},
        {"length": 2176, "head_size": 80},
        {"length": 1152, "head_size": 96, "scores": ALL},
        {"length": 4096, "head_size": 128, "parts": 4, "size": 256},
        {"length": 131072, "head_size": 128, "parts": 8, "size": 512},
    ],
    ids=str,
)
def test_every_tpu_has_the_memory_for_the_tiles(chip, shape):
    assert kernels_for(tpu(chip), **shape) == ["fwd", "dq", "dkv"]


@pytest.mark.slow
@pytest.mark.parametrize("heads, kv_heads, head_size", [(2, 2, 128), (4, 1, 80), (8, 1, 64)])
@pytest.mark.parametrize("scores", [Scores(1.0), Scores(1.0, softcap=2.0), Scores(1.0, window=130)], ids=str)
def test_values_and_gradients_hold_for_any_heads_and_switches(heads, kv_heads, head_size, scores):
    arrays = inputs(rows=2, length=384, heads=heads, kv_heads=kv_heads, head_size=head_size)
    scores = scores._replace(scale=head_size**-0.5)
    agree(run(splash.attend, *arrays, scores), run(plain.reference, *arrays, scores))


@pytest.mark.slow
def test_values_and_gradients_hold_for_four_parts_of_stripes():
    arrays = inputs(rows=2, length=1024, heads=2, kv_heads=1, head_size=64)
    for part in range(4):
        cut = {"part": part, "parts": 4, "size": 64}
        agree(run(splash.attend, *arrays, ALL, **cut), run(plain.reference, *arrays, ALL, **cut))


@pytest.mark.slow
@pytest.mark.parametrize("head_size", [64, 128])
def test_bfloat16_is_as_near_as_that_of_blocks(head_size):
    *arrays, segments, mix = inputs(rows=1, length=256, heads=2, kv_heads=1, head_size=head_size)
    q, k, v, mix = (jnp.asarray(x, jnp.bfloat16) for x in (*arrays, mix))
    scores = Scores(head_size**-0.5)
    of = Segments(segments, segments)
    exact, *results = (
        jax.tree.leaves(compiled(function, scores)((*cast, None), of, mix.astype(jnp.float32), 0))
        for function, cast in (
            (plain.reference, single(q, k, v)),
            (splash.attend, (q, k, v)),
            (plain.blockwise, (q, k, v)),
        )
    )
    ours, theirs = (
        [np.sqrt(((a - b).astype(np.float32) ** 2).mean()) for a, b in zip(x, exact, strict=True)] for x in results
    )
    assert all(a < 1.5 * b for a, b in zip(ours, theirs, strict=True))


def model_gradients(parallel, name, *, rows=4, length=256):
    """Of a tiny model's loss on packed rows."""
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(1, 6, (rows, length)), axis=1)
    segments[:, -40:] = 0
    starts = np.array([[np.searchsorted(-row if number == 0 else row, number) for number in row] for row in segments])
    tokens, targets = rng.integers(0, 128, (2, rows, length))
    fields = {
        "tokens_BT": tokens,
        "targets_BT": targets,
        "segments_BT": segments,
        "positions_BT": np.arange(length) - np.where(segments == 0, length - 40, starts),
        "weights_BT": rng.random((rows, length)) * (segments > 0),
        "source_BT": np.zeros((rows, length)),
    }
    kinds = {field: np.float32 if field == "weights_BT" else np.int32 for field in fields}
    batch = PackedBatch(**{field: fields[field].astype(kinds[field]) for field in PackedBatch._fields})
    config = families.resolve("tiny", Architecture(), vocab=128)
    mesh = mesh_for(parallel, jax.devices()[: parallel.data * parallel.fsdp * parallel.tensor * parallel.context])
    with jax.set_mesh(mesh):
        model = build(config, dtype="float32", attention=name, remat="none")
        loss = sft(model, loss=Loss(chunk=64))
        params = jax.jit(model.init, out_shardings=layout.shardings(model.axes, mesh, model.abstract))(
            jax.random.key(0)
        )
        grads = jax.jit(jax.grad(lambda params, batch: loss(params, {}, batch).loss))
        return [np.asarray(x) for x in jax.tree.leaves(grads(params, layout.place(batch, mesh, rows=rows)))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [Parallel(data=1, fsdp=2, tensor=2, context=2), Parallel(data=2, tensor=4), Parallel(data=8)],
    ids=str,
)
def test_a_model_on_a_mesh_has_the_gradients_of_blocks_on_one_device(parallel):
    definition = model_gradients(Parallel(data=1), "blockwise")
    for a, b in zip(model_gradients(parallel, "splash"), definition, strict=True):
        assert np.linalg.norm(a - b) < 2e-5 * np.linalg.norm(b)
