"""Packed attention through jax's public attention: segments out of their rows and back, against the definition."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from itjax.kernels import attention, cudnn, unpacked
from itjax.kernels.attention import Case, Scores, Segments
from itjax.models import attending

SCORES = Scores(0.4)
CASE = Case("gpu", 4096, 32, 8, 128, "bfloat16", Scores(0.1))


def rows(lengths, *, length):
    """[[3, 2], [4]] -> segments 1 1 1 2 2 0 0 ... and 1 1 1 1 0 0 0 ..."""
    numbers = [np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]
    return jnp.asarray([np.pad(row, (0, length - len(row))) for row in numbers], jnp.int32)


def read_and_slopes(name, qkv, segments, mix, scores):
    """Values, and the gradient of Σ read·mix in queries, keys and values."""

    def read(q, k, v):
        return attention.attend(q, k, v, Segments(segments, segments), implementation=name, scores=scores)

    @jax.jit
    def run(q, k, v, mix):
        o, pull = jax.vjp(read, q, k, v)
        return o, *pull(mix)

    return [np.asarray(x) for x in run(*qkv, mix)]


@pytest.mark.parametrize("shortest, window", [(6, 0), (24, 3)])
def test_packed_rows_are_read_as_the_definition_reads_them(monkeypatch, shortest, window):
    """Kinds of up to 6, 12 and 24 positions: of one there are more segments than a round has, of one there is none."""
    monkeypatch.setattr(unpacked, "SHORTEST", shortest)
    segments = rows([[3, 1, 4, 4, 2, 1, 5], [24], [3, 5, 6, 1], []], length=24)
    rng = np.random.default_rng(0)
    qkv = [jnp.asarray(rng.normal(size=(4, 24, n, 8)), jnp.float32) for n in (4, 2, 2)]
    mix = jnp.asarray(rng.normal(size=(4, 24, 4, 8)), jnp.float32)
    real, scores = np.asarray(segments)[:, :, None, None] != 0, SCORES._replace(window=window)
    expected = read_and_slopes("reference", qkv, segments, mix * real, scores)
    for ours, reference in zip(read_and_slopes("unpacked", qkv, segments, mix, scores), expected, strict=True):
        assert np.abs(reference).max() > 0.1
        np.testing.assert_allclose(ours, np.where(real, reference, 0.0), atol=1e-5, rtol=1e-5)


def test_segments_of_a_kind_are_no_shorter_than_half_of_its_rows():
    assert unpacked.kinds(300) == [(0, 128), (128, 256), (256, 300)]
    assert unpacked.kinds(128) == [(0, 128)]
    assert unpacked.kinds(24) == [(0, 24)]
    assert all(2 * (above + 1) >= L for above, L in unpacked.kinds(8192)[1:])


def test_where_a_segment_begins_its_length_stands():
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0], [5, 6, 6, 6, 6, 6, 6], [0, 0, 0, 0, 0, 0, 0]])
    assert unpacked._lengths(segments).tolist() == [[3, 0, 0, 2, 0, 0, 0], [1, 6, 0, 0, 0, 0, 0], [0] * 7]


def test_any_packing_has_places_in_the_table_of_its_kind():
    """The most segments of a kind that rows can hold: nothing is left out, whatever comes."""
    tables = jax.jit(lambda segments: [(count, first) for first, _, count, *_ in unpacked._tables(segments)])
    for length in (1, 128, 129):
        found = tables(rows([[length] * (600 // length)] * 2, length=600))
        assert sum(int(count) for count, _ in found) == 2 * (600 // length)
        assert all(count <= len(first) for count, first in found)


def test_memory_does_not_grow_with_the_square_of_the_length():
    """On a GPU, where cuDNN keeps no scores: nothing in the program has T x T numbers."""

    def total(q, k, v, segments):
        both = Segments(segments, segments)
        read = attention.attend(q, k, v, both, implementation="unpacked", scores=SCORES, platform="gpu")
        return read.astype(jnp.float32).sum()

    q, k = (jax.ShapeDtypeStruct((2, 1024, n, 64), jnp.bfloat16) for n in (4, 2))
    with cudnn.absent("8.0"):
        program = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(q, k, k, jax.ShapeDtypeStruct((2, 1024), jnp.int32))
        text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__cudnn$fmhaSoftmaxBackward") == len(unpacked.kinds(1024)) == 4
    assert set(re.findall(r"mask_type\\22: \\22(\w+)", text)) == {"PADDING_CAUSAL"}
    sizes = [np.prod([int(n) for n in shape[:-1].split("x")]) for shape in re.findall(r"tensor<((?:\d+x)+)[a-z]", text)]
    assert max(sizes) == 2 * 1024 * 4 * 64


@pytest.mark.parametrize("name", ["unpacked", "cudnn"])
def test_it_lowers_with_rows_positions_and_heads_split_over_a_mesh(name):
    """What a loop carries has to vary over the same axes of the mesh from step to step."""
    mesh = Mesh(
        np.array(jax.devices()).reshape(2, 2, 2), ("data", "context", "tensor"), axis_types=(AxisType.Auto,) * 3
    )

    def total(q, k, v, segments):
        read = attending.attend(q, k, v, segments, None, wanted=name, platform="gpu", scores=SCORES)
        return read.astype(jnp.float32).sum()

    q, k = (jax.ShapeDtypeStruct((4, 256, n, 64), jnp.bfloat16) for n in (8, 4))
    with cudnn.absent(), jax.set_mesh(mesh):
        program = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(q, k, k, jax.ShapeDtypeStruct((4, 256), jnp.int32))
        text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert "custom_call @__cudnn$fmhaSoftmaxBackward" in text
    assert "(tensor<2x256x2x64xbf16>" in text or name == "unpacked"  # of 8 heads a device reads 2, of whole rows


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"scores": Scores(0.1, softcap=30.0)}, "no softcap"),
        ({"sinks": True}, "no sinks"),
        ({"parts": 2}, "whole rows"),
        ({"dtype": "float32"}, "bfloat16 and float16, not float32"),
        ({"head_size": 256}, "on 8.0 they are 128 at most"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(changes, why):
    with cudnn.absent("8.0"), pytest.raises(ValueError, match=why):
        attention.choose("unpacked", CASE._replace(**changes))


def test_it_is_what_gpus_before_hopper_have():
    with cudnn.absent("8.0"):
        assert attention.choose("auto", CASE) == "unpacked"
    with cudnn.absent("7.5"):
        assert "8.0, Ampere, or newer; this one has 7.5" in unpacked.refuses(CASE)
    assert "no NVIDIA GPU with cuDNN is attached" in unpacked.refuses(CASE)
    assert unpacked.refuses(CASE._replace(platform="cpu", dtype="float32")) == ""
