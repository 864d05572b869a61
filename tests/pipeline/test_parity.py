"""Every layout is the plain model: losses, norms, expert counts and state after optimizer steps equal one process's.

In FP64 with FP64 gradients, so that only the order of sums differs (1e-16 an operation) and no near-tie in the router
can flip; in FP32, where the order is the same too, bit for bit.
"""

from contextlib import nullcontext
from unittest import mock

import pytest
import ranks
import torch
from layouts import Case, Outcome, Trainer, config, together

from deepv3.data.loader import Batch
from deepv3.dist import Grid
from deepv3.errors import ScheduleError
from deepv3.optim.flat import owner_of
from deepv3.pipeline.build import Placement
from deepv3.pipeline.p2p import Mailbox
from deepv3.pipeline.stage import Cut, Stage
from deepv3.precision.wgrad import WeightGradQueue

STEPS = 3


def _lost_message():
    """A message arrives empty: its receiver was given another tensor's memory."""
    real = Mailbox.take

    def take(self, key):
        tensor = real(self, key)
        return tensor.zero_() if key == ("grad", 0, 3) else tensor

    return mock.patch.object(Mailbox, "take", take)


def _swapped_labels():
    """The last stage scores a micro-batch against its neighbour's labels."""
    real = Stage.begin

    def begin(self, batch, scales, x):
        if self.spec.head:
            batch = Batch(batch.tokens.roll(1, 1), None)
        return real(self, batch, scales, x)

    return mock.patch.object(Stage, "begin", begin)


def _twin_not_summed():
    """DualPipe's twins reduce their gradients each for themselves."""
    return mock.patch.object(Grid, "_twins", lambda self, rows: rows)


def _wrong_expert_group():
    """Experts are averaged over all data ranks, whoever holds them."""
    return mock.patch.object(Placement, "owner_of", lambda self, name, mirrored: "zero")


def _weight_gradient_twice():
    """A W runs again what an earlier one of its stage has run."""
    real = WeightGradQueue.pop

    def pop(self):
        again = list(self._closed[0])
        real(self)
        with torch.no_grad():
            again[0]()

    return mock.patch.object(WeightGradQueue, "pop", pop)


def _embedding_not_shared():
    """First and last stage keep embeddings of their own."""
    return mock.patch.object(Placement, "owner_of", lambda self, name, mirrored: owner_of(name))


def _router_gradient_lost():
    """The gradient of the gates does not come back from the experts' ranks."""
    real = Cut.backward

    def backward(self, *gradients):
        found = real(self, *gradients)
        if len(found) == 2 and len(gradients) == 2 and found[1] is not None and found[1].ndim == 2:
            found[1] = torch.zeros_like(found[1]) if found[1].shape[1] == 2 else found[1]
        return found

    return mock.patch.object(Cut, "backward", backward)


FAULTS = {
    "": nullcontext,
    "lost message": _lost_message,
    "swapped labels": _swapped_labels,
    "twin not summed": _twin_not_summed,
    "wrong expert group": _wrong_expert_group,
    "weight gradient twice": _weight_gradient_twice,
    "embedding not shared": _embedding_not_shared,
    "router gradient lost": _router_gradient_lost,
}


def train(case: Case, steps: int = STEPS, fault: str = "") -> Outcome:
    """On a rank: some optimizer steps through executor and engine, as the training loop makes them.

    fault: a mistake made on purpose, see FAULTS.
    """
    with FAULTS[fault]():
        return _train(case, steps)


def _train(case: Case, steps: int) -> Outcome:
    trainer = Trainer(case)
    for step in range(1, steps + 1):
        trainer.step(step)
    return trainer.outcome(trainer.validate())


_references: dict[tuple, Outcome] = {}


def reference(case: Case) -> Outcome:
    """The same training in one process, by the plain model."""
    plain = Case(mtp=case.mtp, recompute="none", precision=case.precision, batch=case.batch, wide=case.wide)
    if plain not in _references:
        _references[plain] = together(ranks.run(1, train, plain))
    return _references[plain]


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|, largest elements."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30)).item()


def compare(found: Outcome, plain: Outcome, tolerance: float) -> None:
    """Everything that a step leaves, tensor by tensor."""
    assert found.state.keys() == plain.state.keys() and found.biases.keys() == plain.biases.keys()
    for step, (counts, expected) in enumerate(zip(found.counts, plain.counts), 1):
        assert torch.equal(counts, expected), f"expert counts of step {step}"
    for row, bias in plain.biases.items():
        assert torch.equal(found.biases[row], bias), f"bias of MoE layer {row}"
    for name, kinds in plain.state.items():
        for kind, expected in kinds.items():
            assert far(found.state[name][kind], expected) <= tolerance, f"{kind} of {name}"
    assert torch.tensor(found.losses) == pytest.approx(torch.tensor(plain.losses), rel=max(tolerance, 1e-12))
    assert found.norms == pytest.approx(plain.norms, rel=max(tolerance, 1e-7))
    assert found.validation == pytest.approx(plain.validation, rel=max(tolerance, 1e-12))


CHOSEN = [
    Case("1f1b", 2, 1, 1, 2), Case("1f1b", 4, 1, 1, 1, "none"), Case("1f1b", 2, 1, 2, 0), Case("1f1b", 1, 1, 2, 1),
    Case("zb1p", 2, 1, 2, 1), Case("zb1p", 4, 1, 1, 0, "full"), Case("zb1p", 2, 1, 1, 2, "none"),
    Case("dualpipe", 2, 1, 1, 2), Case("dualpipe", 4, 1, 1, 1), Case("dualpipe", 2, 1, 2, 1, "none"),
    Case("dualpipe", 2, 1, 1, 0, "full"), Case("dualpipev", 1, 1, 1, 2), Case("dualpipev", 2, 1, 1, 1, "full"),
    Case("dualpipev", 2, 1, 2, 1), Case("dualpipev", 4, 1, 1, 1), Case("dualpipev", 2, 1, 1, 0, "none"),
    Case("1f1b", 1, 2, 2, 1), Case("1f1b", 2, 2, 2, 1, "full"), Case("zb1p", 2, 2, 2, 2), Case("dualpipe", 2, 2, 2, 1),
    Case("dualpipev", 1, 2, 2, 1, "none"), Case("dualpipev", 2, 2, 2, 2), Case("dualpipev", 1, 4, 4, 0),
    Case("1f1b", 1, 2, 4, 1),
    Case("dualpipev", 2, 2, 2, 1, dispatcher="symmetric"), Case("dualpipe", 2, 2, 2, 1, dispatcher="symmetric"),
    Case("1f1b", 1, 2, 4, 1, "full", dispatcher="symmetric"),
]  # fmt: skip


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_layout_equals_one_process(case):
    compare(together(ranks.run(case.world, train, case)), reference(case), 1e-9)


@pytest.mark.parametrize(
    "case",
    [
        Case("1f1b", 4, mtp=0, precision="fp32"), Case("zb1p", 2, mtp=0, precision="fp32"),
        Case("dualpipev", 1, mtp=0, precision="fp32"), Case("dualpipev", 2, mtp=0, precision="fp32"),
        Case("dualpipev", 4, mtp=0, precision="fp32", recompute="none"), Case("dualpipev", 2, mtp=0, precision="bf16"),
    ],
    ids=str,
)  # fmt: skip
def test_with_one_data_rank_a_pipeline_is_bitwise_the_plain_model(case):
    found, plain = together(ranks.run(case.world, train, case)), reference(case)
    assert found.norms == plain.norms
    assert all(
        torch.equal(found.state[name][kind], value)
        for name, kinds in plain.state.items()
        for kind, value in kinds.items()
    )


@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_fewer_micro_batches_than_the_schedule_wants_change_nothing_but_time(schedule, batch):
    case = Case(schedule, 2, mtp=1, batch=batch)
    compare(together(ranks.run(2, train, case, 2)), together(ranks.run(1, train, Case(mtp=1, batch=batch), 2)), 1e-9)


def test_a_layout_text_moves_layers_between_stages_and_changes_nothing():
    case = Case("dualpipev", 2, layout="E3|1|3|1HM")
    compare(together(ranks.run(2, train, case)), reference(case), 1e-9)


BROKEN = [
    ("lost message", Case("1f1b", 2, mtp=0)), ("lost message", Case("dualpipev", 2, mtp=0)),
    ("swapped labels", Case("dualpipe", 2, mtp=0)), ("twin not summed", Case("dualpipe", 2, mtp=0)),
    ("weight gradient twice", Case("zb1p", 2, mtp=0)), ("embedding not shared", Case("1f1b", 2, mtp=1)),
    ("router gradient lost", Case("dualpipev", 1, 2, 2, 0)),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "case"), BROKEN, ids=str)
def test_a_deliberate_fault_is_not_parity(fault, case):
    states = ranks.run(case.world, train, case, 1, fault)
    plain = together(ranks.run(1, train, Case(mtp=case.mtp), 1))
    worst = 0.0
    for outcome in states:
        for name, pieces in outcome.state.items():
            expected = plain.state[name]["exp_avg"]
            for lo, kinds in pieces.items():
                piece = expected[lo : lo + kinds["exp_avg"].numel()]
                worst = max(worst, (kinds["exp_avg"] - piece).abs().max().item() / expected.abs().max().item())
    assert worst > 1e-3, "parity would not have seen it"


def test_experts_given_to_the_wrong_group_are_refused_before_the_first_step():
    with pytest.raises(ranks.RankFailed, match="experts.* but hold different"):
        ranks.run(2, train, Case("1f1b", 1, 2, 2), 1, "wrong expert group")


def test_strict_refuses_what_would_run_less_than_fully_overlapped():
    cfg = config(Case("dualpipev", 2, batch=3))
    cfg.parallel.strict = True
    with pytest.raises(ScheduleError, match="parallel.strict"):
        Placement.of(cfg, Grid(2, 0, 2))
    cfg.parallel.strict = False
    first, note = Placement.of(cfg, Grid(2, 0, 2)).describe(cfg, Grid(2, 0, 2))
    assert first == "pipeline dualpipev, pp 2 x dp 1, ep 1; stages E2|2|3|1HM" and "this step has 3" in note


ALL = [
    Case(schedule, pp, ep, dp, mtp, recompute)
    for schedule in ("1f1b", "zb1p", "dualpipe", "dualpipev")
    for pp in (1, 2, 4)
    for ep in (1, 2)
    for dp in (1, 2)
    for mtp in (0, 1, 2)
    for recompute in ("none", "selective", "full")
    if dp % ep == 0 and pp * dp <= 4
]


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_layout_equals_one_process(case):
    compare(together(ranks.run(case.world, train, case)), reference(case), 1e-9)


def _times_after_validation(case: Case) -> dict[str, float]:
    trainer = Trainer(case)
    trainer.validate()
    return trainer.executor.take_timeline().fields() | {"rows": trainer.model.dispatcher.take_load().rows}


def test_validation_leaves_nothing_in_the_next_step_s_times_and_load():
    for found in ranks.run(2, _times_after_validation, Case("dualpipev", 2)):
        assert set(found.values()) == {0}
