"""The feed-forward in FP8: every product and gradient against the same in FP64, and what it keeps."""

import pytest
import torch
from emulated import BOUNDS, columns, distance, normal, rows, squares, through_fp8
from test_linear8 import recipe

import deepv3.kernels as kernels
from deepv3.model.layers import MLP, feed_forward
from deepv3.precision import feedforward8
from deepv3.precision.formats import TILES_POW2, placeholder, rows_of
from deepv3.precision.linear import GroupedLinear, Place
from deepv3.precision.saved import Passed
from deepv3.precision.wgrad import WeightGradQueue

TOKENS, WIDTH = 140, 144


def mlp(inner: int, queue=None, name: str = "v3") -> MLP:
    module = MLP(WIDTH, inner, Place(dtype=torch.bfloat16, queue=queue, recipe=recipe(name)))
    for seed, part in enumerate((module.gate_up_proj, module.down_proj), 1):
        part.weight.data.copy_(normal(*part.weight.shape, seed=seed, scale=0.1))
        part.weight.main_grad, part.weight.grad_ready = torch.zeros(part.weight.shape), False
    return module


def run(module, x, dy):
    x = x.detach().requires_grad_()
    y = module(x)
    y.backward(dy)
    return y.detach(), x.grad, module.gate_up_proj.weight.main_grad, module.down_proj.weight.main_grad


def emulate(module, x, dy):
    """What `run` returns, in FP64 between roundings to BF16 where a tensor exists in BF16."""
    up, down = squares(module.gate_up_proj.weight.detach()), squares(module.down_proj.weight.detach())
    h = (rows(x) @ up.T).bfloat16()
    output = rows(swiglu(h.float()).bfloat16()) @ down.T
    dh_kept = rows(h, pow2=True).requires_grad_()
    y = swiglu(dh_kept)
    dy_in = (rows(dy) @ down).bfloat16()
    y.backward(dy_in.double())
    dh, y = dh_kept.grad.bfloat16(), y.detach().bfloat16()
    return output, rows(dh) @ up, columns(dh).T @ columns(x), columns(dy).T @ columns(y)


def swiglu(h):
    gate, up = h.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("inner", [128, 48], ids=["one kernel", "several"])
def test_every_product_is_that_of_the_quantised_operands(inner):
    """A code may differ by a step where SwiGLU in FP32 and FP64 round to different BF16 values."""
    module, x, dy = mlp(inner), normal(TOKENS, WIDTH), normal(TOKENS, WIDTH, seed=5)
    for found, exact in zip(run(module, x, dy), emulate(module, x, dy)):
        assert distance(found, exact) < 3 * BOUNDS[torch.bfloat16]


def test_one_kernel_and_several_give_the_same_bits(monkeypatch):
    x, dy = normal(TOKENS, WIDTH), normal(TOKENS, WIDTH, seed=5)
    together = run(mlp(128), x, dy)
    monkeypatch.setattr(feedforward8, "BLOCK", 1 << 20)  # no width is a multiple of that
    monkeypatch.setattr(kernels, "swiglu_fp8", None)
    assert all(torch.equal(a, b) for a, b in zip(run(mlp(128), x, dy), together))


def test_deferred_gradients_are_the_immediate_ones_bit_for_bit():
    x, dy, queue = normal(TOKENS, WIDTH), normal(TOKENS, WIDTH, seed=5), WeightGradQueue()
    now = run(mlp(128), x, dy)
    module = mlp(128, queue)
    y, dx, *_ = run(module, x, dy)
    assert len(queue) == 2
    queue.flush()
    later = y, dx, module.gate_up_proj.weight.main_grad, module.down_proj.weight.main_grad
    assert all(torch.equal(a, b) for a, b in zip(later, now))


def experts(inner: int = 128) -> tuple[GroupedLinear, GroupedLinear]:
    place = Place(dtype=torch.bfloat16, recipe=recipe())
    up = GroupedLinear(2, WIDTH, 2 * inner, place, "gate_up_proj")
    down = GroupedLinear(2, inner, WIDTH, place, "down_proj")
    for seed, part in enumerate((up, down), 1):
        part.weight.data.copy_(normal(*part.weight.shape, seed=seed, scale=0.1))
    return up, down


def test_a_gradient_that_comes_as_codes_is_used_as_they_are():
    """Rows with power-of-two scales, turned into columns without a second rounding; autograd carries a placeholder."""
    up, down = experts()
    x, dy, gates = normal(384, WIDTH), normal(384, WIDTH, seed=5), torch.linspace(0.1, 1.0, 384).requires_grad_()
    offsets = torch.tensor([256, 384], dtype=torch.int32)
    passed = Passed(TILES_POW2)
    out = feed_forward(x.requires_grad_(), up, down, gates, offsets, passed)
    passed.put(rows_of(dy, TILES_POW2))
    out.backward(placeholder(dy, *dy.shape))
    coarse, y_kept = (
        rows(dy, pow2=True),
        rows((rows(x.detach()[256:]) @ squares(up.weight[1].detach()).T).bfloat16(), True),
    )
    y = (swiglu(y_kept) * gates.detach()[256:, None]).bfloat16()
    expected = through_fp8(coarse[256:], 128, 1, pow2=True).T @ columns(y)
    assert distance(through_fp8(coarse, 128, 1, True), coarse) < 1e-2, "columns of such rows lose next to nothing"
    assert distance(down.weight.grad[1], expected) < 3 * BOUNDS[torch.bfloat16]
    assert x.grad.isfinite().all() and gates.grad.isfinite().all()


def test_a_gradient_that_nobody_passed_is_quantised_where_it_arrives():
    results = []
    for put in (True, False):
        up, down = experts()
        passed, dy = Passed(TILES_POW2), normal(256, WIDTH, seed=5)
        x = normal(256, WIDTH).requires_grad_()
        out = feed_forward(x, up, down, None, torch.tensor([128, 256], dtype=torch.int32), passed)
        if put:
            passed.put(rows_of(dy, TILES_POW2))
        out.backward(dy)
        results.append((x.grad, up.weight.grad, down.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_kept_is_the_input_and_the_gated_input_in_fp8_and_nothing_wider():
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    module = mlp(128)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(normal(TOKENS, WIDTH))
    columns_of_x = 256 * WIDTH + 2 * WIDTH * 4
    gated = TOKENS * 256 + TOKENS * 2 * 4
    assert sum(kept.values()) == columns_of_x + gated


def test_the_wrong_recipe_quantises_the_inner_gradient_in_squares_too():
    x, dy = normal(128, WIDTH), normal(128, WIDTH, seed=5) * 1e-3
    dy[5] *= 1e6
    exact = run(mlp(128), x, dy)[1]
    wrong = run(mlp(128, name="block_gradients"), x, dy)[1]
    small = [token for token in range(128) if token != 5]
    assert distance(wrong[small], exact[small]) > 0.5
