"""A plan says what a run will need: numbers that can be checked by hand, and no where it must."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import pytest

from itjax import parts, plan
from itjax.base import tree
from itjax.parallel import layout, topology
from itjax.planning import advice, case, fit, making, memory
from itjax.planning.case import case_of
from itjax.planning.made import Plan
from itjax.planning.making import Wishes
from itjax.train import loop
from tests import planned
from tests.contract import runs


@pytest.fixture(autouse=True)
def same_environment(monkeypatch):
    """The command prepares the environment of a process of its own."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def command(tmp_path, *more: str, **settings: object) -> tuple[int, dict]:
    """What the command exits with and writes, for the smallest of quickstarts on eight fake devices."""
    argv = ["itjax.plan", *runs.arguments(tmp_path / "run", **{"rows": 8, "architecture__layers": 1, **settings})]
    out = tmp_path / "plan.json"
    code = plan.command([*argv, "--devices=cpu:8", f"--json={out}", f"--config.cache_dir={tmp_path}", *more])
    return code, json.loads(out.read_text())


CONTRACT = {
    "fits", "devices", "device_kind", "bytes_per_device", "flops_per_step", "model_flops_per_step",
    "collective_bytes_per_step", "warnings", "step_seconds_at_least", "mfu_at_most", "data",
}  # fmt: skip
BYTES = {"parameters", "optimizer", "arguments", "temporaries", "peak", "limit"}


def test_the_json_has_what_contracts_promise_and_the_data_is_the_loaders(tmp_path, capsys):
    code, found = command(tmp_path, parallel__data=1, parallel__fsdp=8)
    assert code == 0
    assert set(found) >= CONTRACT
    assert set(found["bytes_per_device"]) >= BYTES
    assert (found["fits"], found["devices"], found["device_kind"]) == (True, 8, "cpu")
    assert found["step_seconds_at_least"] is None
    assert found["mfu_at_most"] is None
    assert sum(found["collective_bytes_per_step"].values()) > 0, "devices of fsdp send each other something"

    run = planned.quickstart(cache_dir=str(tmp_path), rows=8, architecture__layers=1)
    report = making.whole_loader(run, parts.prepare_data(run, console=planned.SILENT)).report()
    for name in ("fill", "rows_per_epoch", "tokens_per_step", "trained_share"):
        assert found["data"][name] == report[name]
    epochs = {name: source["epochs"] for name, source in found["data"]["sources"].items()}
    assert epochs == {name: source["epochs"] for name, source in report["sources"].items()}
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("It fits: ")


def test_a_mesh_that_rows_do_not_divide_over_ends_with_3_and_says_which(tmp_path, capsys):
    code, found = command(tmp_path, "--no_data", rows=4)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert (code, found["fits"], found["data"]) == (plan.DOES_NOT_FIT, False, None)
    assert last.startswith("No: batch: 4 rows do not divide over data 8")
    assert found["bytes_per_device"]["parameters"] > 0
    assert found["bytes_per_device"]["peak"] is None


def test_adapters_for_nothing_end_with_3(tmp_path, capsys):
    code, _ = command(tmp_path, "--no_data", lora__rank=2, lora__targets="('nothing/*',)")
    assert code == plan.DOES_NOT_FIT
    assert "nothing is trained" in capsys.readouterr().out


def test_devices_are_asked_for():
    with pytest.raises(ValueError, match="--devices: missing"):
        plan.command(["itjax.plan", *runs.arguments("unused")])


# --- one small case, in this process ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where programs that were compiled once are remembered, for all tests here."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def found(folder) -> Plan:
    """The plan of a small run with its parameters over all eight devices, without data."""
    return planned.plan(planned.case(), cache_dir=folder)


def test_parameters_and_moments_are_counted_exactly(found):
    shapes = tree.flatten(found.case.model.abstract)
    norms = sum(x.size for path, x in shapes.items() if "norm" in path)
    kernels = sum(x.size for path, x in shapes.items() if "norm" not in path)
    numbers = kernels // 8 + norms  # kernels are split over all devices, norms are whole on each
    assert found.state.parameters == 4 * numbers
    assert found.state.optimizer == 2 * 4 * numbers + 4, "two moments, and how many steps there were"
    assert found.state.batch == 6 * 8 * 64 * 4 / 8, "six arrays of 8 rows of 64 positions"


def test_the_plan_is_of_the_step_that_the_loop_runs(found):
    here = found.case
    with jax.set_mesh(here.mesh):
        step = loop.compile_step(here.run, here.model, here.mesh, num_steps=here.num_steps)
        batch = layout.batch_shapes(here.mesh, rows=here.run.rows, length=here.run.length)
        real = step.step.lower(step.abstract, batch).compile().memory_analysis()
    assert found.measured is not None
    assert found.measured.arguments == real.argument_size_in_bytes
    assert found.measured.temporaries == real.temp_size_in_bytes
    read = found.state.batch * 5 // 6  # nobody asks for the source of a position, and 4 bytes count the steps
    assert found.measured.arguments == found.state.parameters + found.state.optimizer + read + 4


def test_what_was_compiled_once_is_remembered(found, folder, monkeypatch):
    monkeypatch.setattr(case.program, "read", None)  # nothing is read a second time
    again = case.measure(planned.case(), folder=folder / "plans")
    assert dataclasses.asdict(again) == json.loads(json.dumps(dataclasses.asdict(found.measured)))


def test_a_device_that_is_too_small_is_said_with_both_numbers(found, folder):
    plan = planned.plan(planned.case(memory=2**16), cache_dir=folder)
    assert not plan.fits
    assert "a device needs" in plan.reasons[0]
    assert plan.limit == 2**16
    assert plan.suggestions, "something makes it smaller"
    assert all(one.peak < plan.peak for one in plan.suggestions)


def test_an_involuntary_rematerialisation_is_a_reason_not_to_start(found, folder, monkeypatch):
    remade = dataclasses.replace(found.measured, remade=("%dot.1 bf16[8,64]",))
    monkeypatch.setattr(making, "measure", lambda case, folder: remade)
    plan = planned.plan(planned.case(), cache_dir=folder)
    assert plan.reasons == ["involuntary rematerialisation: %dot.1 bf16[8,64]"]


def test_the_parts_name_what_dominates():
    large = planned.case(length=1024, architecture__layers=4, loss__chunk=32)
    parts = memory.parts(large, advice.kept_of(large))
    assert memory.dominates(parts, 0.0) == "activations", "long rows"
    parts = memory.parts(planned.case(length=8), advice.kept_of(planned.case(length=8)))
    assert memory.dominates(parts, 0.0) != "activations", "short ones"


def test_a_search_finds_what_fits_and_says_how_to_ask_for_it(found, folder, monkeypatch):
    monkeypatch.setattr(fit, "REMAT", ("none",))
    whole = planned.plan(planned.case(parallel=planned.DATA), cache_dir=folder).peak
    limit = (whole + found.peak) // 2  # copies of the model do not fit, shares of it do
    small = planned.case(parallel=planned.DATA, memory=limit)
    plan = planned.plan(small, Wishes(fit=True), cache_dir=folder)
    assert plan.fits, plan.reasons
    assert plan.peak <= limit < whole
    assert "--config.rows=8" in plan.fitted, "rows of a step stay as they are"
    assert plan.case.mesh.shape["fsdp"] * plan.case.mesh.shape["tensor"] > 1
    for axis, size in plan.case.mesh.shape.items():
        assert f"--config.parallel.{axis}={size}" in plan.fitted


def test_a_search_in_vain_names_the_nearest(folder, monkeypatch):
    monkeypatch.setattr(fit, "REMAT", ("none",))
    plan = planned.plan(planned.case(memory=2**12), Wishes(fit=True), cache_dir=folder)
    assert not plan.fits
    assert "the nearest needs" in plan.reasons[0]


@pytest.mark.parametrize("devices", ["v5e:2x2"])
def test_devices_that_are_absent_are_compiled_for(devices, folder, monkeypatch):
    pytest.importorskip("libtpu")
    here = planned.case(devices=devices)
    with monkeypatch.context() as patch:
        patch.setattr(advice, "REMAT", ("none", "full"))
        plan = planned.plan(here, cache_dir=folder)
    assert plan.fits, plan.reasons
    assert plan.measured.received.get("all-gather", 0) > 0
    assert 0 < plan.bound.mfu < 1
    assert plan.bound.step == max(seconds for seconds in plan.bound.seconds.values())
    assert topology.target(devices).chip.memory == plan.limit
    assert case_of(here.run, 1024, here.target, num_steps=10).platform == "tpu"
