"""What devices send each other is what the program says they must: bytes, trips of loops, axes; on three platforms alike."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from itjax.parallel import program, topology
from itjax.parallel.program import Collective

P = PartitionSpec
BYTES = 256 * 512 * 4  # what every device has of the array below
# Collective of which kind, bytes that a device receives in one execution, over which axes, how often.
#   (2, 4) devices, axes a and b; groups of 4 get 3 parts of 4 from others, groups of 8 get 7 whole ones
EXPECTED = {
    ("all-reduce", 2 * BYTES * 3 // 4, ("b",), 5),  # parts are reduced, then gathered
    ("all-to-all", BYTES * 3 // 4, ("b",), 2),
    ("collective-permute", BYTES, ("a",), 2 * 3),  # a loop in a loop
    ("all-gather", 7 * BYTES, ("a", "b"), 1),
    ("reduce-scatter", 8 * BYTES * 3 // 4, ("b",), 1),  # of what has been gathered
}


def exchanges(x):
    """Every kind of collective, most of them in loops; run by each device on its part of an array."""

    def reduced(x, _):
        return x + jax.lax.psum(x * x, "b"), None

    def permuted(x, _):
        return x - jnp.abs(jax.lax.ppermute(x, "a", [(0, 1), (1, 0)])), None

    def swapped(x, _):
        x = x - jnp.abs(jax.lax.all_to_all(x, "b", 0, 0, tiled=True))
        return jax.lax.scan(permuted, x, length=3)[0], None

    x = jax.lax.scan(reduced, x, length=5)[0]
    x = jax.lax.scan(swapped, x, length=2)[0]
    whole = jnp.abs(jax.lax.all_gather(x, ("a", "b"), axis=0, tiled=True))
    part = jax.lax.psum_scatter(whole, "b", scatter_dimension=0, tiled=True)
    return x.sum() + jnp.square(part).sum()[None]


def mesh_of(text, monkeypatch, shape=(2, 4), names=("a", "b")):
    for name, value in topology.ALONE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        devices = topology.target(text).devices
    except ValueError as error:
        if "is not installed" in str(error):
            pytest.skip(str(error))
        raise
    return Mesh(np.array(devices).reshape(shape), names, axis_types=(AxisType.Auto,) * len(names))


def compiled(mesh, function, *arrays, compiler=None, **options):
    """Arrays are (shape, spec), float32."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in arrays]
    return jax.jit(function, **options).lower(*shapes).compile(compiler_options=compiler)


def program_of(mesh, **options):
    spec = P(("a", "b"))
    mapped = jax.shard_map(exchanges, mesh=mesh, in_specs=spec, out_specs=spec)
    return program.read(compiled(mesh, mapped, ((8 * 256, 512), spec), **options), mesh)


@pytest.mark.parametrize("text", ["cpu:8", "v5e:2x4", "v5p:2x2x2", "h200:8"])
def test_collectives_are_found_with_their_bytes_trips_and_axes(text, monkeypatch):
    found = program_of(mesh_of(text, monkeypatch))
    assert {(one.kind, one.bytes, one.axes, one.times) for one in found.collectives} == EXPECTED
    assert len(found.collectives) == len(EXPECTED)
    assert found.notes == ()
    assert found.crossing() == 0
    assert found.received() == {kind: bytes * times for kind, bytes, _, times in EXPECTED}


@pytest.mark.parametrize("text", ["2*v5e:2x2", "h200:2x4"])
def test_bytes_between_slices_and_nodes_are_told_apart(text, monkeypatch):
    """`a` goes between slices: what is permuted crosses; of what is gathered, the part of one device, which sends it on inside."""
    found = program_of(mesh_of(text, monkeypatch))
    assert found.crossing() == 6 * BYTES + BYTES
    assert found.over("a") - found.crossing() in (0, 6 * BYTES)  # one gathering over a and b, or one over each
    assert found.received() == {kind: bytes * times for kind, bytes, _, times in EXPECTED}


def test_what_compiles_sooner_changes_nothing_that_is_read(monkeypatch):
    mesh = mesh_of("cpu:8", monkeypatch)
    assert program_of(mesh, compiler=program.compile_options("cpu")) == program_of(mesh)


@pytest.mark.parametrize("text", ["cpu:8", "v5p:2x2x2", "h200:8"])
def test_kinds_of_bytes_add_up(text, monkeypatch):
    """Each device has 4 MB of a, which the result takes the place of, 64 MB of b; between them 64 MB of products."""
    mesh, MiB = mesh_of(text, monkeypatch), 2**20

    def step(a, b):
        return a + jax.nn.relu(a @ b) @ b.T

    spec = P(("a", "b"))
    made = compiled(
        mesh, step, ((8 * 1024, 1024), spec), ((1024, 16384), P()), donate_argnums=0, out_shardings=NamedSharding(mesh, spec)
    )  # fmt: skip
    memory = program.memory(made, mesh)
    assert (memory.arguments, memory.outputs, memory.aliased) == (68 * MiB, 4 * MiB, 4 * MiB)
    assert memory.peak == memory.arguments + memory.outputs - memory.aliased + memory.temporaries
    assert 32 * MiB <= memory.temporaries <= 80 * MiB  # a TPU keeps the products in bfloat16, or half of them at a time
    assert memory.host_arguments == memory.host_temporaries == 0
    found = program.read(made, mesh)
    assert found.flops == pytest.approx(2 * 2 * 1024 * 1024 * 16384)


def test_a_gradient_that_is_scattered_as_it_is_reduced_is_no_all_reduce(monkeypatch):
    """A fusion in which each device keeps its part of an all-reduce moves half of what the all-reduce alone would."""
    text = """HloModule step, num_partitions=4

%fused_scatter (g: f32[64,8]) -> f32[16,8] {
  %g = f32[64,8]{1,0} parameter(0)
  %sum = f32[64,8]{1,0} all-reduce(%g), channel_id=1, replica_groups=[1,4]<=[4], use_global_device_ids=true, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %mine = f32[16,8]{1,0} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={16,8}
}

ENTRY %main (g: f32[64,8]) -> f32[16,8] {
  %g0 = f32[64,8]{1,0} parameter(0)
  ROOT %out = f32[16,8]{1,0} fusion(%g0), kind=kCustom, calls=%fused_scatter
}
"""
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    (found,) = program.read_text(text, None, mesh, unknown_trips=1).collectives
    assert (found.kind, found.bytes) == ("reduce-scatter", 64 * 8 * 4 * 3 // 4)


def test_a_collective_that_runs_beside_other_work_counts_once():
    """As libtpu prints it: in the fusion that starts it, in those that it runs beside, in the one that waits for it."""
    line = (
        "all-gather(%x), channel_id=1, replica_groups={{0,1}}, dimensions={0}, "
        'backend_config={"async_collective_fusion_config":{}}'
    )
    text = f"""HloModule step, num_partitions=2

%start (x: f32[8]) -> (f32[8], f32[16]) {{
  %x = f32[8]{{0}} parameter(0)
  %g = f32[16]{{0}} {line}
  ROOT %c = (f32[8]{{0}}, f32[16]{{0}}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%done (x: f32[8]) -> f32[16] {{
  %x = f32[8]{{0}} parameter(0)
  %g = f32[16]{{0}} {line}
  ROOT %c = f32[16]{{0}} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (a: f32[8]) -> f32[16] {{
  %a = f32[8]{{0}} parameter(0)
  %s = (f32[8]{{0}}, f32[16]{{0}}) fusion(%a), kind=kCustom, calls=%start
  ROOT %d = f32[16]{{0}} fusion(%a), kind=kCustom, calls=%done
}}
"""
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    found = program.read_text(text, None, mesh, unknown_trips=1)
    assert found.collectives == (Collective("all-gather", 32, 0, 1, 2, ("x",), ""),)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("mesh['a'=2,'b'=2] {'b','a'}", [[0, 1, 2, 3]]),
        ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("{}", [[0, 1, 2, 3]]),
    ],
)
def test_groups_in_every_way_that_xla_writes_them(text, groups):
    found = program.replica_groups(f", channel_id=1, replica_groups={text}, use_global_device_ids=true", 4)
    assert sorted(map(sorted, found)) == groups


def test_what_xla_writes_to_stderr_is_kept_and_passed_on(capfd):
    line = "W0000 spmd_partitioner.cc:656] [SPMD] Involuntary full rematerialization. In other words than today's."
    with program.warnings() as said:
        os.write(2, f"{line}\nsomething of this machine\n".encode())
    assert said.lines == [line]
    assert program.involuntary(said.text) == ["In other words than today's."]
    assert capfd.readouterr().err.splitlines() == [line, "something of this machine"]


def test_stderr_is_given_back_when_compiling_fails(capfd):
    def compile():
        with program.warnings():
            os.write(2, b"before\n")
            raise KeyError

    with pytest.raises(KeyError):
        compile()
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "before\nafter\n"


def test_an_array_that_must_be_made_whole_to_be_laid_out_anew_is_told(capfd):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)
    rows, columns = P(None, "a", None), P("b", None, "c")

    def f(x):
        x = jax.lax.with_sharding_constraint(jnp.abs(x), NamedSharding(mesh, rows))
        return jax.lax.with_sharding_constraint(x * 2, NamedSharding(mesh, columns))

    with program.warnings() as said:
        compiled(mesh, f, ((6, 64, 64), rows))
    assert len(said.lines) == 1
    (told,) = program.involuntary(said.text)
    assert told.startswith("f32[6,32,64] of jit(f)/sharding_constraint: {")
    assert "Involuntary" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("message", "numbers"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (1.50T) "
            "exceeds available HBM (15.75G).",
            (int(1.5 * 2**40), int(15.75 * 2**30)),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.5G of 15.75G hbm. Exceeded by 768M.",
            (int(16.5 * 2**30), int(15.75 * 2**30)),
        ),
        ("INVALID_ARGUMENT: 3 of 4 devices", None),
    ],
)
def test_how_much_a_refused_program_needs(message, numbers):
    assert program.exceeded(RuntimeError(message)) == numbers
