"""Experts over the GPUs of this machine, one rank each, NCCL: the numbers of one GPU, and one wait per dispatch."""

import contextlib

import pytest
import ranks
import torch
from expert_ranks import Case, build, forward_and_backward, layout_of, share, start, tokens
from test_exchange import compared

from deepv3.model.exchange import AllToAllDispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one rank per GPU; this machine has fewer than two"),
]

WORLD = 4 if torch.cuda.device_count() >= 4 else 2
NODES = [8, 2] if WORLD == 4 else [8]  # ranks per node


@pytest.mark.parametrize("per_node", NODES)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 3e-2)])
def test_ranks_equal_one_gpu(dtype, tolerance, recompute, per_node):
    assert compared(Case(WORLD, per_node, dtype, recompute, device="cuda")) <= tolerance


def _waits(case):
    """How often the host waited for the device in one forward and backward, given that it may only for counts."""
    grid, dispatcher = start(case)
    model = build(case, dispatcher)
    x, end = (share(case, grid.rank, tokens(case, seed)) for seed in (0, 1))
    block, layout = model.block(1), layout_of(model, x)
    forward_and_backward(model, x, end)  # compiles kernels, connects ranks
    true, waits = AllToAllDispatch._gather, 0

    def gather(self, figures):
        nonlocal waits
        waits += 1
        with _sync_mode("default"):
            return true(self, figures)

    dispatcher._gather = gather.__get__(dispatcher)
    x = x.to(torch.bfloat16).requires_grad_()
    with _sync_mode("error"):
        out, _ = block(x, layout)
        out.sum().backward()
    return waits


@contextlib.contextmanager
def _sync_mode(mode):
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("per_node", NODES)
@pytest.mark.parametrize(("recompute", "times"), [("none", 1), ("selective", 1), ("full", 2)])
def test_the_host_waits_once_per_dispatch_and_for_nothing_else(recompute, times, per_node):
    """With recompute "full" backward dispatches once more."""
    case = Case(WORLD, per_node, "bf16", recompute, device="cuda")
    assert ranks.run(WORLD, _waits, case) == [times] * WORLD
