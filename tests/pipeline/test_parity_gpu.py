"""Parity of layouts on GPUs: streams, NCCL, Triton kernels. One device runs what needs one rank, more what needs more.

One step in BF16, so equal up to rounding, and a near-tie may route a token elsewhere: expert counts within 2 %, losses
within 1e-3, the norm within 1e-2, every gradient (first moment) within 0.15 of its own norm. Experts averaged over a
wrong group are 0.4 off.
"""

import pytest
import ranks
import torch
from layouts import Case, Outcome, together
from test_parity import train

pytestmark = pytest.mark.gpu

LAYOUTS = [
    Case("dualpipev", 1, mtp=0, precision="bf16", wide=True),
    Case("dualpipev", 1, mtp=1, precision="bf16", wide=True, recompute="none"),
    Case("1f1b", 1, 2, 2, 0, precision="bf16", wide=True), Case("dualpipev", 1, 2, 2, 1, precision="bf16", wide=True),
    Case("dualpipe", 2, 1, 1, 1, precision="bf16", wide=True), Case("zb1p", 2, mtp=1, precision="bf16", wide=True),
    Case("dualpipev", 2, 2, 2, 1, precision="bf16", wide=True),
    Case("dualpipe", 2, 2, 2, 1, precision="bf16", wide=True), Case("dualpipev", 4, mtp=0, precision="bf16", wide=True),
    Case("dualpipev", 1, 4, 4, 1, precision="bf16", wide=True), Case("1f1b", 4, mtp=1, precision="bf16", wide=True),
]  # fmt: skip


def close(found: Outcome, plain: Outcome) -> None:
    """Equal as far as BF16 can tell, after one step."""
    moved = (found.counts[0] - plain.counts[0]).abs().sum().item() / plain.counts[0].sum().item()
    assert moved <= 2e-2, f"{moved:.1%} of the choices are others"
    assert found.losses[0] == pytest.approx(plain.losses[0], rel=1e-3)
    assert found.norms == pytest.approx(plain.norms, rel=1e-2)
    for name, kinds in plain.state.items():
        apart = ((found.state[name]["exp_avg"] - kinds["exp_avg"]).norm() / kinds["exp_avg"].norm()).item()
        assert apart < 0.15, f"gradient of {name}: {apart:.2f}"


def once(case: Case) -> Outcome:
    """One step of a layout."""
    return together(ranks.run(case.world, train, case, 1))


def plainly(case: Case) -> Outcome:
    """One step of the plain model."""
    return once(Case(mtp=case.mtp, recompute="none", precision=case.precision, wide=case.wide))


def layouts_here() -> list[Case]:
    """Those for which this machine has devices."""
    return [case for case in LAYOUTS if case.world <= torch.cuda.device_count()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a layout that fits the machine; the others need more devices and are not collected."""
    if "layout" in metafunc.fixturenames:
        metafunc.parametrize("layout", layouts_here() or LAYOUTS[:1], ids=str)


def test_layout_on_devices_equals_one_process(layout):
    close(once(layout), plainly(layout))


def test_overlapped_pairs_on_one_device_are_the_plain_model():
    """Two streams on one device: a race would show as other gradients, run after run."""
    case = Case("dualpipev", 1, mtp=0, precision="bf16", wide=True)
    plain = plainly(case)
    for _ in range(5):
        close(once(case), plain)
