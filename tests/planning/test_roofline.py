"""The bound of a step by hand: FLOPs of a small decoder, and the slowest of what a chip does."""

import dataclasses

import pytest

from itjax.base.schema import REMAT
from itjax.models import families
from itjax.parallel.topology import Target
from itjax.planning import roofline
from itjax.planning.roofline import AGAIN, Load, Products, Traffic
from tests import planned

ROWS, LENGTH = 8, 64
FULL = Load([[LENGTH] * ROWS], ROWS * LENGTH, float(ROWS * LENGTH))


def test_every_rematerialisation_says_what_it_does_again():
    assert set(AGAIN) == set(REMAT)


def test_flops_of_full_rows_are_those_of_the_model_and_what_is_done_again():
    """Width 32, two heads of 16, feed-forward 64, one layer, a vocabulary of 512."""
    here = planned.case(remat="full")
    tokens, attn, mlp, head = ROWS * LENGTH, 4 * 32 * 32, 3 * 32 * 64, 32 * 512
    pairs = ROWS * LENGTH**2 / 2
    model = 6 * tokens * (attn + mlp + head) + 12 * 32 * pairs
    again = 2 * tokens * (attn + 2 * 32 * 64) + 4 * 32 * pairs
    found = roofline.products(here, FULL)
    assert found.model == model == families.train_flops(here.config, [LENGTH] * ROWS)
    assert found.again == pytest.approx(again)
    assert found.step == pytest.approx(model + again)


def test_padding_is_done_and_of_no_use_and_the_head_sees_what_is_trained():
    here = planned.case()
    half = Load([[LENGTH // 2] * ROWS], ROWS * LENGTH, ROWS * LENGTH / 4)
    full, found = roofline.products(here, FULL), roofline.products(here, half)
    assert found.model < full.model / 2
    head = 6 * 32 * 512 * ROWS * LENGTH
    pairs = 12 * 32 * ROWS * LENGTH**2 / 2
    assert full.step - found.step == pytest.approx(head * 3 / 4 + pairs * 3 / 4)


def test_the_slowest_bounds_the_step():
    chip = dataclasses.replace(planned.case().target.chip, flops=1e12, bandwidth=1e11, link=1e10, network=1e9)
    target = Target("two", chip, (None, None), (2,), 1)
    flops = Products(model=1e12, again=0.0, step=2e12)
    found = roofline.bound(target, flops, Traffic(link=2e10, network=0.0), 1e10, hosted=0.0)
    assert found.seconds == {"products": 1.0, "memory": 0.1, "link": 2.0, "network": 0.0, "host": 0.0}
    assert (found.step, found.by, found.mfu) == (2.0, "link", 0.25)


def test_what_is_not_known_of_a_chip_bounds_nothing():
    target = planned.case().target
    found = roofline.bound(target, Products(1.0, 0.0, 1.0), Traffic(1.0, 0.0), 1.0, hosted=0.0)
    assert (found.step, found.mfu) == (None, None)
