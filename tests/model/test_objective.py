"""The model's objective and every gradient against an independent oracle in FP64."""

import naive_model
import pytest
import small_model as small
import torch

CASES = {
    "mtp depth 0": {"num_nextn_predict_layers": 0},
    "mtp depth 1": {},
    "mtp depth 2": {"num_nextn_predict_layers": 2},
    "no query latent": {"q_lora_rank": None},
    "one group": {"n_group": 1, "topk_group": 1},
    "two shared experts": {"n_shared_experts": 2},
    "width factors": {"latent_scale_q": 1.7, "latent_scale_kv": 0.6, "attn_out_scale": 0.8},
    "no balance loss": {"aux_loss_alpha": 0.0},
}


@pytest.mark.parametrize("case", CASES)
def test_objective_and_every_gradient_equal_the_reports_formulas(case):
    cfg = small.config(**CASES[case])
    model, rows = small.build(cfg, dtype=torch.float64), small.tokens(cfg)
    out = small.backward(model, rows, mtp_weight=0.4)
    weights = naive_model.weights_of(model)
    objective, main, mtp, balance = naive_model.objective(weights, rows, cfg, mtp_weight=0.4)
    objective.backward()
    assert out.objective.item() == pytest.approx(objective.item(), rel=1e-10)
    for ours, theirs in ((out.loss_main, main), (out.loss_mtp, mtp), (out.loss_balance, balance)):
        assert ours.item() == pytest.approx(float(torch.as_tensor(theirs).detach()), rel=1e-10)
    for name, gradient in small.gradients(model).items():
        assert small.distance(gradient, weights[name].grad) < 1e-9, name


def test_loss_divides_by_the_sequence_length_and_balance_is_averaged_over_sequences():
    """Rows given one by one with the batch's scale add up to the batch: nothing depends on the micro-batch's size."""
    cfg = small.config()
    rows = small.tokens(cfg, batch=4)
    together, apart = small.build(cfg, dtype=torch.float64), small.build(cfg, dtype=torch.float64)
    whole = small.backward(together, rows)
    parts = []
    for row in rows.split(1):
        out = apart(row, 1.0 / (4 * 24), 0.3)
        out.objective.backward()
        parts.append(out)
    for field in ("objective", "loss_main", "loss_mtp", "loss_balance", "entropy", "fanout"):
        torch.testing.assert_close(sum(getattr(part, field) for part in parts), getattr(whole, field))
    assert torch.equal(sum(part.counts for part in parts), whole.counts)
    for name, gradient in small.gradients(apart).items():
        assert small.distance(gradient, small.gradients(together)[name]) < 1e-10, name


def test_mtp_weight_scales_the_mtp_part_only():
    cfg = small.config(num_nextn_predict_layers=2)
    model, rows = small.build(cfg, dtype=torch.float64), small.tokens(cfg)
    with torch.no_grad():
        light, heavy = (model(rows, 1 / 48, weight) for weight in (0.1, 0.3))
    assert light.loss_mtp.item() == heavy.loss_mtp.item()
    assert (heavy.objective - light.objective).item() == pytest.approx(0.2 * light.loss_mtp.item())
    parts = light.loss_main + 0.1 * light.loss_mtp + light.loss_balance
    assert light.objective.item() == pytest.approx(parts.item())


def test_without_gradients_the_losses_are_the_same():
    cfg = small.config()
    model, rows = small.build(cfg, loss_chunk=7), small.tokens(cfg)
    trained = small.backward(model, rows)
    with torch.no_grad():
        evaluated = model(rows, 1.0 / 48, 0.3)
    for field in ("loss_main", "loss_mtp", "loss_balance", "counts"):
        torch.testing.assert_close(getattr(evaluated, field), getattr(trained, field))
    assert not evaluated.objective.requires_grad


@pytest.mark.parametrize("name", ["embed_tokens.weight", "layers.1.mlp.gate.weight", "mtp.0.eh_proj.weight", None])
def test_gradient_is_the_slope_of_the_objective(name):
    """Central differences along a random direction in FP64; None moves all parameters at once."""
    cfg = small.config()
    model, rows = small.build(cfg, dtype=torch.float64), small.tokens(cfg, batch=1, seq_len=12)
    small.backward(model, rows)
    generator = torch.Generator().manual_seed(11)
    moved = [p for n, p in model.named_parameters() if name in (n, None)]
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in moved]
    slope = sum((p.grad * d).sum() for p, d in zip(moved, directions)).item()
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for p, d in zip(moved, directions):
                p.add_(d, alpha=step)
            values.append(model(rows, 1.0 / 12, 0.3).objective.item())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_model_without_experts_reports_empty_statistics():
    cfg = small.config(first_k_dense_replace=3, num_nextn_predict_layers=0)
    out = small.backward(small.build(cfg), small.tokens(cfg))
    assert out.counts.shape == (0, 16) and out.entropy.shape == (0,) and out.fanout.shape == (0,)
    assert out.loss_balance.item() == 0 and out.loss_mtp.item() == 0


def test_bf16_model_keeps_logits_of_the_router_and_the_losses_in_fp32():
    cfg = small.config()
    model = small.build(cfg, dtype=torch.bfloat16)
    small.use_main_grads(model)
    out = small.backward(model, small.tokens(cfg))
    reference = small.build(cfg)
    expected = small.backward(reference, small.tokens(cfg))
    assert {t.dtype for t in (out.objective, out.loss_main, out.entropy)} == {torch.float32}
    assert out.loss_main.item() == pytest.approx(expected.loss_main.item(), rel=2e-2)
    similar = small.distance(model.lm_head.weight.main_grad, reference.lm_head.weight.grad)
    assert similar < 0.1
