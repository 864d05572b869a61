"""Adversarial inputs: no rows, ties, one expert takes all, values that are not finite, buffers filled with NaN."""

import math

import pytest
import torch
from inputs import Maker, compare, kernel, make

import deepv3.kernels as kernels
from deepv3.kernels import gemm

NAN = float("nan")

EMPTY = {
    "rmsnorm": {"tokens": 0, "width": 8},
    "rmsnorm_backward": {"tokens": 0, "width": 8},
    "rope_query_": {"tokens": 0, "heads": 2, "nope": 4, "rope": 4},
    "assemble_key": {"tokens": 0, "heads": 2, "nope": 4, "rope": 4, "v": 4},
    "assemble_key_backward": {"tokens": 0, "heads": 2, "nope": 4, "rope": 4, "v": 4},
    "router_topk": {"tokens": 0, "experts": 8, "top_k": 2, "groups": 2, "kept": 1},
    "router_topk_backward": {"tokens": 0, "experts": 8, "top_k": 2},
    "balance_loss": {"sequences": 0, "seq_len": 4, "experts": 8, "top_k": 2},
    "balance_loss_backward": {"sequences": 0, "seq_len": 4, "experts": 8, "top_k": 2},
    "routing_tables": {"tokens": 0, "experts": 8, "top_k": 2},
    "permute": {"tokens": 0, "width": 8, "top_k": 2},
    "unpermute": {"tokens": 0, "width": 8, "top_k": 2},
    "swiglu": {"rows": 0, "width": 8},
    "swiglu_backward": {"rows": 0, "width": 8},
    "cross_entropy_": {"rows": 0, "vocabulary": 8},
    "grouped_wgrad_": {"rows": 0, "groups": 3, "n": 8, "k": 8},
    "adamw_": {"n": 0, "param": torch.float32},
    "sum_of_squares": {"n": 0},
}


@pytest.mark.parametrize("name", EMPTY)
def test_no_rows_give_empty_or_zero_results(name):
    compare(name, make(name, Maker(0, torch.float32), **EMPTY[name]))


def test_embedding_gradient_of_no_tokens_changes_nothing():
    grad = torch.randn(3, 4)
    before = grad.clone()
    kernel("embedding_wgrad_")(grad, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    assert torch.equal(grad, before)


def test_equal_scores_choose_the_smaller_experts_and_groups():
    indices, weights = kernel("router_topk")(torch.zeros(3, 32), torch.zeros(32), 6, 8, 2, 2.5)
    assert indices.tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    assert torch.allclose(weights, torch.full((3, 6), 2.5 / 6))


def test_ties_between_some_experts_go_to_the_smaller_index_as_in_the_reference():
    logits = torch.randint(-2, 3, (64, 64), generator=torch.Generator().manual_seed(1)).float()  # a few levels only
    bias = torch.zeros(64)
    ours = kernel("router_topk")(logits, bias, 8, 8, 4, 1.0)[0]
    assert torch.equal(ours, kernels.router_topk.__wrapped__(logits, bias, 8, 8, 4, 1.0)[0])


def test_negative_zero_ties_with_zero():
    bias = torch.full((8,), -0.5)
    logits = torch.zeros(1, 8)  # choices are +0 everywhere
    assert kernel("router_topk")(logits, bias, 3, 1, 1, 1.0)[0].tolist() == [[0, 1, 2]]


def test_saturated_and_infinite_logits_keep_weights_finite_and_indices_distinct():
    logits = torch.tensor([[-1e4] * 16, [1e4] * 16, [-math.inf] * 16, [math.inf] * 16])
    indices, weights = kernel("router_topk")(logits, torch.zeros(16), 4, 4, 2, 2.5)
    assert torch.isfinite(weights).all()
    assert indices.tolist() == [[0, 1, 2, 3]] * 4
    assert weights[1].tolist() == [0.625] * 4


def test_nan_logits_still_choose_distinct_experts_within_range():
    logits = torch.randn(4, 16)
    logits[1, 5] = NAN
    logits[2] = NAN
    indices = kernel("router_topk")(logits, torch.zeros(16), 4, 4, 2, 2.5)[0]
    assert all(len(set(row)) == 4 and min(row) >= 0 and max(row) < 16 for row in indices.tolist())


def test_a_group_lost_to_the_limit_is_never_chosen():
    logits = torch.full((1, 16), -2.0)
    logits[0, 3] = 9.0  # best expert of all, in a group whose second best is poor
    logits[0, 4:8] = 2.0
    logits[0, 8:12] = 2.0
    indices = kernel("router_topk")(logits, torch.zeros(16), 4, 4, 2, 1.0)[0]
    assert indices.tolist() == [[4, 5, 6, 7]]


@pytest.mark.parametrize("expert", [0, 5, 9])
def test_tables_when_all_tokens_go_to_one_expert(expert):
    indices = torch.full((700, 1), expert, dtype=torch.int32)
    slots, tokens, offsets, counts = kernel("routing_tables")(indices, 10)
    assert torch.equal(tokens, torch.arange(700).int()) and torch.equal(slots[:, 0], tokens)
    assert counts.tolist() == [700 * (e == expert) for e in range(10)]
    assert offsets.tolist() == [700 * (e >= expert) for e in range(10)]


def test_unpermute_undoes_permute_through_the_tables():
    indices = Maker(3, torch.float32).choices(50, 12, 4)
    slots, tokens, _, _ = kernel("routing_tables")(indices, 12)
    x = torch.randint(-8, 8, (50, 20)).float()
    rows = kernel("permute")(x, tokens)
    assert torch.equal(kernel("unpermute")(rows, slots), 4 * x)


OFFSETS = {
    "first empty": [0, 40, 100],
    "middle empty": [33, 33, 100],
    "last empty": [64, 100, 100],
    "all to one": [0, 100, 100],
    "all to the last": [0, 0, 100],
    "one row each": [1, 2, 3],
    "all empty": [0, 0, 0],
}


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("ends", OFFSETS.values(), ids=OFFSETS.keys())
def test_grouped_weight_gradient_of_uneven_experts(ends, accumulate, descriptors):
    maker = Maker(7, torch.float32)
    rows = ends[-1]
    dy, x = maker.normal(rows, 40), maker.normal(rows, 24)
    grad = maker.normal(3, 40, 24) if accumulate else torch.full((3, 40, 24), NAN)  # storing must not read
    expected = grad.double()
    tile = gemm.Tile(32, 16, 16, 4, 2, descriptors)
    offsets = torch.tensor(ends, dtype=torch.int32)
    gemm.launch_grouped_wgrad(grad, dy, x, offsets, accumulate, tile)
    kernels.grouped_wgrad_.__wrapped__(expected, dy.double(), x.double(), offsets, accumulate)
    assert (grad.double() - expected).norm() <= 1e-6 * max(1.0, expected.norm())


@pytest.mark.parametrize("descriptors", [False, True])
def test_grouped_weight_gradient_does_not_leak_across_experts(descriptors):
    maker = Maker(8, torch.float32)
    dy, x = maker.normal(30, 16), maker.normal(30, 16)
    dy[20:], x[20:] = NAN, math.inf  # rows of the second expert, in the last tile of the first
    grad = torch.zeros(2, 16, 16)
    tile = gemm.Tile(16, 16, 16, 4, 2, descriptors)
    gemm.launch_grouped_wgrad(grad, dy, x, torch.tensor([20, 30], dtype=torch.int32), True, tile)
    assert torch.isfinite(grad[0]).all() and torch.isnan(grad[1]).all()


def test_skewed_embedding_ids_add_up_in_every_place():
    ids = torch.tensor([5] * 64 + [0] + [5] * 33 + [9, 9, 0])
    grad = torch.zeros(10, 7)
    kernel("embedding_wgrad_")(grad, ids, torch.ones(101, 7))
    assert grad[:, 0].tolist() == [2, 0, 0, 0, 0, 97, 0, 0, 0, 2]


@pytest.mark.parametrize("scale", [math.inf, -math.inf, NAN])
def test_adamw_with_a_scale_that_is_not_finite_leaves_every_bit(scale):
    positional, _ = make("adamw_", Maker(1, torch.float32), n=1500, param=torch.float32)
    state = positional[:5]
    before = [tensor.clone() for tensor in state]
    kernel("adamw_")(*positional[:-1], torch.tensor(scale))
    assert all(torch.equal(a, b) for a, b in zip(state, before))


def test_adamw_counts_steps_on_the_device_as_on_the_host():
    for step in (1, 2, 10, 1000, 1_000_000):
        positional, _ = make("adamw_", Maker(step, torch.float32), n=64, param=None)
        host = [value.clone() if isinstance(value, torch.Tensor) else value for value in positional]
        kernel("adamw_")(*host[:10], step, host[11])
        kernel("adamw_")(*positional[:10], torch.tensor(step), positional[11])
        assert torch.allclose(host[0], positional[0], rtol=3e-6, atol=1e-7), step


def test_cross_entropy_writes_zeros_over_ignored_rows_whatever_they_hold():
    logits = torch.randn(3, 50)
    logits[1] = NAN
    loss = kernel("cross_entropy_")(logits, torch.tensor([4, -100, 7]), 1.0)
    assert loss[1] == 0 and (logits[1] == 0).all()
    assert torch.isfinite(loss).all() and torch.isfinite(logits).all()


def test_cross_entropy_shows_a_label_outside_the_vocabulary_as_nan():
    loss = kernel("cross_entropy")(torch.randn(3, 50), torch.tensor([50, -1, 49]))
    assert torch.isnan(loss).tolist() == [True, True, False]


def test_cross_entropy_of_huge_and_masked_logits_is_exact():
    logits = torch.full((2, 40), -math.inf)
    logits[0, 3], logits[0, 5] = 3e4, 3e4
    logits[1, 39] = -3e38
    loss = kernel("cross_entropy_")(logits, torch.tensor([3, 39]), 1.0)
    assert torch.allclose(loss, torch.tensor([math.log(2), 0.0]), atol=4e-3)
    assert logits[0, [3, 5]].tolist() == [-0.5, 0.5] and logits.abs().sum() == 1.0


def test_cross_entropy_leaves_columns_between_strided_rows_alone():
    buffer = torch.randn(4, 70)
    before = buffer.clone()
    logits, labels = buffer[:, :64], torch.tensor([0, 63, 5, -100])
    expected = logits.clone()
    kernels.cross_entropy_.__wrapped__(expected, labels, 0.5)
    kernel("cross_entropy_")(logits, labels, 0.5)
    assert torch.allclose(buffer[:, :64], expected, atol=1e-6) and torch.equal(buffer[:, 64:], before[:, 64:])


def test_strided_rows_are_read_where_they_lie():
    wide = torch.randn(6, 40)
    x, residual = wide[:, :24], wide[:, 16:]
    ours = kernel("rmsnorm")(x, torch.ones(24), 1e-6, residual)
    theirs = kernels.rmsnorm.__wrapped__(x, torch.ones(24), 1e-6, residual)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs))


def test_a_nan_stays_in_its_row():
    x = torch.randn(6, 32)
    x[2, 7] = NAN
    for result in (kernel("rmsnorm")(x, torch.ones(32), 1e-6)[0], kernel("swiglu")(x)):
        assert torch.isnan(result).any(dim=1).tolist() == [False, False, True, False, False, False]


def test_zero_rows_have_finite_norms_and_gradients():
    x, weight = torch.zeros(3, 16), torch.ones(16)
    y, rstd, _ = kernel("rmsnorm")(x, weight, 1e-6)
    dx, dweight = kernel("rmsnorm_backward")(torch.ones(3, 16), x, weight, rstd)
    assert (y == 0).all() and torch.isfinite(dx).all() and (dweight == 0).all()


def test_inverse_rotation_undoes_the_rotation():
    (q, cos, sin, _), _ = make("rope_query_", Maker(2, torch.float32), tokens=7, heads=3, nope=4, rope=16)
    before = q.clone()
    rope = kernel("rope_query_")
    assert not torch.allclose(rope(q, cos, sin), before)
    assert torch.allclose(rope(q, cos, sin, inverse=True), before, atol=1e-5)
