"""Small models on every layout: how they are described, built and trained a step. Shared by the pipeline's tests."""

from dataclasses import replace
from typing import NamedTuple

import torch
from standin import whole

from deepv3.config.schema import Config, ModelConfig
from deepv3.data.loader import Batch
from deepv3.dist import init_distributed
from deepv3.optim.engine import build_engine
from deepv3.pipeline.build import Placement, build_pipeline

BATCH, SEQ, LR = 8, 8, 1e-2


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
    wide: bool = False  # shapes that GPU kernels take
    dispatcher: str = "all_to_all"

    @property
    def world(self) -> int:
        return self.pp * self.dp

    @property
    def seq_len(self) -> int:
        return 128 if self.wide else SEQ

    def __str__(self) -> str:
        name = f"{self.schedule}-pp{self.pp}-ep{self.ep}-dp{self.dp}-mtp{self.mtp}-{self.recompute}-{self.precision}"
        return name if self.dispatcher == "all_to_all" else f"{name}-{self.dispatcher}"


def config(case: Case) -> Config:
    cfg = Config(seed=5)
    cfg.model = ModelConfig(
        vocab_size=53, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=8,
        first_k_dense_replace=1, num_attention_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4,
        qk_rope_head_dim=4, v_head_dim=4, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2,
        max_position_embeddings=64, initializer_range=0.2, aux_loss_alpha=0.02, num_nextn_predict_layers=case.mtp,
    )  # fmt: skip
    if case.wide:
        cfg.model = replace(
            cfg.model, vocab_size=512, hidden_size=256, intermediate_size=256, moe_intermediate_size=128,
            q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
            max_position_embeddings=256, initializer_range=0.05,
        )  # fmt: skip
    cfg.parallel.pp_size, cfg.parallel.ep_size, cfg.parallel.schedule = case.pp, case.ep, case.schedule
    cfg.parallel.layout, cfg.parallel.dispatcher = case.layout, case.dispatcher
    cfg.precision.name, cfg.train.recompute = case.precision, case.recompute
    cfg.train.global_batch_size, cfg.data.seq_len = case.batch, case.seq_len
    cfg.optim.clip_norm, cfg.optim.moment_dtype = 0.2, "float32"
    return cfg


def sample(step: int, number: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + number)
    return torch.randint(53, (1, width), generator=generator)


class Trainer:
    """One rank of a layout, with everything a step needs."""

    def __init__(self, case: Case) -> None:
        self.case, self.cfg = case, config(case)
        self.grid = init_distributed(self.cfg)
        placement = Placement.of(self.cfg, self.grid)
        self.model, self.executor = build_pipeline(self.cfg, self.grid, placement)
        self.engine = build_engine(
            self.model,
            self.cfg,
            self.grid,
            placement.chunk_of,
            lambda name: placement.owner_of(name, self.grid.mirrored),
        )
        self.share = range(self.grid.dp_rank, case.batch, self.grid.dp_size)
        self.losses: list[list[float]] = []
        self.norms: list[float] = []
        self.counts: list[torch.Tensor] = []

    def batches(self, step: int):
        """This data rank's micro-batches of a step."""
        return (Batch(sample(step, number, self.case.seq_len + 1 + self.case.mtp), None) for number in self.share)

    def step(self, number: int) -> None:
        """One optimizer step through executor and engine, as the training loop makes it."""
        self.engine.begin_step()
        scale = 1 / (self.case.batch * self.case.seq_len)
        out = self.executor.run(self.batches(number), len(self.share), scale, 0.3, self.engine.reduce)
        figures = self.grid.sum_over_world(torch.stack([out.loss_main, out.loss_mtp, out.loss_balance]))
        total = self.grid.sum_over_world(out.counts)
        self.norms.append(self.engine.finish_step(LR).norm.item())
        self.model.update_biases(total, 0.01)
        self.losses.append(figures.tolist())
        self.counts.append(total)

    def validate(self) -> float:
        """Loss of a fixed batch through the same pipeline."""
        out = self.executor.evaluate(self.batches(0), len(self.share), 1 / (self.case.batch * self.case.seq_len))
        return self.grid.sum_over_world(out.loss_main.clone()).item()

    def outcome(self, validation: float = 0.0) -> "Outcome":
        """What happened so far, and this rank's state."""
        state: dict = {}
        for f in self.engine.fragments():
            kinds = {"master": f.master, "exp_avg": f.exp_avg, "exp_avg_sq": f.exp_avg_sq}
            state.setdefault(f.name, {})[f.lo] = {kind: tensor.clone() for kind, tensor in kinds.items()}
        rows = zip(self.model.rows(), self.model.routers())
        biases = {row: router.e_score_correction_bias.clone() for row, router in rows}
        return Outcome(self.losses, self.norms, self.counts, validation, state, biases)


class Outcome(NamedTuple):
    losses: list
    norms: list
    counts: list
    validation: float
    state: dict
    biases: dict


def together(outcomes: list[Outcome]) -> Outcome:
    """One outcome of all ranks; whatever they share they must agree on."""
    first = outcomes[0]
    biases: dict = {}
    for outcome in outcomes:
        assert (outcome.losses, outcome.norms, outcome.validation) == (first.losses, first.norms, first.validation)
        for row, bias in outcome.biases.items():
            assert torch.equal(biases.setdefault(row, bias), bias), f"ranks disagree on the bias of MoE layer {row}"
    return first._replace(state=whole([outcome.state for outcome in outcomes]), biases=biases)
