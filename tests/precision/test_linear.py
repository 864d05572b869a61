"""Linear maps, grouped and not: values, gradients, and where the weight gradient goes."""

import pytest
import torch

from deepv3.precision.linear import GroupedLinear, Linear, Place, linear
from deepv3.precision.saved import Operand, Remade
from deepv3.precision.wgrad import WeightGradQueue

OFFSETS = torch.tensor([3, 3, 8, 10], dtype=torch.int32)  # the second group is empty


def _data(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def test_gradients_of_the_dense_map():
    assert torch.autograd.gradcheck(linear, (_data(5, 3), _data(4, 3, seed=1)))


def test_gradients_of_the_grouped_map_with_an_empty_group():
    assert torch.autograd.gradcheck(lambda x, w: linear(x, w, OFFSETS), (_data(10, 3), _data(4, 2, 3, seed=1)))


def test_each_group_meets_its_own_matrix():
    x, module = _data(10, 3), GroupedLinear(4, 3, 2, Place(dtype=torch.float64))
    module.weight.data.copy_(_data(4, 2, 3, seed=1))
    parts = [rows @ w.T for rows, w in zip(x.split([3, 0, 5, 2]), module.weight)]
    torch.testing.assert_close(module(x, OFFSETS), torch.cat(parts))


def _module(queue=None):
    module = Linear(3, 4, Place(queue=queue))
    module.weight.data.normal_(generator=torch.Generator().manual_seed(5))
    return module


@pytest.mark.parametrize("ready", [False, True])
def test_buffer_is_stored_into_first_and_added_to_afterwards(ready):
    module, x = _module(), _data(6, 3).float()
    module.weight.main_grad, module.weight.grad_ready = torch.full((4, 3), 7.0), ready
    module(x).sum().backward()
    fresh = torch.ones(6, 4).T @ x.detach()
    torch.testing.assert_close(module.weight.main_grad, fresh + 7.0 * ready)
    assert module.weight.grad_ready and module.weight.grad is None


def test_bf16_weights_write_an_fp32_gradient():
    module = Linear(64, 4, Place(dtype=torch.bfloat16))
    module.weight.data.normal_(generator=torch.Generator().manual_seed(5))
    module.weight.main_grad, module.weight.grad_ready = torch.zeros(4, 64), False
    x = _data(512, 64).bfloat16()
    module(x).sum().backward()
    exact = torch.ones(512, 4).T @ x.detach().float()
    torch.testing.assert_close(module.weight.main_grad, exact, rtol=1e-5, atol=1e-4)


def test_product_can_keep_its_fp32_sum():
    x, w = _data(6, 64).detach().bfloat16(), _data(4, 64, seed=1).detach().bfloat16()
    out = linear(x, w, full=True)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, x.float() @ w.float().T)
    weight, value = w.clone().requires_grad_(), x.clone().requires_grad_()
    linear(value, weight, full=True).sum().backward()
    assert weight.grad.dtype == value.grad.dtype == torch.bfloat16


def test_input_gradient_needs_no_flush_and_weight_gradient_does():
    queue = WeightGradQueue()
    module, x = _module(queue), _data(6, 3).float().detach().requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None and module.weight.grad is None and len(queue) == 1
    queue.flush()
    torch.testing.assert_close(module.weight.grad, torch.ones(6, 4).T @ x.detach())


def test_a_remade_input_is_not_kept_and_made_once_for_all_its_users():
    made = []
    source = _data(6, 3).float().detach()

    def make():
        made.append(1)
        return source * 2

    x = (source * 2).requires_grad_()
    operand = Operand(x, Remade(make))
    first, second = _module(), _module()
    out = first(operand) + second(operand)
    assert not made
    out.sum().backward()
    assert len(made) == 1
    torch.testing.assert_close(first.weight.grad, torch.ones(6, 4).T @ (source * 2))
    assert torch.equal(first.weight.grad, second.weight.grad)


def test_a_delayed_gradient_fetches_its_remade_input_when_it_runs():
    made, queue = [], WeightGradQueue()
    source = _data(6, 3).float().detach()
    operand = Operand(source.clone().requires_grad_(), Remade(lambda: (made.append(1), source)[1]))
    _module(queue)(operand).sum().backward()
    assert not made
    queue.flush()
    assert made == [1]
