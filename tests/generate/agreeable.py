"""Models whose prediction modules guess well, as trained ones do, so that guesses of every depth stand and fall."""

import torch

from deepv3.config.schema import ModelConfig, RopeScaling
from deepv3.model.transformer import Transformer

SMALL = ModelConfig(
    vocab_size=24, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    first_k_dense_replace=1, num_attention_heads=4, q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=4, v_head_dim=6, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2,
    max_position_embeddings=64, num_nextn_predict_layers=2, initializer_range=0.2,
)  # fmt: skip
YARN = RopeScaling(factor=4.0, original_max_position_embeddings=16, beta_fast=4.0)


def worn(cfg: ModelConfig, seed: int) -> Transformer:
    """Random weights, gains away from 1 and uneven router biases."""
    model = Transformer(cfg, device="cpu", dtype=torch.float32)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
        for router in model.routers():
            router.e_score_correction_bias.copy_(0.3 * torch.randn(cfg.n_routed_experts, generator=generator))
    return model.eval()


def agreeable(cfg: ModelConfig, seed: int, own: float = 0.4) -> Transformer:
    """Blocks add `own` of what random ones would, and modules hand the embedding on: all see mostly the last token."""
    model = worn(cfg, seed)
    d = cfg.hidden_size
    with torch.no_grad():
        model.embed_tokens.weight.mul_(1 / cfg.initializer_range)
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(own)
        for module in model.mtp:
            module.eh_proj.weight.mul_(own / 2).add_(torch.eye(d, 2 * d))
            module.enorm.weight.fill_(1.0)
            module.norm.weight.copy_(model.norm.weight)
    return model


def prompts(cfg: ModelConfig, seed: int, lengths=(1, 7, 3, 2, 12)) -> list[list[int]]:
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(cfg.vocab_size, (length,), generator=generator).tolist() for length in lengths]
