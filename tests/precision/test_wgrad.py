"""The queue of weight gradients and the rule for where a gradient goes."""

import weakref

import pytest
import torch

from deepv3.precision.saved import Kept, Remade
from deepv3.precision.wgrad import WeightGradQueue, deliver, deliver_value


def test_queue_runs_in_order_without_gradients_and_ends_empty():
    queue, order = WeightGradQueue(), []
    for number in range(3):
        queue.put(lambda number=number: order.append((number, torch.is_grad_enabled())))
    assert len(queue) == 3
    queue.flush()
    assert order == [(0, False), (1, False), (2, False)] and len(queue) == 0


def test_queue_releases_what_has_run():
    queue, left = WeightGradQueue(), []
    queue.put(lambda: left.append(len(queue)))
    queue.put(lambda: left.append(len(queue)))
    queue.flush()
    assert left == [1, 0]


@pytest.mark.parametrize("delayed", [False, True])
def test_store_or_add_is_decided_when_the_work_runs(delayed):
    """A delayed first gradient after an immediate one must add, not overwrite."""
    queue = WeightGradQueue() if delayed else None
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.main_grad, weight.grad_ready = torch.full((2,), 7.0), False

    def write(buffer, accumulate):
        buffer.copy_(buffer + 1 if accumulate else torch.ones(2))

    assert deliver(weight, write, queue) is None
    assert deliver_value(weight, torch.tensor([10.0, 20.0])) is None
    if queue is not None:
        queue.flush()
    assert weight.main_grad.tolist() == [11.0, 21.0]


def test_without_a_buffer_autograd_gets_the_gradient_in_the_weights_format():
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    gradient = deliver_value(weight, torch.tensor([1.0, 2.0]))
    assert gradient.dtype == torch.bfloat16 and weight.grad is None
    double = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    assert deliver_value(double, torch.tensor([0.1, 2.0], dtype=torch.float64)).dtype == torch.float64


def test_a_remade_value_reserves_its_parents_once_and_forgets_after_the_last_use():
    made = []
    parent = Remade(lambda: made.append("parent") or torch.ones(2))
    child = Remade(lambda value: (made.append("child"), value + 1)[1], parent)
    users = [child.reserve(), child.reserve(), parent.reserve()]
    assert users[0]().tolist() == [2, 2] and users[1]().tolist() == [2, 2] and users[2]().tolist() == [1, 1]
    assert made == ["parent", "child"]
    with pytest.raises(AssertionError, match="more often than announced"):
        child()


def test_a_remade_value_is_released_after_its_last_user_took_it():
    remade = Remade(lambda: torch.ones(2))
    users = [remade.reserve(), remade.reserve()]
    value = users[0]()
    alive = weakref.ref(value)
    del value
    assert alive() is not None
    users[1]()
    assert alive() is None


def test_a_kept_value_carries_no_graph():
    x = torch.ones(2, requires_grad=True)
    assert not Kept(x * 2).reserve()().requires_grad
