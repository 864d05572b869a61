"""The curves against V3 4.2's numbers and against their own definition."""

import pytest

from deepv3.config.schema import BatchRamp, Config, OptimConfig, Segment, TrainConfig
from deepv3.optim import ramps

T = 1e12


@pytest.fixture
def v3() -> Config:
    cfg = Config()
    cfg.optim.lr_schedule = [
        Segment("constant", 10 * T),
        Segment("cosine", 4.3 * T, 2.2e-5),
        Segment("constant", 0.333 * T),
        Segment("constant", 0.167 * T, 7.3e-6),
    ]
    cfg.optim.bias_update_schedule = [Segment("constant", 14.3 * T), Segment("constant", 0.5 * T, 0.0)]
    cfg.optim.mtp_loss_schedule = [Segment("constant", 10 * T), Segment("constant", 4.8 * T, 0.1)]
    cfg.train.batch_ramp = BatchRamp()
    return cfg


@pytest.mark.parametrize(
    ("tokens", "lr", "gamma", "lam"),
    [
        (0, 2.2e-4, 1e-3, 0.3),
        (10 * T - 1, 2.2e-4, 1e-3, 0.3),
        (10 * T, 2.2e-4, 1e-3, 0.1),
        (12.15 * T, 1.21e-4, 1e-3, 0.1),
        (14.3 * T - 1, 2.2e-5, 1e-3, 0.1),
        (14.3 * T, 2.2e-5, 0.0, 0.1),
        (14.633 * T - 1, 2.2e-5, 0.0, 0.1),
        (14.633 * T, 7.3e-6, 0.0, 0.1),
        (14.8 * T, 7.3e-6, 0.0, 0.1),
        (20 * T, 7.3e-6, 0.0, 0.1),
    ],
)
def test_every_number_of_the_report_is_on_its_curve(v3, tokens, lr, gamma, lam):
    assert ramps.learning_rate(v3.optim, 10_000, tokens) == pytest.approx(lr, rel=1e-9)
    assert ramps.bias_speed(v3, tokens) == gamma
    assert ramps.mtp_weight(v3, tokens) == lam


def test_the_cosine_is_a_half_wave(v3):
    quarter = ramps.learning_rate(v3.optim, 10_000, 10 * T + 4.3 * T / 4)
    assert quarter == pytest.approx(2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + 2**-0.5) / 2, rel=1e-9)


@pytest.mark.parametrize(("step", "share"), [(1, 1 / 2000), (1000, 0.5), (2000, 1.0), (2001, 1.0)])
def test_warm_up_step_s_of_w_has_s_over_w_of_the_rate(v3, step, share):
    assert ramps.learning_rate(v3.optim, step, 0) == pytest.approx(2.2e-4 * share, rel=1e-12)


def test_no_warm_up_starts_at_the_full_rate():
    assert ramps.learning_rate(OptimConfig(lr=1.0, warmup_steps=0), 1, 0) == 1.0


def test_segments_join_and_the_last_value_holds():
    curve = [Segment("linear", 10, 2.0), Segment("constant", 5), Segment("linear", 10, 0.0)]
    points = {0: 1.0, 5: 1.5, 10: 2.0, 14: 2.0, 15: 2.0, 20: 1.0, 25: 0.0, 99: 0.0}
    assert {at: ramps.value(curve, 1.0, at) for at in points} == points
    assert ramps.value([], 3.0, 7) == 3.0


def test_a_stretch_of_no_tokens_is_a_jump():
    assert ramps.value([Segment("linear", 0, 5.0), Segment("linear", 10, 0.0)], 1.0, 0) == 5.0


def test_batch_starts_at_3072_and_is_15360_from_469b_tokens_on(v3):
    at = {0: 3072, 117.25e9 - 1: 6016, 117.25e9: 6144, 234.5e9: 9216, 469e9 - 1: 15232, 469e9: 15360, 14.8 * T: 15360}
    assert {tokens: ramps.batch_size(v3.train, tokens) for tokens in at} == at


def test_batch_ramp_with_a_remainder_still_ends_at_its_end():
    train = TrainConfig(batch_ramp=BatchRamp(start=4, end=11, tokens=300, increment=3))
    assert [ramps.batch_size(train, t) for t in (0, 99, 100, 199, 200, 299, 300)] == [4, 4, 7, 7, 10, 10, 11]


def test_a_fixed_batch_switches_the_ramp_off():
    assert ramps.batch_size(TrainConfig(global_batch_size=6, batch_ramp=BatchRamp()), 0) == 6


@pytest.mark.parametrize(("increment", "steps"), [(128, 242_938), (3072, 247_198)])
def test_the_run_of_14_8t_tokens_takes_240_to_250_thousand_steps(v3, increment, steps):
    """A ramp linear in tokens would take 242.8 K; the report does not state its shape."""
    v3.train.batch_ramp = BatchRamp(increment=increment)
    count, seen = 0, 0
    while seen < 469e9:
        seen += 4096 * ramps.batch_size(v3.train, seen)
        count += 1
    count += -(-int(14.8 * T - seen) // (4096 * 15360))
    assert count == pytest.approx(steps, abs=5)
