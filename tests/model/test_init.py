"""Initial weights, shapes and parameter counts."""

import dataclasses

import pytest
import small_model as small
import torch

from deepv3.config.schema import Config, ModelConfig
from deepv3.model.dispatch import LocalDispatch
from deepv3.model.init import draw_, kind_of
from deepv3.model.transformer import Transformer, build_model


def test_values_depend_on_seed_name_and_expert_only():
    """Another depth, another number of experts, another order: a tensor of the same name starts the same."""
    small_one = build_model(Config(seed=7, model=small.config()), "cpu")
    larger = build_model(Config(seed=7, model=small.config(num_hidden_layers=5, n_routed_experts=32)), "cpu")
    for model in (small_one, larger):
        model.float()
    a, b = dict(small_one.named_parameters()), dict(larger.named_parameters())
    for name in ("embed_tokens.weight", "layers.2.self_attn.q_b_proj.weight", "mtp.0.eh_proj.weight"):
        assert torch.equal(a[name], b[name]), name
    experts = "layers.1.mlp.experts.down_proj.weight"
    assert torch.equal(a[experts], b[experts][:16])


def test_a_rank_with_some_experts_draws_what_the_whole_stack_holds():
    whole, part = torch.empty(8, 3, 5), torch.empty(2, 3, 5)
    draw_(whole, 1, "x.experts.down_proj.weight", 0.006)
    draw_(part, 1, "x.experts.down_proj.weight", 0.006, first_expert=4)
    assert torch.equal(whole[4:6], part)
    assert not torch.equal(whole[0], whole[1])


def test_names_and_seeds_are_told_apart():
    draws = [draw_(torch.empty(4, 4), seed, name, 1.0) for seed, name in ((0, "a"), (1, "a"), (0, "b"))]
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_bf16_weights_are_the_fp32_draws_rounded():
    wide, narrow = small.config(), Config(seed=3, model=small.config())
    reference = Transformer(wide)
    reference.init_weights(3)
    narrow.precision.name = "bf16"
    model = build_model(narrow, "cpu")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, reference.get_parameter(name).bfloat16()), name
    assert all(router.e_score_correction_bias.dtype == torch.float32 for router in model.routers())


def test_matrices_are_normal_with_the_configured_spread_and_gains_are_one():
    cfg = small.config(vocab_size=4096, hidden_size=64, initializer_range=0.006)
    model = Transformer(cfg)
    model.init_weights(0)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif parameter.numel() > 4000:
            assert parameter.std().item() == pytest.approx(0.006, rel=0.1), name
            assert abs(parameter.mean().item()) < 0.006 * 4 / parameter.numel() ** 0.5, name
    assert ModelConfig().initializer_range == 0.006
    assert kind_of("layers.4.mlp.gate.e_score_correction_bias") == "zeros"


@pytest.fixture(scope="module")
def full_size():
    return Transformer(ModelConfig(), device="meta", dtype=torch.bfloat16)


def test_v3_has_the_published_number_of_parameters(full_size):
    counts = {"main": 0, "mtp": 0}
    for name, parameter in full_size.named_parameters():
        counts["mtp" if name.startswith("mtp.") else "main"] += parameter.numel()
    assert counts == {"main": 671_026_404_352, "mtp": 11_610_067_968}


def test_v3_has_three_dense_layers_then_58_mixtures_and_one_in_mtp(full_size):
    experts = [hasattr(block.mlp, "experts") for block in full_size.layers]
    assert experts == [False] * 3 + [True] * 58 and len(full_size.routers()) == 59
    assert full_size.layers[2].mlp.down_proj.weight.shape == (7168, 18432)
    assert full_size.layers[3].mlp.experts.gate_up_proj.weight.shape == (256, 4096, 7168)


def test_a_rank_with_some_experts_starts_with_the_weights_of_the_whole():
    class Second(LocalDispatch):
        def held(self, n_routed_experts):
            return range(n_routed_experts // 2, n_routed_experts)

    whole, half = (Transformer(small.config(), dispatcher=dispatcher) for dispatcher in (None, Second()))
    for model in (whole, half):
        model.init_weights(5)
    expected = whole.state_dict()
    for name, value in half.state_dict().items():
        assert torch.equal(value, expected[name][8:] if ".experts." in name else expected[name]), name


def test_initialising_on_the_meta_device_does_nothing(full_size):
    full_size.init_weights(0)
    assert all(parameter.is_meta for parameter in full_size.parameters())


NAMES = """
embed_tokens.weight lm_head.weight norm.weight
layers.0.input_layernorm.weight layers.0.post_attention_layernorm.weight
layers.0.self_attn.q_a_proj.weight layers.0.self_attn.q_a_layernorm.weight layers.0.self_attn.q_b_proj.weight
layers.0.self_attn.kv_a_proj_with_mqa.weight layers.0.self_attn.kv_a_layernorm.weight
layers.0.self_attn.kv_b_proj.weight layers.0.self_attn.o_proj.weight
layers.0.mlp.gate_up_proj.weight layers.0.mlp.down_proj.weight
layers.1.mlp.gate.weight layers.1.mlp.gate.e_score_correction_bias
layers.1.mlp.experts.gate_up_proj.weight layers.1.mlp.experts.down_proj.weight
layers.1.mlp.shared_experts.gate_up_proj.weight layers.1.mlp.shared_experts.down_proj.weight
mtp.0.enorm.weight mtp.0.hnorm.weight mtp.0.eh_proj.weight mtp.0.norm.weight
mtp.0.block.mlp.experts.down_proj.weight mtp.0.block.input_layernorm.weight
"""


def test_state_uses_the_published_vocabulary():
    state = set(Transformer(small.config(), device="meta").state_dict())
    assert set(NAMES.split()) <= state
    without = set(Transformer(small.config(q_lora_rank=None), device="meta").state_dict())
    assert "layers.0.self_attn.q_proj.weight" in without and not any("q_a" in name for name in without)


def test_a_model_without_shared_experts_has_none():
    model = small.build(small.config(n_shared_experts=0))
    assert not any("shared" in name for name in model.state_dict())
    small.backward(model, small.tokens(model.cfg))


def test_build_follows_the_runs_configuration():
    cfg = Config(model=dataclasses.replace(small.SMALL, num_nextn_predict_layers=3))
    cfg.train.recompute, cfg.train.loss_chunk, cfg.precision.name = "full", 5, "fp32"
    model = build_model(cfg, "cpu")
    assert len(model.mtp) == 3 and model.lm_head.chunk == 5 and model.layers[0].full
    assert model.embed_tokens.weight.dtype == torch.float32
