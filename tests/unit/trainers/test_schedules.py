"""Closed forms of the schedules."""

import pytest

from nnssl_ext.trainers.schedules import cosine, linear, polynomial


def test_the_polynomial_rises_linearly_and_falls_to_zero():
    rates = [polynomial(step, 100, 1.0, 10) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5**0.9)
    assert rates[99] == pytest.approx((1 / 90) ** 0.9)
    assert rates[100] == polynomial(130, 100, 1.0, 10) == 0


def test_the_cosine_rises_linearly_and_runs_through_its_middle_to_its_end():
    rates = [cosine(step, 100, 0.8, 0.2, 20) for step in range(101)]
    assert rates[:20] == pytest.approx([0.04 * (i + 1) for i in range(20)])
    assert rates[20] == 0.8
    assert rates[40] == pytest.approx(0.5 + 0.3 * 2**-0.5)  # a quarter of the way
    assert rates[60] == pytest.approx(0.5)
    assert rates[100] == cosine(130, 100, 0.8, 0.2, 20) == 0.2
    assert all(a > b for a, b in zip(rates[20:], rates[21:]))


def test_the_cosine_also_rises():
    assert [cosine(step, 4, 0.04, 0.2) for step in (0, 2, 4)] == pytest.approx([0.04, 0.12, 0.2])


def test_the_line_is_straight_and_then_level():
    assert [linear(step, 4, 0.04, 0.08) for step in range(7)] == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.08, 0.08, 0.08])
    assert linear(0, 0, 0.04, 0.07) == 0.07


def test_without_warm_up_a_schedule_starts_at_its_peak():
    assert polynomial(0, 1000, 1e-2) == cosine(0, 1000, 1e-2, 0.0) == 1e-2


def test_a_run_of_one_step_has_its_peak():
    assert polynomial(0, 1, 1e-2) == cosine(0, 1, 1e-2, 0.0) == cosine(0, 1, 1e-2, 0.0, 1) == 1e-2
