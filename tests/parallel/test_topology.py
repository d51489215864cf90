"""A text names devices that are not here; one that names none is answered with what there is."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from itjax.base.chips import CHIPS, chip_of
from itjax.parallel import program, topology


def target(text, monkeypatch):
    """The devices of a text, or a skip that says which compiler is missing."""
    for name, value in topology.ALONE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        return topology.target(text)
    except ValueError as error:
        if "is not installed" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize(
    ("text", "devices", "chips", "slices"),
    [
        ("v5e:1x1", 1, 1, 1),
        ("v5e:16x16", 256, 256, 1),
        ("v5p:4x4x4", 64, 64, 1),
        ("v6e:16x16", 256, 256, 1),
        ("v4:4x4x4", 64, 64, 1),
        ("v7x:2x2x2", 16, 8, 1),  # two devices a chip
        ("2*v5e:4x4", 32, 32, 2),
        ("h200:8", 8, 8, 1),
        ("h100:16x8", 128, 128, 16),
        ("a100:2x8", 16, 16, 2),
        ("b200:4", 4, 4, 1),
        ("cpu:8", 8, 8, 1),
    ],
)
def test_devices_are_as_many_as_asked_for_and_of_the_chip(text, devices, chips, slices, monkeypatch):
    found = target(text, monkeypatch)
    assert (len(found.devices), found.chips, found.slices) == (devices, chips, slices)
    assert chip_of(found.devices[0].device_kind) is found.chip
    assert found.devices[0].platform == found.chip.platform


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h10:8", "chip 'h10' is unknown; did you mean 'h100'?"),
        ("v5p:4x4", "v5p has no slice of 4x4; there are 2x2x1, 2x2x2, 2x2x4, 2x4x4 and AxBxC"),
        ("v5e:3x4", "v5e has no slice of 3x4; there are 1x1, 2x2, 2x4, 4x4"),
        ("v5p:64x64x64", "up to 8960 chips"),
        ("h100:16", "nodes have up to 8 GPUs; say h100:8, or h100:NODESx8"),
        ("2*h100:8", "h100 comes in nodes, not slices; say h100:2x8"),
        ("cpu:2x4", "say how many, as in cpu:8"),
        ("v5e", "say chip:shape, as in v5e:16x16"),
        ("v5e:0x4", "every number is 1 or more"),
    ],
)
def test_a_text_that_names_no_devices_is_answered_with_what_there_is(text, message):
    with pytest.raises(ValueError, match=re.escape(f"--devices={text}: ")) as error:
        topology.target(text)
    assert message in str(error.value)


def test_more_fake_devices_than_jax_has_started_with_are_refused():
    with pytest.raises(ValueError, match=r"jax has started with 8 CPU devices.*device_count=9"):
        topology.target("cpu:9")


@pytest.mark.parametrize(("text", "package"), [("v5e:2x4", "libtpu"), ("h200:8", "jax-cuda13-plugin==")])
def test_a_missing_compiler_is_told_with_the_command_that_installs_it(text, package, monkeypatch):
    def missing(*args, platform, **options):
        if platform == "tpu":  # jax's words
            raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topology.topologies, "get_topology_desc", missing)
    with pytest.raises(ValueError, match=f"not installed; .*pip install '?{package}"):
        topology.target(text)


def test_fake_devices_are_prepared_by_a_flag_that_takes_the_place_of_another(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_force_host_platform_device_count=8 --xla_b=2")
    for name in (*topology.ALONE, "JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "JAX_PLATFORMS"):
        monkeypatch.setenv(name, "")
    topology.prepare("cpu:64")
    assert os.environ["XLA_FLAGS"].split() == ["--xla_a=1", "--xla_b=2", "--xla_force_host_platform_device_count=64"]
    assert os.environ["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize(
    ("text", "links"),
    [
        ("v5e:16x16", 4),  # a ring in both dimensions
        ("v5e:8x16", 3),  # a ring in one, the end of a line in the other
        ("v5e:4x4", 2),
        ("v5e:1x1", 0),
        ("v5p:2x2x1", 2),
        ("v5p:2x2x4", 3),  # no whole cube: no ring
        ("v5p:4x4x8", 6),
    ],
)
def test_the_corner_of_a_slice_has_fewer_links(text, links):
    asked = topology.parse(text)
    found = topology.Target(text, asked.chip, (), asked.shape, asked.slices)
    assert found.link == asked.chip.link / asked.chip.links * links


@pytest.mark.parametrize("name", [name for name, chip in CHIPS.items() if chip.platform == "tpu"])
def test_the_memory_of_a_tpu_is_what_libtpu_refuses_to_exceed(name, monkeypatch):
    found = target(f"{name}:2x2" if CHIPS[name].links == 4 else f"{name}:2x2x1", monkeypatch)
    mesh = Mesh(np.array(found.devices[:1]), ("x",))
    x = jax.ShapeDtypeStruct((2**31, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.jit(lambda x: (x * 2, x + 1)).lower(x).compile()
    needed, there = program.exceeded(error.value)
    assert needed > there
    assert there == pytest.approx(found.chip.memory, rel=5e-4)  # 0.0.50 leaves 10 MB less than 0.0.42
