"""Curves over training: pure functions of the tokens seen (and, for the warm-up, of the optimizer step).

A curve starts at a base value and walks through segments; after the last one it holds. At a border the later segment
counts. V3 4.2's learning rate, with base 2.2e-4 and borders in T tokens::

    constant 10 | cosine 4.3 to 2.2e-5 | constant 0.333 | constant 0.167 to 7.3e-6
    0          10                    14.3             14.633                    14.8
"""

import math

from deepv3.config.schema import Config, OptimConfig, Segment, TrainConfig


def value(segments: list[Segment], base: float, tokens: float) -> float:
    """The curve's value after `tokens` tokens. linear and cosine go from the value reached to the segment's `to`."""
    reached, start = base, 0.0
    for segment in segments:
        target = reached if segment.to is None else segment.to
        share = (tokens - start) / segment.tokens if segment.tokens else 1.0
        if share < 1.0:
            if segment.shape == "constant":
                return target
            if segment.shape == "cosine":
                share = (1.0 - math.cos(math.pi * share)) / 2.0
            return reached + (target - reached) * share
        reached, start = target, start + segment.tokens
    return reached


def learning_rate(optim: OptimConfig, step: int, tokens: float) -> float:
    """Learning rate of optimizer step `step` (the first is 1) after `tokens` tokens: linear warm-up times the curve."""
    warmup = min(1.0, step / optim.warmup_steps) if optim.warmup_steps else 1.0
    return warmup * value(optim.lr_schedule, optim.lr, tokens)


def bias_speed(cfg: Config, tokens: float) -> float:
    """gamma, the step of the router biases (V3 4.2: 1e-3, then 0 after 14.3T tokens)."""
    return value(cfg.optim.bias_update_schedule, cfg.model.bias_update_speed, tokens)


def mtp_weight(cfg: Config, tokens: float) -> float:
    """lambda, the weight of the MTP loss (V3 4.2: 0.3, then 0.1 after 10T tokens)."""
    return value(cfg.optim.mtp_loss_schedule, cfg.model.mtp_loss_weight, tokens)


def batch_size(train: TrainConfig, tokens: float) -> int:
    """Sequences of the next optimizer step after `tokens` tokens.

    The ramp climbs by whole increments at equal distances: of n = ceil((end - start) / increment) rises the k-th comes
    at k/n of ramp.tokens, the last one exactly there. V3's 3072 -> 15360 over 469B by 3072 rises every 117.25B.
    """
    if train.global_batch_size is not None:
        return train.global_batch_size
    ramp = train.batch_ramp
    assert ramp is not None, "a validated config has train.global_batch_size or train.batch_ramp"
    if tokens >= ramp.tokens:
        return ramp.end
    rises = math.ceil((ramp.end - ramp.start) / ramp.increment)
    return min(ramp.start + int(tokens * rises / ramp.tokens) * ramp.increment, ramp.end)
