"""Small checkpoints that look trained, written by the checkpoint's own save."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from deepv3.checkpoint import store
from deepv3.config.schema import Config, ModelConfig
from deepv3.data.tokenizer import save_tokenizer, train
from deepv3.dist import Grid
from deepv3.model.transformer import Transformer
from deepv3.optim.flat import Fragment

SMALL = ModelConfig(
    vocab_size=320, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    first_k_dense_replace=1, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=24, qk_nope_head_dim=8,
    qk_rope_head_dim=12, v_head_dim=10, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3, n_group=4,
    topk_group=2, max_position_embeddings=64, num_nextn_predict_layers=1, initializer_range=0.2,
)  # fmt: skip

# Over SMALL: sizes that FP8 blocks fit, with a ragged kv_a (140 rows) as V3 has one.
BLOCKED = {
    "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "q_lora_rank": 128,
    "kv_lora_rank": 128, "v_head_dim": 64, "initializer_range": 0.06,
}  # fmt: skip


class OneRank:
    """What save asks of an engine, for a model whose every parameter is cut into three slices."""

    def __init__(self, model: Transformer):
        self.model = model

    def fragments(self) -> list[Fragment]:
        out = []
        for name, parameter in self.model.named_parameters():
            flat = parameter.detach().view(-1)
            cuts = [0, flat.numel() // 3, flat.numel() // 2, flat.numel()]
            for lo, hi in zip(cuts, cuts[1:]):
                moment = torch.zeros(hi - lo, dtype=torch.bfloat16)
                out.append(Fragment(name, tuple(parameter.shape), lo, hi, 0, 0, flat[lo:hi], moment, moment))
        return out

    def counters(self) -> dict[str, int]:
        return {"applied_steps": 0, "skipped_steps": 0}


def worn(model: Transformer, seed: int) -> Transformer:
    """Weights as after training: uneven norm gains, negative router biases."""
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
        for router in model.routers():
            router.e_score_correction_bias.copy_(torch.randn(model.cfg.n_routed_experts, generator=generator) * 0.5 - 1)
    return model


class Run(NamedTuple):
    """A run folder, its checkpoint, and what is in it."""

    dir: Path
    checkpoint: Path
    model: Transformer
    cfg: Config


def save_run(run_dir: Path, step: int, average: bool, **fields) -> Run:
    """fields: of ModelConfig, over SMALL. average: store weight averages too, half the weights."""
    cfg = Config(run_dir=str(run_dir), model=replace(SMALL, **fields))
    model = worn(Transformer(cfg.model, device="cpu", dtype=torch.float32), seed=step)
    ema = SimpleNamespace(wait=lambda: None, view=lambda fragment: fragment.master / 2) if average else None
    client = {"progress": {"step": step, "tokens": 4096, "samples": 64}}
    save_tokenizer(train(iter(["def main():\n    return 12345\n" * 9]), SMALL.vocab_size), run_dir / "tokenizer")
    path = store.save(run_dir, step, OneRank(model), model, ema, Grid(1, 0), cfg, client)
    return Run(run_dir, path, model, cfg)
