"""Logits and every gradient against transformers' DeepSeek-V3 in FP32, from weights that transformers drew.

The name map is written here on its own, apart from the exporter's.
"""

import pytest
import small_model as small
import torch
import torch.nn.functional as F

from deepv3.config.schema import RopeScaling
from deepv3.model.transformer import Transformer

pytest.importorskip("transformers")
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM  # noqa: E402
from transformers.modeling_layers import MtpLayer  # noqa: E402
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs  # noqa: E402

# Ramp over pairs 0 to 4 of 8: some frequencies kept, some blended, some divided.
YARN = {
    "rope_scaling": RopeScaling(factor=8.0, original_max_position_embeddings=32, beta_fast=4.0, beta_slow=1.0),
    "max_position_embeddings": 256,
    "qk_rope_head_dim": 16,
    "rope_theta": 30.0,
}
CASES = {
    "plain": {},
    "no query latent": {"q_lora_rank": None},
    "one group": {"n_group": 1, "topk_group": 1},
    "yarn": YARN,
    "yarn without query latent and groups": {**YARN, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
}
PUBLISHED = """
vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers first_k_dense_replace
num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts
n_shared_experts num_experts_per_tok n_group topk_group routed_scaling_factor rms_norm_eps max_position_embeddings
"""
BATCH, SEQ = 2, 48  # beyond the original 32 positions of the YaRN cases


def their_config(cfg) -> DeepseekV3Config:
    scaling = cfg.rope_scaling
    return DeepseekV3Config(
        **{name: getattr(cfg, name) for name in PUBLISHED.split()},
        num_key_value_heads=cfg.num_attention_heads,
        initializer_range=0.15,
        rope_theta=cfg.rope_theta,
        rope_scaling=None if scaling is None else {"type": "yarn", "rope_type": "yarn", **vars(scaling)},
        attn_implementation="eager",
    )


def draw(module: torch.nn.Module, seed: int) -> None:
    """Random weights, gains away from 1, biases mostly below 0 (where a closed group filled with 0 would be chosen)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            value = torch.randn(tensor.shape, generator=generator)
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(0.2 * value - 0.8)
            elif "norm" in name:
                tensor.copy_(1 + 0.3 * value)
            elif "inv_freq" not in name:
                tensor.copy_(0.15 * value)


def their_value(name: str, source: dict[str, torch.Tensor]) -> torch.Tensor:
    """The value of our tensor `name` among theirs."""
    name = name if name.startswith("lm_head") else "model." + name
    if name in source:
        return source[name]
    if "experts.gate_up_proj" in name or "experts.down_proj" in name:
        bare = name.removesuffix(".weight")
        if bare in source:
            return source[bare]
    halves = [name.replace("gate_up_proj", half) for half in ("gate_proj", "up_proj")]
    return torch.cat([source[half] for half in halves])


def ours_from(reference: torch.nn.Module, cfg) -> Transformer:
    model = Transformer(cfg)
    source = dict(reference.named_parameters()) | dict(reference.named_buffers())
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.copy_(their_value(name, source))
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_and_every_gradient_equal_transformers(case):
    cfg = small.config(num_nextn_predict_layers=0, aux_loss_alpha=0.0, **CASES[case])
    reference = DeepseekV3ForCausalLM(their_config(cfg)).train()
    draw(reference, seed=5)
    model, rows = ours_from(reference, cfg), small.tokens(cfg, BATCH, SEQ)
    logits = reference(rows[:, :-1]).logits
    assert (model.logits(rows[:, :-1]) - logits).abs().max() <= 1e-5 * logits.abs().max()

    F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
    small.backward(model, rows)
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        assert small.distance(parameter.grad, their_value(name, gradients)) < 2e-5, name


@pytest.mark.parametrize("depths", [1, 2])
def test_prediction_depths_equal_transformers(depths):
    """Their MTP layers, chained as their generation does: post-norm state in, shared embedding and head."""
    cfg = small.config(num_nextn_predict_layers=depths)
    reference = DeepseekV3ForCausalLM(their_config(cfg))
    layers = [
        MtpLayer(reference.config, theirs.DeepseekV3DecoderLayer, theirs.DeepseekV3RMSNorm, cfg.num_hidden_layers + k)
        for k in range(depths)
    ]
    for seed, module in enumerate((reference, *layers)):
        draw(module, seed)
    source = dict(reference.named_parameters()) | dict(reference.named_buffers())
    for k, layer in enumerate(layers):
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            ours = name.replace("mtp_block.", "block.").replace("post_norm.", "norm.")
            source[f"model.mtp.{k}.{ours}"] = tensor
    model = Transformer(cfg)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.copy_(their_value(name, source))

    rows = small.tokens(cfg, BATCH, SEQ)[:, : SEQ + depths]
    with torch.no_grad():
        hidden = reference.model(rows[:, :SEQ]).last_hidden_state
        tables = reference.model.rotary_emb(hidden, position_ids=torch.arange(SEQ)[None])
        mask = torch.full((SEQ, SEQ), float("-inf")).triu(1)[None, None]
        expected = [reference.lm_head(hidden)]
        for k, layer in enumerate(layers, 1):
            embedded = reference.model.embed_tokens(rows[:, k : k + SEQ])
            hidden = layer(embedded, hidden, tables, mask, None, None)
            expected.append(reference.lm_head(hidden))
    logits = model.logits(rows, mtp=True)
    assert logits.shape == (1 + depths, BATCH, SEQ, cfg.vocab_size)
    for ours, reference_logits in zip(logits, expected):
        assert (ours - reference_logits).abs().max() <= 1e-5 * reference_logits.abs().max()
