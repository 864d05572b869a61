"""What is a spike, and what is not."""

import math
import random

import pytest

from deepv3.config.compose import compose
from deepv3.config.schema import TrainConfig
from deepv3.config.validate import validate
from deepv3.errors import ConfigError
from deepv3.train.spikes import MIN_HISTORY, SpikeGuard


def _guard(**options) -> SpikeGuard:
    return SpikeGuard(TrainConfig(**{"spike_window": 64, "spike_threshold": 8.0, **options}))


def _calm(guard: SpikeGuard, steps: int = 64) -> list:
    draw = random.Random(0)
    return [
        guard.look(3 - n / 500 + draw.gauss(0, 0.03), math.exp(draw.gauss(0, 0.2))) for n in range(steps)
    ]  # fmt: skip


def test_a_noisy_falling_loss_has_no_spikes():
    assert _calm(_guard(), 5000) == [None] * 5000


def test_a_jump_of_loss_or_norm_is_told_with_both_values():
    guard = _guard()
    _calm(guard)
    assert guard.look(6.0, 1.0).startswith("loss 6 against 2.9")
    assert guard.look(2.9, 40.0).startswith("grad_norm 40 against ")
    assert "loss" in (both := guard.look(6.0, 40.0)) and " and grad_norm" in both


def test_spikes_do_not_become_the_usual():
    guard = _guard()
    _calm(guard)
    assert all(guard.look(6.0, 1.0) for _ in range(200))


def test_a_fall_is_no_spike_nor_are_the_first_steps_nor_what_is_not_finite():
    guard = _guard()
    _calm(guard)
    assert guard.look(0.1, 0.01) is None and guard.look(math.nan, math.inf) is None and guard.look(2.9, 0.0) is None
    fresh = _guard()
    assert [fresh.look(3.0, 1.0) for _ in range(MIN_HISTORY - 1)] + [fresh.look(9.0, 9.0)] == [None] * MIN_HISTORY


def test_a_flat_window_does_not_make_every_ripple_a_spike():
    guard = _guard()
    for _ in range(64):
        guard.look(3.0, 1.0)
    assert guard.look(3.05, 1.5) is None and guard.look(3.2, 1.0)


def test_the_window_goes_on_after_a_restart_even_with_another_length():
    guard, other = _guard(), _guard(spike_window=20)
    _calm(guard)
    other.load_state_dict(guard.state_dict())
    assert other.look(6.0, 1.0) and len(other.state_dict()["loss"]) == 20
    other.load_state_dict({})
    assert other.look(6.0, 1.0) is None


def test_winding_back_needs_saves_under_way():
    cfg = compose(["+config=tiny", "train.spike=rewind", "checkpoint.every=0"])
    with pytest.raises(ConfigError, match="train.spike = rewind .* checkpoint.every = 0 .* set checkpoint.every=N"):
        validate(cfg, 1)
    cfg.checkpoint.every = 10
    validate(cfg, 1)
