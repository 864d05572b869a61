"""Every layout is the plain model: losses, norms, expert counts and state after optimizer steps equal one process's.

In FP64 with FP64 gradients, so that only the order of sums differs (1e-16 an operation) and no near-tie in the router
can flip; in FP32, where the order is the same too, bit for bit.
"""

from typing import NamedTuple

import pytest
import ranks
import torch
from standin import whole

from deepv3.config.schema import Config, ModelConfig
from deepv3.data.loader import Batch
from deepv3.dist import init_distributed
from deepv3.optim.engine import build_engine
from deepv3.pipeline.build import Placement, build_pipeline

BATCH, SEQ, STEPS, LR = 8, 8, 3, 1e-2


class Case(NamedTuple):
    """One layout. dp: data ranks; experts over ep of them."""

    schedule: str = "1f1b"
    pp: int = 1
    ep: int = 1
    dp: int = 1
    mtp: int = 1
    recompute: str = "selective"
    precision: str = "fp64"
    layout: str = ""
    batch: int = BATCH

    @property
    def world(self) -> int:
        return self.pp * self.dp

    def __str__(self) -> str:
        return f"{self.schedule}-pp{self.pp}-ep{self.ep}-dp{self.dp}-mtp{self.mtp}-{self.recompute}-{self.precision}"


def config(case: Case) -> Config:
    cfg = Config(seed=5)
    cfg.model = ModelConfig(
        vocab_size=53, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=8,
        first_k_dense_replace=1, num_attention_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4,
        qk_rope_head_dim=4, v_head_dim=4, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2,
        max_position_embeddings=64, initializer_range=0.2, aux_loss_alpha=0.02, num_nextn_predict_layers=case.mtp,
    )  # fmt: skip
    cfg.parallel.pp_size, cfg.parallel.ep_size, cfg.parallel.schedule = case.pp, case.ep, case.schedule
    cfg.parallel.layout = case.layout
    cfg.precision.name, cfg.train.recompute = case.precision, case.recompute
    cfg.train.global_batch_size, cfg.data.seq_len = case.batch, SEQ
    cfg.optim.clip_norm, cfg.optim.moment_dtype = 0.2, "float32"
    return cfg


def sample(step: int, number: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + number)
    return torch.randint(53, (1, width), generator=generator)


class Outcome(NamedTuple):
    losses: list
    norms: list
    counts: list
    validation: float
    state: dict
    biases: dict


def train(case: Case, steps: int = STEPS) -> Outcome:
    """On a rank: some optimizer steps through executor and engine, as the training loop makes them."""
    cfg = config(case)
    grid = init_distributed(cfg)
    placement = Placement.of(cfg, grid)
    model, executor = build_pipeline(cfg, grid, placement)
    engine = build_engine(model, cfg, grid, placement.chunk_of, lambda name: placement.owner_of(name, grid.mirrored))
    losses, norms, counts = [], [], []
    width, share = SEQ + 1 + case.mtp, range(grid.dp_rank, case.batch, grid.dp_size)
    for step in range(1, steps + 1):
        engine.begin_step()
        batches = (Batch(sample(step, number, width), None) for number in share)
        out = executor.run(batches, len(share), 1 / (case.batch * SEQ), 0.3, engine.reduce)
        figures = grid.sum_over_world(torch.stack([out.loss_main, out.loss_mtp, out.loss_balance]))
        total = grid.sum_over_world(out.counts)
        norms.append(engine.finish_step(LR).norm.item())
        model.update_biases(total, 0.01)
        losses.append(figures.tolist())
        counts.append(total)
    batches = (Batch(sample(0, number, width), None) for number in share)
    out = executor.evaluate(batches, len(share), 1 / (case.batch * SEQ))
    validation = grid.sum_over_world(out.loss_main.clone()).item()
    state: dict = {}
    for f in engine.fragments():
        kinds = {"master": f.master, "exp_avg": f.exp_avg, "exp_avg_sq": f.exp_avg_sq}
        state.setdefault(f.name, {})[f.lo] = {kind: tensor.clone() for kind, tensor in kinds.items()}
    biases = {row: router.e_score_correction_bias.clone() for row, router in zip(model.rows(), model.routers())}
    return Outcome(losses, norms, counts, validation, state, biases)


def together(outcomes: list[Outcome]) -> Outcome:
    """One outcome of all ranks; whatever they share they must agree on."""
    first = outcomes[0]
    biases: dict = {}
    for outcome in outcomes:
        assert (outcome.losses, outcome.norms, outcome.validation) == (first.losses, first.norms, first.validation)
        for row, bias in outcome.biases.items():
            assert torch.equal(biases.setdefault(row, bias), bias), f"ranks disagree on the bias of MoE layer {row}"
    return first._replace(state=whole([outcome.state for outcome in outcomes]), biases=biases)


_references: dict[tuple, Outcome] = {}


def reference(case: Case) -> Outcome:
    """The same training in one process, by the plain model."""
    plain = Case(mtp=case.mtp, recompute="none", precision=case.precision, batch=case.batch)
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
]  # fmt: skip


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_layout_equals_one_process(case):
    compare(together(ranks.run(case.world, train, case)), reference(case), 1e-9)
