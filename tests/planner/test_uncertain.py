"""Ranges come from the constants' ranges, and from nothing else."""

import pytest
from plans import REPORT, constants, v3

from deepv3.planner.calibration import Value
from deepv3.planner.simulate import Simulator
from deepv3.planner.uncertain import spread


def test_constants_without_a_range_give_none():
    exact = constants(**{name: value.value for name, value in REPORT.constants().items()})
    found = spread(v3(), exact)
    assert found.faster == found.slower == 1.0 and not found.by


def test_one_uncertain_constant_gives_its_own_effect():
    exact = constants(**{name: value.value for name, value in REPORT.constants().items()})
    unsure = exact.changed({"interference": Value(1.05, 1.15, 1.0, "test")})
    found = spread(v3(), unsure)
    slow = Simulator(v3(), constants(interference=1.15)).bound() / Simulator(v3(), constants(interference=1.05)).bound()
    assert found.slower == pytest.approx(slow) and found.faster < 1.0
    assert list(found.by) == ["interference"]


def test_more_uncertain_constants_widen_the_range():
    exact = constants(**{name: value.value for name, value in REPORT.constants().items()})
    one = spread(v3(), exact.changed({"attention": Value(0.6, 0.5, 0.7, "test")}))
    two = spread(v3(), exact.changed({"attention": Value(0.6, 0.5, 0.7, "test"), "hbm": Value(0.9, 0.8, 0.95, "test")}))
    assert two.slower > one.slower and two.faster < one.faster


def test_rates_and_times_are_each_others_ranges():
    found = spread(v3(), REPORT)
    low, high = found.seconds(10.0)
    slow, fast = found.rate(10.0)
    assert low < 10.0 < high and low * fast == pytest.approx(100.0) and high * slow == pytest.approx(100.0)
