"""References without a backward against naive formulas and torch's own optimizer; formats they accept and return."""

import math

import pytest
import torch
from inputs import Maker, make

import deepv3.kernels as kernels


def naive_router(scores, bias, top_k, n_group, topk_group, scale):
    """V3 2.1.2 for one token, by sorting tuples."""
    size = len(scores) // n_group
    choice = [score + b for score, b in zip(scores, bias)]
    group_score = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(n_group)]
    kept = sorted(range(n_group), key=lambda g: (-group_score[g], g))[:topk_group]
    allowed = [e for e in range(len(scores)) if e // size in kept]
    chosen = sorted(allowed, key=lambda e: (-choice[e], e))[:top_k]
    total = sum(scores[e] for e in chosen) + 1e-20
    return chosen, [scale * scores[e] / total for e in chosen]


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2), (8, 4), (16, 5)])
def test_router_equals_the_naive_choice(groups, kept):
    logits, bias = Maker(groups, torch.float32).untied_logits(20, 16, groups)
    indices, weights = kernels.router_topk(logits, bias, 4, groups, kept, 2.5)
    assert indices.dtype == torch.int32 and weights.dtype == torch.float32
    for token, scores in enumerate(torch.sigmoid(logits)):
        chosen, wanted = naive_router(scores.tolist(), bias.tolist(), 4, groups, kept, 2.5)
        assert indices[token].tolist() == chosen
        assert torch.allclose(weights[token], torch.tensor(wanted), rtol=1e-5)


def test_router_breaks_ties_to_smaller_experts_and_groups():
    indices, _ = kernels.router_topk(torch.zeros(2, 12), torch.zeros(12), 5, 3, 2, 1.0)
    assert indices.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_bias_moves_the_choice_and_not_the_weights():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, 1.0])
    indices, weights = kernels.router_topk(logits, bias, 2, 1, 1, 1.0)
    assert indices.tolist() == [[3, 0]]
    scores = torch.sigmoid(logits[0, [3, 0]])
    assert torch.allclose(weights[0], scores / scores.sum())


def test_balance_loss_is_one_when_experts_share_evenly_and_grows_with_skew():
    even = torch.eye(4).repeat(3, 1) * 8 - 4  # each token prefers another expert
    skewed = torch.tensor([[8.0, 0, 0, 0]]).repeat(12, 1) - 4
    assert torch.allclose(kernels.balance_loss(even, 1, 12), torch.ones(1), atol=1e-6)
    assert kernels.balance_loss(skewed, 1, 12) > 3


def test_balance_loss_treats_each_sequence_alone():
    logits = torch.randn(24, 8)
    together = kernels.balance_loss(logits, 3, 8)
    alone = torch.cat([kernels.balance_loss(part, 3, 8) for part in logits.split(8)])
    assert torch.equal(together, alone)


def test_routing_tables_sort_by_expert_then_token():
    indices = Maker(5, torch.float32).choices(40, 9, 4)
    slots, tokens, offsets, counts = kernels.routing_tables(indices, 9)
    pairs = sorted((expert, token) for token, row in enumerate(indices.tolist()) for expert in row)
    assert tokens.tolist() == [token for _, token in pairs]
    assert counts.tolist() == [sum(expert == e for expert, _ in pairs) for e in range(9)]
    assert offsets.tolist() == counts.cumsum(0).tolist()
    for token, row in enumerate(indices.tolist()):
        assert [pairs[slot] for slot in slots[token].tolist()] == [(expert, token) for expert in row]
    assert {table.dtype for table in (slots, tokens, offsets, counts)} == {torch.int32}


def test_unpermute_adds_in_fp32_and_rounds_once():
    rows = torch.tensor([[256.0], [1.0], [1.0]]).bfloat16()  # 256 + 1 is 256 in BF16
    total = kernels.unpermute(rows, torch.tensor([[0, 1, 2]], dtype=torch.int32))
    assert total.item() == 258.0


def test_embedding_gradient_adds_repeated_tokens():
    grad = torch.ones(5, 2)
    kernels.embedding_wgrad_(grad, torch.tensor([3, 1, 3, 3]), torch.tensor([[1.0, 2.0]] * 4).bfloat16())
    assert grad.tolist() == [[1, 1], [2, 3], [1, 1], [4, 7], [1, 1]]


@pytest.mark.parametrize("accumulate", [False, True])
def test_dense_weight_gradient_of_bf16_operands_is_exact_in_fp32(accumulate):
    (grad, dy, x, _), _ = make("dense_wgrad_", Maker(1, torch.bfloat16), rows=33, n=8, k=5)
    expected = dy.double().t() @ x.double() + (grad.double() if accumulate else 0)
    kernels.dense_wgrad_(grad, dy, x, accumulate)
    assert torch.allclose(grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_adamw_follows_torch_over_several_steps():
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(200))
    master, m, v = parameter.detach().clone(), torch.zeros(200), torch.zeros(200)
    theirs = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        gradient = torch.randn(200)
        parameter.grad = gradient * 0.5
        theirs.step()
        kernels.adamw_(master, gradient, m, v, None, 1e-2, 0.9, 0.95, 1e-8, 0.1, step, torch.tensor(0.5))
        assert torch.allclose(master, parameter.detach(), rtol=1e-5, atol=1e-7)


def test_adamw_writes_the_low_precision_weight_and_rounds_bf16_moments():
    positional, _ = make("adamw_", Maker(4, torch.bfloat16), n=300)
    exact = [value.float().clone() if isinstance(value, torch.Tensor) else value for value in positional]
    kernels.adamw_(*positional)
    kernels.adamw_(*exact)
    assert torch.equal(positional[4], positional[0].bfloat16())
    assert torch.equal(positional[0], exact[0])  # the update uses the moments before rounding
    assert torch.equal(positional[2], exact[2].bfloat16()) and torch.equal(positional[3], exact[3].bfloat16())


@pytest.mark.parametrize("scale", [math.inf, math.nan])
def test_adamw_with_a_scale_that_is_not_finite_writes_nothing(scale):
    positional, _ = make("adamw_", Maker(4, torch.bfloat16), n=30)
    before = [tensor.clone() for tensor in positional[:5]]
    kernels.adamw_(*positional[:-1], torch.tensor(scale))
    assert all(torch.equal(a, b) for a, b in zip(positional, before))


def test_sum_of_squares_is_added_up_in_fp64():
    flat = torch.cat((torch.tensor([1e7]), torch.full((1000,), 1.0)))
    total = kernels.sum_of_squares(flat)
    assert total.dtype == torch.float64 and total.shape == () and total.item() == 1e14 + 1000


FLOATS = ["rmsnorm", "swiglu", "unpermute", "grouped_mm", "rope_query_", "assemble_key", "cross_entropy"]
SHAPES = {
    "rmsnorm": {"tokens": 4, "width": 32},
    "swiglu": {"rows": 4, "width": 16},
    "unpermute": {"tokens": 4, "width": 16, "top_k": 2},
    "grouped_mm": {"rows": 9, "groups": 3, "n": 16, "k": 8},
    "rope_query_": {"tokens": 4, "heads": 2, "nope": 4, "rope": 4},
    "assemble_key": {"tokens": 4, "heads": 2, "nope": 4, "rope": 4, "v": 4},
    "cross_entropy": {"rows": 6, "vocabulary": 20},
}


@pytest.mark.parametrize("name", FLOATS)
def test_bf16_differs_from_fp64_by_its_rounding_alone(name):
    positional, _ = make(name, Maker(9, torch.bfloat16), **SHAPES[name])
    exact = [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in positional]
    ours, theirs = getattr(kernels, name)(*positional), getattr(kernels, name)(*exact)
    ours, theirs = (value[0] if isinstance(value, tuple) else value for value in (ours, theirs))
    assert theirs.dtype == torch.float64
    assert (ours.double() - theirs).norm() <= 3e-3 * theirs.norm()
