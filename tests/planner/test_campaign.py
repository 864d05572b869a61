"""Whole runs: steps of the ramp, GPU hours of the report, context extension, failures."""

import math
from dataclasses import replace

import pytest
from plans import config, v3, v3_simulator

from deepv3.config.schema import BatchRamp, TrainConfig
from deepv3.planner.calibration import Calibration
from deepv3.planner.campaign import HOUR, curve, failures, interpolate, pre_training
from deepv3.planner.layout import Layout
from deepv3.planner.plan import POST_TRAINING_GPU_HOURS
from deepv3.planner.simulate import Simulator


@pytest.fixture(scope="module")
def phases():
    """The report's three phases; the extensions on the grids their presets state."""
    first = pre_training(v3_simulator(), config().train, "4K")
    found = [first]
    for name, devices in (("v3_671b_32k", 2048), ("v3_671b_128k", 512)):
        cfg = config(f"+config={name}", f"cluster.devices={devices}")
        found.append(pre_training(Simulator(Layout.of(cfg), Calibration()), cfg.train, name))
    return found


def test_pre_training_takes_the_reported_tokens_and_steps(phases):
    assert phases[0].tokens == pytest.approx(14.8e12)
    assert 240e3 < phases[0].steps < 244e3


def test_pre_training_takes_the_reported_gpu_hours(phases):
    assert phases[0].gpu_hours == pytest.approx(2_664e3, rel=0.05)


def test_the_whole_run_takes_the_reported_gpu_hours(phases):
    assert sum(phase.gpu_hours for phase in phases) + POST_TRAINING_GPU_HOURS == pytest.approx(2_788e3, rel=0.05)


def test_context_extension_is_of_the_reported_size(phases):
    """119 K reported, of a layout that the report does not state; nothing was fitted to it."""
    assert phases[1].tokens == pytest.approx(62.9e9, rel=1e-3) and phases[2].tokens == pytest.approx(62.9e9, rel=1e-3)
    assert phases[1].gpu_hours + phases[2].gpu_hours == pytest.approx(119e3, rel=0.35)


def test_small_batches_cost_more_per_token(phases):
    full = 14.8e12 / v3_simulator().step().tokens_per_second_per_gpu / HOUR
    assert full < phases[0].gpu_hours < 1.03 * full


def test_interpolation_meets_its_points_and_lies_between_them():
    simulator = v3_simulator()
    points = curve(simulator, 24, 120)
    assert [count for count, _ in points] == sorted({24, 28, 32, 48, 120})
    assert interpolate(points, 32) == dict(points)[32]
    unit = simulator.layout.dp
    for count in (26, 40, 80):
        assert interpolate(points, count) == pytest.approx(simulator.step(count * unit).seconds, rel=0.02)


def test_a_run_without_a_ramp_is_its_steps():
    simulator = v3_simulator()
    phase = pre_training(simulator, TrainConfig(steps=100, global_batch_size=15_360), "fixed")
    assert phase.steps == 100 and phase.seconds == pytest.approx(100 * simulator.step().seconds)


def test_a_run_may_end_within_its_ramp():
    ramp = BatchRamp(start=3072, end=15_360, tokens=469e9, increment=128)
    phase = pre_training(v3_simulator(), TrainConfig(tokens=100e9, batch_ramp=ramp), "short")
    assert phase.tokens == pytest.approx(100e9)
    assert 100e9 / (15_360 * 4096) < phase.steps < 100e9 / (3072 * 4096)


def test_failures_follow_from_the_number_of_devices():
    half = replace(v3().cluster, count=1024)
    one, two = failures(v3(), 10**12, 1e6, 50_000), failures(v3(cluster=half), 10**12, 1e6, 50_000)
    assert one.expected == pytest.approx(2 * two.expected)
    assert one.checkpoint_bytes == 8e12
    assert one.interval_seconds == pytest.approx(math.sqrt(2 * one.checkpoint_seconds * one.between_hours * HOUR))


def test_the_chosen_interval_loses_least():
    rare = failures(v3(), 683 * 10**9, 1e6, 50_000)
    between, write = rare.between_hours * HOUR, rare.checkpoint_seconds

    def lost(interval: float) -> float:
        return write / interval + interval / 2 / between

    assert all(lost(rare.interval_seconds) <= lost(rare.interval_seconds * factor) for factor in (0.5, 0.9, 1.1, 2.0))
