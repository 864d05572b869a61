"""Memory on paper against the model itself: bytes that a layer keeps after forward, parameters of built stages."""

import gc
from dataclasses import replace

import pytest
import torch
from plans import REPORT, model
from torch.profiler import ProfilerActivity, profile

from deepv3.arithmetic import activation_bytes
from deepv3.model.block import Block
from deepv3.model.mla import Layout as Sequences
from deepv3.model.rope import RotaryTables
from deepv3.model.transformer import Transformer
from deepv3.planner.hardware import DEVICES, FABRICS, Cluster
from deepv3.planner.layout import Layout
from deepv3.planner.memory import Memory

BATCH, LENGTH = 2, 256
SMALL = replace(
    model("tiny"), hidden_size=256, num_attention_heads=4, n_routed_experts=8, num_experts_per_tok=2,
    moe_intermediate_size=128, n_group=1, topk_group=1, intermediate_size=512, q_lora_rank=128, kv_lora_rank=64,
    qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64, force_balance=True,
)  # fmt: skip


def kept(recompute: str, moe: bool) -> float:
    """Bytes per token that forward allocates and does not free while its graph lives, its output included."""
    block = Block(SMALL, SMALL.first_k_dense_replace if moe else 0, recompute)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    cos, sin = RotaryTables(SMALL)(BATCH, LENGTH, torch.device("cpu"))
    leaf = torch.randn(BATCH * LENGTH, SMALL.hidden_size, requires_grad=True)
    x = leaf * 1.0
    gc.collect()  # what earlier layers left must not be freed while this one is measured
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        out, routing = block(x, Sequences(BATCH, LENGTH, cos, sin, None))
        del routing
        gc.collect()
    assert out.requires_grad
    return sum(event.self_cpu_memory_usage for event in trace.key_averages()) / (BATCH * LENGTH)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("moe", [False, True])
def test_a_layer_keeps_what_the_closed_form_says_within_five_percent(recompute, moe):
    """The layer's input is the layer before's output, so each layer counts one of the two."""
    planned = sum(activation_bytes(SMALL, "fp32", recompute, moe, sent=False).values())
    assert kept(recompute, moe) == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize("schedule, pp", [("1f1b", 1), ("1f1b", 4), ("zb1p", 2), ("dualpipe", 4), ("dualpipev", 2)])
def test_a_rank_holds_the_parameters_of_the_stages_that_training_builds(schedule, pp):
    m = model("tiny")
    cluster = Cluster(DEVICES["h100"], pp, pp, FABRICS["mpft"])
    layout = Layout(m, cluster, pp, 1, schedule, "bf16", "none", 2, 256, 1, 4 * pp, 2048)
    for rank in Memory(layout, REPORT).ranks():
        parts = [(spec, None) for _, spec in layout.held(rank.rank)]
        built = Transformer(m, device="meta", parts=parts)
        assert rank.parameters == sum(parameter.numel() for parameter in built.parameters())
