"""Choice, gates, balance and bias of the router (V3 2.1.2), each claim on its own."""

import math

import pytest
import small_model as small
import torch

from deepv3.model.router import Router, statistics
from deepv3.precision.saved import Operand


def _router(seed=0, **changes):
    cfg = small.config(**changes)
    router = Router(cfg)
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(router.weight, std=0.5, generator=generator)
    u = torch.randn(48, cfg.hidden_size, generator=generator)
    return router, Operand(u), cfg


def _scores(router, u):
    return torch.sigmoid(u.value @ router.weight.detach().T)


def _with_logits(logits, **changes):
    """Routing of tokens whose logits are given, through a gate that is the identity."""
    cfg = small.config(hidden_size=16, **changes)
    router = Router(cfg)
    router.weight.data.copy_(torch.eye(16))
    return router, router(Operand(logits), logits.shape[0]), cfg


def test_bias_steers_the_choice_and_never_the_weights():
    router, u, cfg = _router()
    router.e_score_correction_bias.normal_(generator=torch.Generator().manual_seed(9))
    routing = router(u, 24)
    chosen = _scores(router, u).gather(1, routing.indices.long())
    expected = 2.5 * chosen / chosen.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.weights.detach(), expected)
    router.e_score_correction_bias.zero_()
    assert not torch.equal(router(u, 24).indices, routing.indices)


def test_scores_are_sigmoids():
    """Softmax would order the experts alike but weigh them differently."""
    logits = torch.tensor([[2.0, 0.0, -1.0, -2.0, *[-9.0] * 12]])
    _, routing, _ = _with_logits(logits, n_group=1, topk_group=1, routed_scaling_factor=1.0)
    scores = torch.sigmoid(logits[:, :4])
    torch.testing.assert_close(routing.weights.detach(), scores / scores.sum())


def test_logits_keep_fp32_in_a_bf16_model():
    """Two experts whose logits differ by less than BF16 can tell are still told apart."""
    cfg = small.config(n_group=1, topk_group=1)
    router = Router(cfg)
    router.weight.data = torch.zeros(16, 32)
    router.weight.data[:, 0] = 1.0
    router.weight.data[7, 1] = 2.0**-10  # logit 1 + 2^-10 rounds to 1 in BF16
    router.weight.data[3, 1] = -(2.0**-10)
    router.weight.data = router.weight.data.bfloat16()
    u = torch.zeros(1, 32, dtype=torch.bfloat16)
    u[:, :2] = 1.0
    assert router(Operand(u), 1).indices[0, 0] == 7
    assert router(Operand(u), 1).weights.dtype == torch.float32


def test_group_score_is_the_sum_of_its_two_best_not_the_best():
    """Group 0 holds the single best expert; groups 1 and 2 the better pairs."""
    logits = torch.full((1, 16), -6.0)
    logits[0, 0] = 3.0
    logits[0, [4, 5, 8, 9]] = 2.0
    _, routing, _ = _with_logits(logits)
    assert set(routing.indices[0].tolist()) == {4, 5, 8, 9}


def test_closed_groups_stay_closed_under_negative_biases():
    """With every biased score below 0, a closed group filled with 0 would win."""
    router, u, _ = _router(n_group=4, topk_group=1, num_experts_per_tok=4)
    router.e_score_correction_bias.fill_(-5.0)
    groups = router(u, 24).indices // 4
    assert (groups == groups[:, :1]).all()


def _naive_balance(logits, top_k, seq_len):
    total = 0.0
    for sequence in logits.split(seq_len):
        scores = torch.sigmoid(sequence)
        best = scores.detach().topk(top_k).indices
        f = torch.bincount(best.flatten(), minlength=16) * (16 / (top_k * seq_len))
        total = total + (f * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum()
    return total


def test_balance_loss_uses_raw_scores_per_sequence_whatever_the_bias_and_the_groups():
    router, u, cfg = _router(n_group=4, topk_group=1)
    router.e_score_correction_bias.normal_(generator=torch.Generator().manual_seed(9))
    router.weight.data = router.weight.data.double()
    u = Operand(u.value.double())
    routing = router(u, 24)
    routing.balance.sum().backward()
    weight = router.weight.detach().requires_grad_()
    expected = _naive_balance(u.value @ weight.T, 4, 24)
    expected.backward()
    torch.testing.assert_close(routing.balance.sum(), expected.detach())
    torch.testing.assert_close(router.weight.grad, weight.grad)
    assert routing.balance.shape == (2,)
    whole = _naive_balance(u.value @ weight.T, 4, 48)
    assert abs(whole.item() - expected.item() / 2) > 1e-4  # sequences taken together give another value


def test_balance_loss_is_one_at_perfect_balance():
    logits = torch.eye(16).repeat(4, 1) * 1e-3
    _, routing, _ = _with_logits(logits, num_experts_per_tok=1, n_group=1, topk_group=1)
    assert routing.balance.item() == pytest.approx(1.0, abs=1e-3)


def test_gate_gradient_flows_through_scores_only():
    """Against autograd of the formula with the choice held fixed."""
    router, u, cfg = _router(aux_loss_alpha=0.0)
    router.weight.data = router.weight.data.double()
    u = Operand(u.value.double().requires_grad_())
    routing = router(u, 24)
    direction = torch.randn(routing.weights.shape, dtype=torch.float64)
    (routing.weights * direction).sum().backward()
    weight, value = router.weight.detach().requires_grad_(), u.value.detach().requires_grad_()
    chosen = torch.sigmoid(value @ weight.T).gather(1, routing.indices.long())
    (2.5 * chosen / chosen.sum(-1, keepdim=True) * direction).sum().backward()
    torch.testing.assert_close(router.weight.grad, weight.grad)
    torch.testing.assert_close(u.value.grad, value.grad)


@pytest.mark.parametrize("speed", [0.001, torch.tensor(0.001, dtype=torch.float64)])
def test_bias_moves_by_the_sign_of_the_deviation_from_the_mean_count(speed):
    router, _, _ = _router()
    counts = torch.tensor([10] * 14 + [1000, 10], dtype=torch.int64)
    counts[3] = 0
    start = router.e_score_correction_bias.clone()
    router.update_bias(counts, speed)
    moved = torch.full((16,), 0.001)
    moved[14] = -0.001
    assert torch.equal(router.e_score_correction_bias - start, moved)


def test_bias_of_an_expert_at_the_mean_stays():
    router, _, _ = _router()
    router.update_bias(torch.full((16,), 3), 0.1)
    assert router.e_score_correction_bias.abs().max() == 0


def test_update_biases_gives_each_layer_its_own_counts_with_mtp_last():
    model = small.build(small.config(), biases=0.0)
    counts = torch.zeros(3, 16)
    for layer in range(3):
        counts[layer, layer] = 16
    model.update_biases(counts, 0.5)
    for layer, router in enumerate(model.routers()):
        assert router.e_score_correction_bias.argmin() == layer
    assert model.routers()[-1] is model.mtp[0].block.mlp.gate


def test_bias_is_state_but_no_parameter():
    model = small.build(small.config(), dtype=torch.bfloat16)
    assert not any("bias" in name for name, _ in model.named_parameters())
    biases = {name: b for name, b in model.state_dict().items() if "bias" in name}
    assert len(biases) == 3 and all(b.dtype == torch.float32 for b in biases.values())


def test_force_balance_spreads_tokens_evenly_and_keeps_scores_as_weights():
    cfg = small.config(force_balance=True)
    model = small.build(cfg)
    out = small.backward(model, small.tokens(cfg, batch=2, seq_len=24))
    assert (out.counts == 48 * 4 // 16).all()
    router, u, _ = _router(force_balance=True)
    routing = router(u, 24)
    assert routing.indices[0].tolist() == [0, 1, 2, 3] and routing.indices[5].tolist() == [4, 5, 6, 7]
    chosen = _scores(router, u).gather(1, routing.indices.long())
    torch.testing.assert_close(routing.weights.detach(), 2.5 * chosen / chosen.sum(-1, keepdim=True))
    assert model.layers[1].mlp.gate.weight.grad.abs().max() > 0


def test_statistics_sum_entropy_of_gates_and_groups_reached():
    logits = torch.full((2, 16), -40.0)
    logits[0, [0, 1, 4, 5]] = 1.0  # two groups, equal gates
    logits[1, [8, 9, 10, 11]] = 1.0  # one group
    _, routing, cfg = _with_logits(logits)
    counts, entropy, fanout = statistics([routing], cfg, logits.device)
    assert counts.sum() == 8 and fanout.tolist() == [3.0]
    assert entropy.item() == pytest.approx(2 * math.log(4), rel=1e-5)
