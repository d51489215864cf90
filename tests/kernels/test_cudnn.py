"""Packed attention of cuDNN without a GPU: our arguments, given to what its call is specified to do, in float64.

The stand-in reads flat memory as cuDNN does, from the arguments as jax's own code hands them over, and leaves NaN wherever
cuDNN leaves memory unwritten.
"""

import functools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as lower

from itjax.kernels import attention, cudnn
from itjax.kernels.attention import Case, Scores, Segments
from tests.kernels.cudnn_stand_in import packed

HOPPER = cudnn.Device("9.0", 91002)
SCORES = Scores(0.4)
CASE = Case("gpu", 4096, 32, 8, 128, "bfloat16", Scores(0.1))


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(cudnn, "packed", packed)
    return monkeypatch


def rows(lengths, *, length=24):
    """[[3, 2], [4]] -> segments 1 1 1 2 2 0 0 ... and 1 1 1 1 0 0 0 ..."""
    numbers = [np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]
    return jnp.asarray([np.pad(row, (0, length - len(row))) for row in numbers], jnp.int32)


def inputs(count, *, heads=4, kv_heads=2, length=24, head_size=8):
    rng = np.random.default_rng(count)
    return [
        jnp.asarray(rng.normal(size=(count, length, n, head_size)), jnp.float32) for n in (heads, kv_heads, kv_heads)
    ]


def reads(name, scores):
    """A function of queries, keys, values and segments, as attention is asked for on a GPU."""

    def read(q, k, v, segments):
        both = Segments(segments, segments)
        return attention.attend(q, k, v, both, implementation=name, scores=scores, platform="gpu")

    return read


def read_and_slopes(name, qkv, segments, mix, scores=SCORES):
    """Values, and the gradient of Σ read·mix in queries, keys and values."""

    @jax.jit
    def run(q, k, v, segments, mix):
        read, pull = jax.vjp(lambda q, k, v: reads(name, scores)(q, k, v, segments), q, k, v)
        return read, *pull(mix)

    return [np.asarray(x) for x in run(*qkv, segments, mix)]


def agrees(qkv, segments, scores=SCORES):
    """Values and gradients of cuDNN's call are those of the definition, and zero at padding."""
    real = np.asarray(segments)[:, :, None, None] != 0
    mix = jnp.asarray(np.random.default_rng(1).normal(size=qkv[0].shape), jnp.float32)
    expected = read_and_slopes("reference", qkv, segments, mix * real, scores)
    ours = read_and_slopes("cudnn", qkv, segments, mix, scores)
    for one, reference in zip(ours, expected, strict=True):
        assert np.abs(reference).max() > 0.1
        np.testing.assert_allclose(one, np.where(real, reference, 0.0), atol=1e-5, rtol=1e-5)


def test_a_segment_has_a_slot_with_its_length_and_where_it_begins(monkeypatch):
    monkeypatch.setattr(cudnn, "POSITIONS_PER_SLOT", 2)
    segments = jnp.array([[1, 1, 1, 2, 2, 0], [4, 4, 4, 4, 4, 4], [0, 0, 0, 0, 0, 0]])
    lengths, offsets = cudnn.table(cudnn.numbered(segments), segments != 0, 0)
    assert lengths.tolist() == [[3, 2, -1], [6, -1, -1], [-1, -1, -1]]
    assert offsets.tolist() == [[0, 3, -1, -1], [0, -1, -1, -1], [-1, -1, -1, -1]]
    lengths, offsets = cudnn.table(cudnn.numbered(segments), segments != 0, 1)  # what a second round would begin with
    assert lengths.tolist() == [[2, -1, -1], [-1, -1, -1], [-1, -1, -1]]
    assert offsets.tolist() == [[3, -1, -1, -1], [-1, -1, -1, -1], [-1, -1, -1, -1]]


@pytest.mark.parametrize("heads, kv_heads, window", [(4, 2, 0), (3, 3, 3)])
def test_packed_rows_are_read_as_the_definition_reads_them(stand_in, heads, kv_heads, window):
    stand_in.setattr(cudnn, "POSITIONS_PER_SLOT", 4)
    agrees(inputs(3, heads=heads, kv_heads=kv_heads), rows([[7, 1, 10], [24], []]), SCORES._replace(window=window))


def test_rows_with_more_segments_than_slots_go_round_again(stand_in):
    stand_in.setattr(cudnn, "POSITIONS_PER_SLOT", 12)  # 2 slots
    agrees(inputs(3), rows([[2, 3, 1, 5, 4], [1] * 24, [20]]))


def test_rows_that_offsets_cannot_count_together_are_read_in_several_calls(stand_in):
    stand_in.setattr(cudnn, "OFFSETS", 2 * 24 * 4 * 8 + 1)  # two rows
    agrees(inputs(3), rows([[5, 5], [24], [1, 2]]))


def test_nothing_that_was_left_in_memory_reaches_a_result(stand_in):
    """The stand-in does leave NaN there, so this is not empty."""
    (q, k, v), segments = inputs(3, heads=2), rows([[5, 5], [24], []])
    table = cudnn.table(cudnn.numbered(segments), segments != 0, 0)
    assert np.isnan(jax.jit(packed, static_argnums=5)(q, k, v, *table, SCORES)[0, 10:]).all()
    o, *grads = read_and_slopes("cudnn", (q, k, v), segments, jnp.ones_like(q))
    assert np.isfinite([o, *grads]).all()
    np.testing.assert_array_equal(o[2], 0.0)  # a row without a single segment


def test_jax_finds_segments_of_grouped_heads_from_0_11_1_on():
    """Before, jax itself looks in wrong places, which the stand-in shows: so heads are repeated there."""
    q, k, v = inputs(2)
    segments = rows([[5, 5], [24]])
    table = cudnn.table(cudnn.numbered(segments), segments != 0, 0)
    call = jax.jit(packed, static_argnums=5)
    grouped = call(q, k, v, *table, SCORES)
    repeated = call(q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2), *table, SCORES)
    right = np.allclose(np.asarray(grouped)[1], np.asarray(repeated)[1], equal_nan=True)
    assert right == cudnn.GROUPS_HEADS == (jax.__version_info__ >= (0, 11, 1))


# --- the program ------------------------------------------------------------------------------------------------------


def calls(*, heads, kv_heads, window=0, length=256):
    """Names, operands and settings of cuDNN's calls in the program of values and gradients."""

    def total(q, k, v, segments):
        return reads("cudnn", Scores(0.1, window=window))(q, k, v, segments).astype(jnp.float32).sum()

    q, k = (jax.ShapeDtypeStruct((2, length, n, 64), jnp.bfloat16) for n in (heads, kv_heads))
    with cudnn.absent():
        program = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(
            q, k, k, jax.ShapeDtypeStruct((2, length), jnp.int32)
        )
        text = program.lower(lowering_platforms=("cuda",)).as_text()
    found = re.findall(r"custom_call @(__cudnn\$\w+)\(.*?backend_config = \"(.*?)\".*? : \((.*?)\) ->", text)
    assert len(found) == text.count("custom_call @__cudnn")
    return [
        (
            name,
            re.findall(r"tensor<(\w+)>", operands),
            json.loads(settings.replace("\\22", '"'))["cudnn_fmha_backend_config"],
        )
        for name, settings, operands in found
    ]


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_program_calls_the_packed_causal_kernel(kv_heads):
    stored = kv_heads if cudnn.GROUPS_HEADS else 4
    found = calls(heads=4, kv_heads=kv_heads)
    forward, backward = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
    further = [forward, backward]  # rounds, in a loop
    assert [name for name, *_ in found] == [forward, forward, backward, *further]
    for _, operands, settings in found:
        assert operands[:3] == ["2x256x4x64xbf16", f"2x256x{stored}x64xbf16", f"2x256x{stored}x64xbf16"]
        assert operands[-4:] == ["2x4xi32", "2x4xi32", "2x5xi32", "2x5xi32"]  # lengths and offsets, of 256 / 64 slots
        assert settings["mask_type"] == "PADDING_CAUSAL"
        assert (settings["max_seg_per_batch"], settings["sliding_window_length"]) == (4, 0)
        assert settings["fmha_scale"] == 0.1


def test_the_window_of_the_program_counts_the_position_itself():
    """As here: jax says "(pos - sliding_window_length, pos]", which for 3 is a position and the two before it."""
    assert {settings["sliding_window_length"] for *_, settings in calls(heads=4, kv_heads=4, window=3)} == {3}


def kept_by_layers(policy):
    """Shapes of what six layers keep, and how often the program calls the forward kernel."""

    @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def layer(x_BTD, w_DNH, segments):
        q = jnp.einsum("BTD,DNH->BTNH", x_BTD, w_DNH)
        o = reads("cudnn", SCORES)(q, 2 * q, 3 * q, segments)
        return x_BTD + jnp.einsum("BTNH,DNH->BTD", o, w_DNH)

    def total(w_LDNH, x_BTD, segments):
        y_BTD, _ = jax.lax.scan(lambda x, w: (layer(x, w, segments), None), x_BTD, w_LDNH)
        return y_BTD.astype(jnp.float32).sum()

    shapes = [(6, 32, 4, 64), (2, 256, 32)]
    with cudnn.absent():
        arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
        program = jax.jit(jax.grad(total)).trace(*arguments, jax.ShapeDtypeStruct((2, 256), jnp.int32))
        text = program.lower(lowering_platforms=("cuda",)).as_text()
    forward = next(equation for equation in program.jaxpr.eqns if equation.primitive.name == "scan")
    kept = [variable.aval.shape for variable in forward.outvars if variable.aval.shape[0] == 6]
    return sorted(kept), text.count("@__cudnn$fmhaSoftmax(")


def test_what_heads_read_is_kept_once_and_not_read_again_where_a_policy_names_it():
    x, o, sums = (6, 2, 256, 32), (6, 2, 256, 4, 64), (6, 2 * 4, 4, 256)
    everything, calls = kept_by_layers(jax.checkpoint_policies.everything_saveable)
    assert {o: everything.count(o), sums: everything.count(sums)} == {o: 4, sums: 1}  # queries, keys, values and o
    assert kept_by_layers(jax.checkpoint_policies.save_only_these_names("attended")) == (sorted([x, o, sums]), calls)
    assert kept_by_layers(jax.checkpoint_policies.nothing_saveable) == ([x], calls + 2)  # a round, and one in a loop


ON_A_MESH = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from itjax.parallel import topology
topology.prepare("h200:8")
devices = topology.target("h200:8").devices
from itjax.kernels import cudnn
from itjax.kernels.attention import Scores
from itjax.models import attending

mesh = Mesh(np.array(devices).reshape(2, 2, 2), ("data", "context", "tensor"), axis_types=(AxisType.Auto,) * 3)

def total(q, k, v, segments):
    read = attending.attend(q, k, v, segments, None, wanted="cudnn", platform="gpu", scores=Scores(0.1))
    return read.astype(jnp.float32).sum()

def shape(*sizes, kind=jnp.bfloat16):
    names = P("data", "context", "tensor") if len(sizes) == 4 else P("data", "context")
    return jax.ShapeDtypeStruct(sizes, kind, sharding=NamedSharding(mesh, names))

arguments = shape(4, 256, 8, 64), shape(4, 256, 4, 64), shape(4, 256, 4, 64), shape(4, 256, kind=jnp.int32)
with cudnn.absent(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*arguments).compile()
print(compiled.as_text().count('custom_call_target="__cudnn$fmhaSoftmaxBackward"'))
"""


@pytest.mark.slow
def test_it_compiles_for_gpus_that_are_not_here_with_rows_positions_and_heads_split():
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    ran = subprocess.run(
        [sys.executable, "-c", ON_A_MESH], env=environment, capture_output=True, text=True, timeout=300
    )
    if "jax-cuda13-plugin" in ran.stderr:
        pytest.skip(ran.stderr.strip().splitlines()[-1])
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[-1] == "2"


# --- what it refuses --------------------------------------------------------------------------------------------------


def test_what_it_can_do_it_does_not_refuse():
    with cudnn.absent():
        assert cudnn.refuses(CASE) == ""
        assert cudnn.refuses(CASE._replace(scores=Scores(0.1, window=512), head_size=256)) == ""
        assert attention.choose("auto", CASE) == "cudnn"


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"platform": "tpu"}, "for NVIDIA GPUs, and this is for tpu"),
        ({"dtype": "float32"}, "bfloat16 and float16, not float32"),
        ({"scores": Scores(0.1, softcap=30.0)}, "softcap"),
        ({"sinks": True}, "sinks"),
        ({"head_size": 100}, "multiple of 8"),
        ({"head_size": 264}, "to 256 on Hopper"),
        ({"parts": 2}, "whole rows"),
        ({"length": 2**19}, "more numbers than its offsets can count"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(changes, why):
    with cudnn.absent(), pytest.raises(ValueError, match=why):
        attention.choose("cudnn", CASE._replace(**changes))


@pytest.mark.parametrize(
    "device, changes, why",
    [
        (HOPPER._replace(capability="8.0"), {}, "compute capability 9.0, Hopper, or newer; this one has 8.0"),
        (HOPPER._replace(version=90501), {}, "has to be 9.6 or newer"),
        (HOPPER._replace(version=91001), {}, "have faults; this is 91001"),
        (HOPPER._replace(capability="10.0"), {"head_size": 256}, "on 10.0 they are 128 at most"),
    ],
)
def test_devices_that_cannot_are_refused_with_the_reason(device, changes, why):
    with cudnn.absent(device.capability, version=device.version):
        assert why in cudnn.refuses(CASE._replace(**changes))


def test_without_a_gpu_it_is_refused_and_jax_is_as_it_was_after_the_scope_of_an_absent_one():
    asked = lower.check_cudnn_version, lower.check_compute_capability
    with cudnn.absent(version=91100):
        assert lower.check_cudnn_version() == 91100
    assert (lower.check_cudnn_version, lower.check_compute_capability) == asked
    assert "no NVIDIA GPU with cuDNN is attached" in cudnn.refuses(CASE)
