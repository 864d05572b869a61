"""Linear maps in FP8, dense and by groups: three products, what backward keeps, and when weight gradients are made."""

import pytest
import torch
from emulated import BOUNDS, columns, distance, normal, rows, squares

from deepv3.config.schema import Config
from deepv3.precision.linear import GroupedLinear, Linear, Place
from deepv3.precision.recipe import Recipe, recipe_of
from deepv3.precision.saved import Operand, Remade
from deepv3.precision.wgrad import WeightGradQueue

TOKENS, IN, OUT = 200, 192, 80  # a last block of 72 tokens, 64 inputs, 80 outputs
ENDS = (128, 128, 384)  # the second group is empty
OFFSETS = torch.tensor(ENDS, dtype=torch.int32)


def recipe(name: str = "v3") -> Recipe:
    cfg = Config()
    cfg.precision.name, cfg.precision.recipe = "fp8", name
    made = recipe_of(cfg)
    assert made is not None
    return made


def dense(queue: WeightGradQueue | None = None, name: str = "v3") -> Linear:
    module = Linear(IN, OUT, Place(dtype=torch.bfloat16, queue=queue, recipe=recipe(name)), "q_a_proj")
    module.weight.data.copy_(normal(OUT, IN, seed=1, scale=0.1))
    return module


def grouped(queue: WeightGradQueue | None = None) -> GroupedLinear:
    module = GroupedLinear(3, IN, OUT, Place(dtype=torch.bfloat16, queue=queue, recipe=recipe()), "gate_up_proj")
    module.weight.data.copy_(normal(3, OUT, IN, seed=1, scale=0.1))
    return module


def with_buffer(module):
    """FP32 buffer full of rubbish, which the first gradient must overwrite."""
    module.weight.main_grad, module.weight.grad_ready = torch.full(module.weight.shape, 7.0), False
    return module


def step(module, x, dy, *offsets):
    """Output and input gradient; x: a tensor or an operand."""
    value = x.value if isinstance(x, Operand) else x
    value.requires_grad_().grad = None
    y = module(x, *offsets)
    y.backward(dy)
    return y.detach(), value.grad


def emulate(x, w, dy):
    """(y, dx, dw) of one matrix in FP64."""
    wq = squares(w)
    return rows(x) @ wq.T, rows(dy) @ wq, columns(dy).T @ columns(x)


def test_three_products_are_those_of_the_quantised_operands():
    module, x, dy = with_buffer(dense()), normal(TOKENS, IN), normal(TOKENS, OUT, seed=2)
    y, dx = step(module, x, dy)
    expected = emulate(x.detach(), module.weight.detach(), dy)
    for found, exact in zip((y, dx, module.weight.main_grad), expected):
        assert distance(found, exact) < BOUNDS[found.dtype]


def test_each_group_has_its_own_three_products_and_an_empty_one_no_gradient():
    module, x, dy = with_buffer(grouped()), normal(ENDS[-1], IN), normal(ENDS[-1], OUT, seed=2)
    y, dx = step(module, x, dy, OFFSETS)
    start = 0
    for group, end in enumerate(ENDS):
        mine = slice(start, end)
        found = y[mine], dx[mine], module.weight.main_grad[group]
        if start == end:
            assert not module.weight.main_grad[group].any()
            continue
        for value, exact in zip(found, emulate(x.detach()[mine], module.weight.detach()[group], dy[mine])):
            assert distance(value, exact) < BOUNDS[value.dtype]
        start = end


def test_results_are_near_those_of_bf16_and_not_biased():
    module, x, dy = dense(), normal(TOKENS, IN), normal(TOKENS, OUT, seed=2)
    y, dx = step(module, x, dy)
    w = module.weight.detach().double()
    exact = x.detach().double() @ w.T, dy.double() @ w, dy.double().T @ x.detach().double()
    for found, wanted in zip((y, dx, module.weight.grad), exact):
        error = found.double() - wanted
        assert 1e-2 < distance(found, wanted) < BOUNDS["linear"]
        assert abs(float(error.mean())) < 0.05 * float(error.square().mean().sqrt())


@pytest.mark.parametrize("make, more, tokens", [(dense, (), TOKENS), (grouped, (OFFSETS,), ENDS[-1])])
def test_deferred_gradients_are_the_immediate_ones_bit_for_bit(make, more, tokens):
    queue = WeightGradQueue()
    now, later = with_buffer(make()), with_buffer(make(queue))
    for seed in (3, 4):  # the second is added to the first
        dy = normal(tokens, OUT, seed=seed + 2)
        first = step(now, normal(tokens, IN, seed=seed), dy, *more)
        second = step(later, normal(tokens, IN, seed=seed), dy, *more)
        assert all(torch.equal(a, b) for a, b in zip(first, second))
        queue.close()
    assert later.weight.main_grad.eq(7.0).all() and len(queue) == 2
    queue.pop()
    assert not torch.equal(later.weight.main_grad, now.weight.main_grad)
    queue.pop()
    assert torch.equal(later.weight.main_grad, now.weight.main_grad) and not len(queue)


def test_a_remade_input_gives_the_bits_of_a_kept_one():
    made = []
    kept, remade = dense(), dense()
    x, dy = normal(TOKENS, IN), normal(TOKENS, OUT, seed=2)
    expected = step(kept, x, dy)
    value = x.detach().clone()
    found = step(remade, Operand(value, Remade(lambda: (made.append(1), x.detach())[1])), dy)
    assert all(torch.equal(a, b) for a, b in zip(found, expected)) and made == [1]
    assert torch.equal(remade.weight.grad, kept.weight.grad)


def test_backward_keeps_codes_of_the_input_and_nothing_else():
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        dense()(normal(TOKENS, IN))
    columns_kept = 256  # tokens rounded up to whole blocks
    assert sum(sizes) == columns_kept * IN + columns_kept // 128 * IN * 4


def test_without_gradients_the_output_is_the_same_and_nothing_is_quantised_twice(monkeypatch):
    import deepv3.kernels as kernels

    module, x = dense(), normal(TOKENS, IN)
    expected = module(x)
    monkeypatch.setattr(kernels, "quantise_both", None)
    with torch.no_grad():
        assert torch.equal(module(x), expected)


def test_block_gradients_drown_small_tokens_beside_a_large_one():
    """The wrong recipe is what it says, and the fault it was made for shows: V3 B.2."""
    x, dy = normal(TOKENS, IN), normal(TOKENS, OUT, seed=2) * 1e-3
    dy[5] *= 1e6
    right, wrong = with_buffer(dense()), with_buffer(dense(name="block_gradients"))
    (_, dx), (_, dx_wrong) = step(right, x, dy), step(wrong, x, dy)
    wq, exact = squares(wrong.weight.detach()), dy.double() @ right.weight.detach().double()
    assert distance(dx_wrong, squares(dy) @ wq) < BOUNDS[torch.bfloat16]
    assert distance(wrong.weight.main_grad, squares(dy).T @ columns(x.detach())) < BOUNDS[torch.float32]
    small = [token for token in range(128) if token != 5]
    assert distance(dx[small], exact[small]) < BOUNDS["linear"]
    assert distance(dx_wrong[small], exact[small]) > 0.5
