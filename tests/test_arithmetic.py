"""The closed forms equal the published 671B figures and every preset's model, built without memory."""

from dataclasses import replace

import pytest

from deepv3.arithmetic import (
    activation_bytes,
    attention_flops,
    block,
    buffer_bytes,
    flops_by_part,
    flops_per_token,
    fp8_bytes,
    kv_cache_bytes,
    parameters,
    wire_bytes,
)
from deepv3.config.compose import compose, groups
from deepv3.config.schema import ModelConfig, RopeScaling
from deepv3.model.transformer import Transformer

V3 = ModelConfig()


def test_v3_has_the_published_parameters():
    count = parameters(V3)
    assert count.total == 671_026_404_352
    assert count.active == 36_625_603_584
    assert count.active_with_embedding == 37_552_282_624
    assert count.active_without_head == 35_698_924_544
    assert count.routed_experts == 653_908_770_816
    assert count.embedding == 926_679_040
    assert count.mtp == 11_610_067_968
    assert count.mtp_active + count.embedding == 1_614_779_392
    assert count.stored == count.total + count.mtp


def test_v3_layers_have_the_published_parts():
    piece = block(V3)
    assert piece.attention == 187_107_328
    assert piece.dense == 396_361_728
    assert piece.expert == piece.shared == 44_040_192
    assert piece.router == 1_835_008
    assert piece.moe(256) == 11_320_164_352


def test_v3_needs_the_published_flops_per_token():
    def giga(seq_len: int, **options) -> float:
        return flops_per_token(V3, seq_len, **options) / 1e9

    assert giga(4096, mtp=False) == pytest.approx(250.4, abs=0.05)
    assert giga(4096, causal=False, mtp=False) == pytest.approx(281.2, abs=0.05)
    assert giga(4096) - giga(4096, mtp=False) == pytest.approx(10.2, abs=0.05)
    assert giga(32768, mtp=False) == pytest.approx(465, abs=0.5)
    assert giga(131072, mtp=False) == pytest.approx(1202, abs=0.5)


def test_reported_step_time_gives_the_reported_mfu():
    """15360 x 4096 tokens in 19.926 s on 2048 devices of 989.4 TFLOP/s (HW Table 4: 38.94 % causal, 43.73 % not)."""
    rate = 15360 * 4096 / 19.926 / 2048
    for causal, reported in ((True, 0.3894), (False, 0.4373)):
        mfu = rate * flops_per_token(V3, 4096, causal=causal, mtp=False) / 989.4e12
        assert mfu == pytest.approx(reported, rel=3e-3)


def test_causal_attention_is_half_of_the_square():
    assert attention_flops(V3, 4096, causal=False) == 2 * attention_flops(V3, 4096) == 2 * 4096 * 128 * 320


def _built(cfg: ModelConfig) -> tuple[int, int]:
    """Parameters of the main model and of MTP, counted on the meta device."""
    sizes = {name: p.numel() for name, p in Transformer(cfg, device="meta").named_parameters()}
    mtp = sum(size for name, size in sizes.items() if name.startswith("mtp."))
    return sum(sizes.values()) - mtp, mtp


@pytest.mark.parametrize("preset", groups()["config"])
def test_closed_form_equals_the_built_model_of_every_preset(preset):
    cfg = compose([f"+config={preset}"]).model
    count = parameters(cfg)
    assert (count.total, count.mtp) == _built(cfg)


TINY = compose(["+config=tiny"]).model


@pytest.mark.parametrize(
    "change",
    [
        {"q_lora_rank": None},
        {"num_nextn_predict_layers": 0},
        {"num_nextn_predict_layers": 3},
        {"first_k_dense_replace": 8, "num_nextn_predict_layers": 0},
        {"first_k_dense_replace": 0},
        {"n_shared_experts": 2},
        {"rope_scaling": RopeScaling()},
    ],
    ids=lambda change: " ".join(f"{key}={value}" for key, value in change.items())[:50],
)
def test_closed_form_equals_the_built_model_of_every_variant(change):
    cfg = replace(TINY, **change)
    count = parameters(cfg)
    assert (count.total, count.mtp) == _built(cfg)


def test_active_parameters_are_those_of_a_model_with_only_the_chosen_experts():
    chosen = replace(TINY, n_routed_experts=TINY.num_experts_per_tok, n_group=1, topk_group=1)
    spared_gate = (
        (TINY.num_hidden_layers - TINY.first_k_dense_replace)
        * TINY.hidden_size
        * (TINY.n_routed_experts - TINY.num_experts_per_tok)
    )
    assert parameters(TINY).active_with_embedding == _built(chosen)[0] + spared_gate


def test_flops_are_six_per_matrix_element_that_a_token_meets_plus_attention():
    cfg = replace(TINY, num_experts_per_tok=TINY.n_routed_experts, n_group=1, topk_group=1)
    matrices = sum(p.numel() for _, p in Transformer(cfg, device="meta").named_parameters() if p.ndim > 1)
    layers = cfg.num_hidden_layers + cfg.num_nextn_predict_layers
    repeated_head = cfg.num_nextn_predict_layers * parameters(cfg).embedding
    met = matrices - parameters(cfg).embedding + repeated_head
    assert flops_per_token(cfg, 256) == 6 * met + 3 * layers * attention_flops(cfg, 256)


def test_dispatch_buffers_of_v3_are_those_of_its_report():
    """A micro-batch of one sequence, EP64 over 8 nodes, 4 nodes and 7.36 ranks per token; 14,336-byte copies."""
    mean = buffer_bytes(V3, 4096, 64, "bf16", nodes=8, reached=(4.0, 7.36))
    assert mean["landed"] == 4096 * 4 * (14336 + 64) and mean["rows"] == 4096 * 8 * 14336
    assert mean["sent"] == mean["received"] == pytest.approx(4096 * 7.36 * (14336 + 64))
    worst = buffer_bytes(V3, 4096, 64, "bf16", nodes=8)
    assert worst["received"] == 64 * 4096 * (14336 + 64)
    assert worst["rows"] == 64 * 4096 * 4 * 14336, "a rank has 4 experts"
    assert worst["sent"] == 8 * 8 * 4096 * (14336 + 64), "a landing rank fans 8 nodes' tokens out to 8 ranks"
    one_node = buffer_bytes(V3, 4096, 8, "bf16")
    assert one_node["landed"] == 0.0 and one_node["sent"] == one_node["received"] == 8 * 4096 * (14336 + 64)


def test_v3_caches_the_published_bytes_per_token():
    assert kv_cache_bytes(V3) == 70_272


def test_parts_of_the_flops_sum_to_the_whole():
    for name in groups()["model"]:
        m = compose([f"model={name}"]).model
        for causal in (True, False):
            assert sum(flops_by_part(m, 1024, causal).values()) == pytest.approx(flops_per_token(m, 1024, causal))


def test_v3_sends_the_derived_bytes():
    assert fp8_bytes(7168) == 7392 and fp8_bytes(130) == 138
    fp8, bf16, fp32 = (wire_bytes(V3, precision) for precision in ("fp8", "bf16", "fp32"))
    assert (fp8.dispatch, fp8.combine, bf16.dispatch, fp32.dispatch) == (7392, 14_336, 14_336, 28_672)


def test_v3_keeps_the_derived_bytes_of_a_layer():
    kept = activation_bytes(V3, "fp8", "selective", moe=True)
    assert sum(kept.values()) == 156_768
    local = activation_bytes(V3, "fp8", "selective", moe=True, sent=False)
    assert sum(kept.values()) - sum(local.values()) == 8 * 7392
    assert activation_bytes(V3, "bf16", "full", moe=True) == {"residual stream": 14_336}
