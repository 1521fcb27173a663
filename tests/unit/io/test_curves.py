"""Curves: ticks enclose the values, nothing that matters is thinned out."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnssl_ext.io.curves import MOST_POINTS, curves, ticks

NUMBERS = st.floats(-1e9, 1e9, allow_subnormal=False)


@given(NUMBERS, NUMBERS)
def test_ticks_are_few_even_and_enclose_the_values(one, other):
    low, high = min(one, other), max(one, other)
    if high - low < 1e-6 * max(abs(low), abs(high)):
        return
    found = ticks(low, high)
    tolerance = 1e-6 * (high - low)
    assert found[0] <= low + tolerance and found[-1] >= high - tolerance and 2 <= len(found) <= 8
    assert max(b - a for a, b in zip(found, found[1:])) == pytest.approx(found[1] - found[0], rel=1e-3)


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (1, 10, [0, 2, 4, 6, 8, 10]), (5, 5, [4.4, 4.6, 4.8, 5.0, 5.2, 5.4])]
)
def test_ticks_are_round_numbers(low, high, expected):
    assert ticks(low, high)[: len(expected)] == pytest.approx(expected)


def test_curves_are_well_formed_and_keep_every_spike():
    values = [1.0] * 5000
    values[1234] = 9.0
    svg = curves({"train/total": (list(range(5000)), values), "val/<total>": ([1.0], [2.0]), "empty": ([], [])})
    root = ElementTree.fromstring(f"<div>{svg.replace('&nbsp;', ' ')}</div>")
    lines = root.findall(".//polyline")
    points = [tuple(map(float, point.split(","))) for point in lines[0].get("points").split()]
    assert len(lines) == 2 and len(points) <= MOST_POINTS + 2
    assert min(y for _, y in points) < 50 < max(y for _, y in points)  # the spike, near the top of the drawing
    assert points == sorted(points, key=lambda point: point[0])
    assert root.findall(".//circle") and lines[1].get("stroke-dasharray")
    assert re.findall("<b>(.*?)</b>", svg) == ["1", "2"]


def test_nothing_is_drawn_of_nothing():
    assert curves({"a": ([], [])}) == ""
