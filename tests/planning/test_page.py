"""The page reads from top to bottom and ends with the verdict; no line needs a wide terminal."""

import dataclasses

import pytest
from rich.console import Console

from itjax.planning import advice, memory, page, roofline
from itjax.planning.advice import Suggestion
from itjax.planning.case import Measured
from itjax.planning.made import Plan
from itjax.planning.roofline import Bound
from tests import planned

MEASURED = Measured(3 * 2**30, None, True, 2**30, 2**31, 0, 1e12, {"all-gather": 2**28}, 0, (), (), 61.0)
BOUND = Bound({"products": 0.5, "memory": 0.1, "link": 0.2, "network": 0.0, "host": 0.0}, 0.5, "products", 0.7)


@pytest.fixture(scope="module")
def found() -> Plan:
    here = planned.case()
    load = roofline.Load([[64] * 8], 8 * 64, 8 * 64.0)
    return Plan(
        here, load, None, 10**9, 10**9, memory.state(here), {"parameters": 2**30, "activations": 2**31}, "activations",
        4 * 2**30, roofline.products(here, load), MEASURED, BOUND, [], [],
        [Suggestion({"parallel__data": 1, "parallel__fsdp": 8}, here, 2**31, 0.6, True)], price=3.0,
    )  # fmt: skip


def text(plan: Plan) -> str:
    console = Console(width=100, record=True, quiet=True)
    console.quiet = False
    with console.capture() as shown:
        page.show(plan, console)
    return shown.get()


def test_a_plan_that_fits_says_so_at_the_end(found):
    shown = text(found)
    assert shown.strip().splitlines()[-1] == "It fits: 3.00 GiB of 4.00 GiB (75%)"
    assert "Most of it: activations." in shown
    assert "at least 500 ms, by the products of matrices; MFU at most 70.0%" in shown
    assert "all-gather" in shown
    assert "--config.parallel.data=1 --config.parallel.fsdp=8  peak 2.00 GiB (-1.00 GiB), step +20%, compiled" in shown
    assert max(map(len, shown.splitlines())) <= 110
    assert "\x1b" not in shown, "plain where it is piped"


def test_a_plan_that_does_not_fit_says_why_at_the_end(found):
    refused = dataclasses.replace(found, reasons=["a device needs 5 GiB and has 4 GiB"])
    assert text(refused).strip().splitlines()[-1] == "No: a device needs 5 GiB and has 4 GiB"


def test_tokens_a_day_and_the_price_of_an_epoch_follow_from_the_bound(found):
    assert found.rates().tokens_per_day == 8 * 64 / 0.5 * 86400
    assert found.rates().device_hours is None, "there is no data, so there is no epoch"
    with_data = dataclasses.replace(found, report={"rows_per_epoch": 80_000})
    rates = with_data.rates()
    assert rates.device_hours == pytest.approx(10_000 * 0.5 * 8 / 3600)
    assert rates.price == pytest.approx(3 * rates.device_hours)


def test_settings_are_written_as_the_command_line_takes_them():
    assert (
        advice.config_lines({"optimizer__moments": "int8", "rows": 8})
        == "--config.optimizer.moments=int8 --config.rows=8"
    )
