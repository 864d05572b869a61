"""In FP8 a pipeline is the plain FP8 model bit for bit, and experts over ranks are near it.

A stage runs the calls of the plain model on the same micro-batches, whatever runs in between and whenever its weight
gradients run, so with one data rank everything is equal. With experts over two ranks sums are rounded once per
rank, an expert's rows of two micro-batches meet in one product, and their columns share scales that the plain model
gives each for itself. A rounding that differs in BF16's last bit moves a code by a sixteenth, so the two differ as two
quantisations of one model do; that nothing else differs is shown layer by layer in tests/precision/test_exchange8.py.
"""

from dataclasses import replace
from functools import partial
from unittest import mock

import layouts
import pytest
import ranks
import torch
from layouts import Case, Outcome, Trainer, together

STEPS = 2
plain_config = layouts.config


def config(case: Case, balanced: bool):
    """Widths that FP8 takes: attention output kept in 12 bits, the dense SwiGLU in one kernel, experts' in several."""
    cfg = plain_config(case)
    cfg.model = replace(
        cfg.model, hidden_size=32, intermediate_size=128, moe_intermediate_size=16, num_attention_heads=8,
        q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
        force_balance=balanced,
    )  # fmt: skip
    return cfg


def train(case: Case, steps: int, balanced: bool = False) -> Outcome:
    """balanced: tokens go where they are told, not where a near-tie of the router sends them."""
    with mock.patch.object(layouts, "config", partial(config, balanced=balanced)):
        trainer = Trainer(case)
    for step in range(1, steps + 1):
        trainer.step(step)
    return trainer.outcome(trainer.validate())


def case(schedule: str = "1f1b", pp: int = 1, ep: int = 1, dp: int = 1, **options) -> Case:
    return Case(schedule, pp, ep, dp, **{"mtp": 0, "precision": "fp8", "batch": 4, **options})


_plain: dict[int, Outcome] = {}


def plain(mtp: int, steps: int = STEPS) -> Outcome:
    """The same in one process."""
    if mtp not in _plain:
        _plain[mtp] = together(ranks.run(1, train, case(mtp=mtp, recompute="none"), steps))
    return _plain[mtp]


def differences(found: Outcome, expected: Outcome) -> dict[str, float]:
    """Relative distance of every tensor of the state, by its name and kind."""
    return {
        f"{kind} of {name}": float((found.state[name][kind] - value).norm() / value.norm().clamp_min(1e-30))
        for name, kinds in expected.state.items()
        for kind, value in kinds.items()
    }


@pytest.mark.parametrize(
    "layout",
    [
        case("1f1b", 2), case("dualpipev", 2), case("zb1p", 2, recompute="none"), case("dualpipev", 1),
    ],
    ids=str,
)  # fmt: skip
def test_a_pipeline_in_fp8_is_bitwise_the_plain_fp8_model(layout):
    """The losses are: sums of the same numbers over ranks, in another order."""
    found, expected = together(ranks.run(layout.world, train, layout, STEPS)), plain(0)
    assert found.norms == expected.norms
    assert all(torch.equal(a, b) for a, b in zip(found.counts, expected.counts))
    assert {name for name, far in differences(found, expected).items() if far} == set()
    for losses, wanted in zip(found.losses, expected.losses):
        assert losses == pytest.approx(wanted, rel=1e-6)  # FP32
    assert found.validation == pytest.approx(expected.validation, rel=1e-12)


def test_with_a_prediction_module_only_what_two_stages_share_is_summed_in_another_order():
    layout = case("dualpipev", 2, mtp=1)
    found, expected = together(ranks.run(2, train, layout, 1)), together(ranks.run(1, train, case(mtp=1), 1))
    for name, far in differences(found, expected).items():
        assert far <= 1e-5, name
    assert found.norms == pytest.approx(expected.norms, rel=1e-6)


def mean_difference(found: Outcome, expected: Outcome) -> float:
    """Over the first moments, which after one step are the gradients."""
    far = [f for name, f in differences(found, expected).items() if name.startswith("exp_avg of")]
    return sum(far) / len(far)


def test_experts_over_ranks_in_fp8_are_as_near_to_bf16_as_the_plain_fp8_model():
    """The two differ by less than half of what each differs from BF16, and neither is nearer."""
    alone = case(recompute="none")
    spread, plain8, plain16 = (
        together(ranks.run(layout.world, train, layout, 1, True))
        for layout in (case("1f1b", 1, 2, 2), alone, alone._replace(precision="bf16"))
    )
    assert all(torch.equal(a, b) for a, b in zip(spread.counts, plain8.counts))
    assert spread.losses[0] == pytest.approx(plain8.losses[0], rel=5e-3)
    noise = mean_difference(plain8, plain16)
    assert 0.1 < noise < 0.6
    assert mean_difference(spread, plain8) < noise / 2
    assert mean_difference(spread, plain16) == pytest.approx(noise, rel=0.15)
