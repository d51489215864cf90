"""Options of the compiler are tried before they are used: a name that it does not know is told, and ends nothing."""

import jax
import pytest

from itjax.parallel import flags

CPU = jax.devices()[0]


def test_a_processor_has_no_options():
    assert flags.options("cpu", CPU, extra={}) == flags.Options({}, {})


def test_what_a_compiler_does_not_know_is_left_out_and_said(monkeypatch):
    """The compiler here is of CPUs: it knows none of libtpu's."""
    known, unknown = "xla_cpu_enable_fast_math", "xla_tpu_enable_latency_hiding_scheduler"
    monkeypatch.setattr(flags, "OPTIONS", {"gpu": {known: True, unknown: True}})
    got = flags.options("gpu", CPU, extra={})
    assert got.accepted == {known: True}
    assert got.refused.keys() == {unknown}
    assert "No such compile option" in got.refused[unknown]


@pytest.mark.parametrize(
    "name",
    ["xla_gpu_enable_custom_fusions", "xla_gpu_enable_address_computation_fusion", "xla_gpu_cudnn_gemm_fusion"],
)
def test_flags_of_a_guide_that_end_a_process_when_xla_reads_them_are_refused(name):
    assert "No such compile option" in flags.refusal(CPU, name, True)


def test_options_of_ones_own_are_taken_as_what_they_are():
    assert [flags.parsed(text) for text in ("true", "False", "65536", "0.5", "sync")] == [
        True,
        False,
        65536,
        0.5,
        "sync",
    ]
    own = {"xla_cpu_enable_fast_math": "true", "xla_gpu_all_gather_combine_threshold_bytes": "65536"}
    got = flags.options("cpu", CPU, extra=own)
    assert got.accepted == {"xla_cpu_enable_fast_math": True, "xla_gpu_all_gather_combine_threshold_bytes": 65536}


def test_one_of_ours_can_be_changed_or_taken_out(monkeypatch):
    changed, left_out = "xla_cpu_enable_fast_math", "xla_gpu_all_gather_combine_threshold_bytes"
    monkeypatch.setattr(flags, "OPTIONS", {"gpu": {changed: True, left_out: 1}})
    got = flags.options("gpu", CPU, extra={changed: "false", left_out: ""})
    assert got.accepted[changed] is False
    assert left_out not in got.accepted


@pytest.mark.parametrize(
    "name, value", [("xla_gpu_enable_pipelined_all_gathr", "true"), ("xla_gpu_enable_pipelined_all_gather", "perhaps")]
)
def test_a_wrong_option_of_ones_own_names_its_place(name, value):
    with pytest.raises(ValueError, match=rf"config.parallel.flags.{name}: '{value}'"):
        flags.options("gpu", CPU, extra={name: value})
    if value == "true":
        with pytest.raises(ValueError, match="did you mean xla_gpu_enable_pipelined_all_gather"):
            flags.options("gpu", CPU, extra={name: value})
