"""The whole model on a GPU: the CPU's numbers, no waiting for the device, memory that recomputation frees."""

import pytest
import small_model as small
import torch

pytestmark = pytest.mark.gpu

# Widths the GPU kernels and the tensor cores take; head dims of V3.
WIDE = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "q_lora_rank": 192,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "initializer_range": 0.06,
}


def _pair(dtype, **changes):
    """The same weights on CPU (FP32) and on the GPU."""
    cfg = small.config(**WIDE, **changes)
    reference, model = small.build(cfg, dtype=torch.float32), small.build(cfg, dtype=torch.float32)
    model.to(device="cuda")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return cfg, reference, model


def test_fp32_gradients_equal_the_cpus():
    cfg, reference, model = _pair(torch.float32)
    rows = small.tokens(cfg, seq_len=128)
    small.use_main_grads(reference)
    for parameter in model.parameters():
        parameter.main_grad, parameter.grad_ready = torch.full_like(parameter, 7.0), False
    expected, out = small.backward(reference, rows), small.backward(model, rows.cuda())
    assert out.objective.item() == pytest.approx(expected.objective.item(), rel=1e-5)
    gradients = small.gradients(reference)
    for name, gradient in small.gradients(model).items():
        assert small.distance(gradient.cpu(), gradients[name]) < 1e-4, name


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_bf16_gradients_are_within_rounding_of_the_cpus(recompute):
    """Forced balance, because near-ties may route a token elsewhere."""
    cfg, reference, _ = _pair(torch.bfloat16, force_balance=True)
    model = small.build(cfg, dtype=torch.bfloat16, recompute=recompute).to("cuda")
    rows = small.tokens(cfg, seq_len=128)
    expected, out = small.backward(reference, rows), small.backward(model, rows.cuda())
    assert out.objective.item() == pytest.approx(expected.objective.item(), rel=1e-2)
    gradients = small.gradients(reference)
    for name, gradient in small.gradients(model).items():
        assert small.distance(gradient.float().cpu(), gradients[name]) < 0.1, name


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_nothing_waits_for_the_device(recompute):
    cfg, _, _ = _pair(torch.bfloat16)
    model = small.build(cfg, dtype=torch.bfloat16, recompute=recompute).to("cuda")
    rows, speed = small.tokens(cfg, seq_len=128).cuda(), torch.tensor(1e-3, device="cuda")
    small.backward(model, rows)  # compiles kernels and builds the tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = small.backward(model, rows)
        model.update_biases(out.counts, speed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_deterministic_mode_repeats_every_bit():
    cfg, _, _ = _pair(torch.bfloat16)
    rows = small.tokens(cfg, seq_len=128).cuda()
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            model = small.build(cfg, dtype=torch.bfloat16).to("cuda")
            small.backward(model, rows)
            runs.append(small.gradients(model))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, gradient in runs[0].items():
        assert torch.equal(gradient, runs[1][name]), name


def test_recomputing_keeps_less():
    """Memory held between forward and backward falls from none to selective to full."""
    cfg, _, _ = _pair(torch.bfloat16, num_hidden_layers=6)
    rows, held = small.tokens(cfg, batch=4, seq_len=512).cuda(), []
    for recompute in ("none", "selective", "full"):
        model = small.build(cfg, dtype=torch.bfloat16, recompute=recompute).to("cuda")
        small.backward(model, rows)
        before = torch.cuda.memory_allocated()
        out = model(rows, 1 / 2048, 0.3)
        held.append(torch.cuda.memory_allocated() - before)
        out.objective.backward()
    assert held[0] > 1.2 * held[1] and held[1] > 1.2 * held[2]
