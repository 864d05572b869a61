"""Parity of layouts that want more GPUs than there are: their ranks share what is here, with real streams, events and
kernels (`shared_gpu`). On a machine with enough GPUs they run over NCCL, in test_parity_gpu.py; those whose experts
share memory run here anyway. Tolerances are that file's.
"""

import pytest
import shared_gpu
import torch
from layouts import Case, Outcome, together
from test_parity import train
from test_parity_gpu import LAYOUTS, close, plainly

pytestmark = pytest.mark.gpu

SHARED = [
    Case("1f1b", 1, 2, 2, 0, precision="bf16", wide=True, dispatcher="symmetric"),
    Case("dualpipev", 1, 2, 2, 1, precision="bf16", wide=True, dispatcher="symmetric"),
    Case("dualpipev", 2, 2, 2, 1, precision="bf16", wide=True, dispatcher="symmetric"),
    Case("dualpipe", 2, 2, 2, 1, "full", precision="bf16", wide=True, dispatcher="symmetric"),
    Case("dualpipev", 1, 4, 4, 0, precision="bf16", wide=True, dispatcher="symmetric"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a layout that has fewer GPUs than ranks, and all that share memory."""
    if "layout" in metafunc.fixturenames:
        crowded = [case for case in LAYOUTS if case.world > torch.cuda.device_count()]
        metafunc.parametrize("layout", crowded + SHARED, ids=str)


def once(case: Case) -> Outcome:
    """One step of a layout."""
    return together(shared_gpu.run(case.world, train, case, 1, fresh=case.dispatcher == "symmetric"))


def test_layout_on_shared_devices_equals_one_process(layout):
    plain = plainly(layout)
    close(once(layout), plain)


def test_overlapped_pairs_of_two_ranks_are_the_plain_model_run_after_run():
    """Two streams and two ranks on a device: a race would show as other gradients in some run."""
    case = SHARED[1]._replace(mtp=0)
    plain = plainly(case)
    for _ in range(3):
        close(once(case), plain)
