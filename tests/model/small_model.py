"""Small models, tokens and comparisons shared by the model's tests."""

import dataclasses

import torch

from deepv3.config.schema import ModelConfig
from deepv3.model.transformer import Output, Transformer

SMALL = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=4,
    q_lora_rank=12,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    max_position_embeddings=256,
    initializer_range=0.15,  # large enough for every path to matter in the logits
    aux_loss_alpha=0.05,
)


def config(**changes) -> ModelConfig:
    """SMALL with some fields changed."""
    return dataclasses.replace(SMALL, **changes)


def build(cfg: ModelConfig, seed: int = 1, biases: float = 0.2, dtype=torch.float32, **options) -> Transformer:
    """A model with random weights, norm gains away from 1 and router biases of spread `biases` around -2 * biases."""
    model = Transformer(cfg, dtype=dtype, **options)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(dtype))
        for router in model.routers():
            shape = router.e_score_correction_bias.shape
            router.e_score_correction_bias.copy_(biases * (torch.randn(shape, generator=generator) - 2))
    return model


def tokens(cfg: ModelConfig, batch: int = 2, seq_len: int = 24, seed: int = 3) -> torch.Tensor:
    """[batch, seq_len + 1 + D] random tokens."""
    shape = (batch, seq_len + 1 + cfg.num_nextn_predict_layers)
    return torch.randint(0, cfg.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def backward(model: Transformer, rows: torch.Tensor, mtp_weight: float = 0.3, documents=None) -> Output:
    """One forward and backward with the scale of a batch of these rows alone."""
    trained = rows.shape[0] * (rows.shape[1] - 1 - len(model.mtp))
    out = model(rows, 1.0 / trained, mtp_weight, documents)
    out.objective.backward()
    return out


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    """Every parameter's gradient, from main_grad where it has one."""
    return {name: getattr(p, "main_grad", p.grad).clone() for name, p in model.named_parameters()}


def use_main_grads(model: Transformer) -> None:
    """Give every parameter an FP32 buffer full of rubbish that the first gradient must overwrite."""
    for parameter in model.parameters():
        parameter.main_grad = torch.full(parameter.shape, 7.0)
        parameter.grad_ready = False


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|, norms over all elements; 0 where both vanish."""
    return float((a - b).norm() / b.norm().clamp_min(1e-30))
