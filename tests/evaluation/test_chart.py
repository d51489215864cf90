"""What a chart promises: round marks, every spike, nothing where nothing was measured."""

import pytest

from itjax.evaluation import chart
from itjax.evaluation.chart import Curve, Stretch


@pytest.mark.parametrize(
    "low, high, marks",
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0.3, 5.2, [0, 2, 4, 6]),
        (0, 0.006, [0, 0.002, 0.004, 0.006]),
        (-3, 3, [-4, -2, 0, 2, 4]),
        (7, 7, [2, 4, 6, 8, 10, 12]),
        (0, 0, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_marks_are_round_and_cover_the_values(low, high, marks):
    assert chart.ticks(low, high) == marks


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (0.25, "0.25"), (12_000, "12k"), (3_400_000, "3.4M"), (6e-5, "6e-05"), (-0.5, "-0.5"), (2e9, "2G")],
)
def test_numbers_are_short(value, text):
    assert chart.number(value) == text


def test_a_short_curve_keeps_every_point():
    assert chart.stretches([(1, 2.0), (2, None), (3, 4.0)]) == [Stretch(1, 2, 2, 2), Stretch(3, 4, 4, 4)]


def test_a_spike_is_seen_in_a_curve_of_any_length():
    points = [(step, 1000.0 if step == 77_777 else 1.0) for step in range(100_000)]
    found = chart.stretches(points)
    assert len(found) == 200
    assert max(stretch.high for stretch in found) == 1000
    assert found[-1].step == 99_999


def test_a_curve_without_values_is_no_chart():
    assert chart.plot("mfu", [Curve("mfu", [(1, None), (2, None)])]) == ""


def test_values_lie_where_they_should():
    """Steps 0 to 10, values 0 to 1: the first point lies at the lower left, the last at the upper right."""
    text = chart.plot("share", [Curve("share", [(0, 0.0), (10, 1.0)])])
    left, right = chart.LEFT, chart.WIDTH - chart.RIGHT
    assert f'points="{left}.0,{chart.HEIGHT - chart.BOTTOM}.0 {right}.0,{chart.TOP}.0"' in text
