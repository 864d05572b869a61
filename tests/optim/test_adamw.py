"""The client optimizer by itself: AdamW's arithmetic against torch's, and formats that survive a load."""

import pytest
import torch

from deepv3.optim.adamw import AdamW


def _flat(moments: torch.dtype) -> tuple[AdamW, torch.Tensor, torch.Tensor]:
    master = torch.linspace(-1, 1, 100)
    master.grad = torch.linspace(2, -1, 100)
    low = master.bfloat16()
    optimizer = AdamW([{"params": [master], "weight_decay": 0.1}], 0.9, 0.95, 1e-8, moments)
    optimizer.allocate(master, low)
    return optimizer, master, low


def _step(optimizer: AdamW, count: int, scale: float = 1.0) -> None:
    optimizer.step(1e-2, torch.tensor(count), torch.tensor(scale))


def test_fp32_steps_are_torchs_adamw():
    optimizer, master, low = _flat(torch.float32)
    theirs = master.clone().requires_grad_()
    torchs = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for count in range(1, 6):
        theirs.grad = master.grad.clone()
        torchs.step()
        _step(optimizer, count)
    torch.testing.assert_close(master, theirs.detach(), rtol=1e-6, atol=1e-7)
    assert torch.equal(low, master.bfloat16())


@pytest.mark.parametrize("moments", [torch.bfloat16, torch.float32])
def test_moments_keep_their_format_and_bits_through_a_load(moments):
    optimizer, master, _ = _flat(moments)
    _step(optimizer, 1)
    other, _, _ = _flat(moments)
    other.load_state_dict(optimizer.state_dict())
    for name in ("exp_avg", "exp_avg_sq"):
        ours, loaded = optimizer.state[master][name], next(iter(other.state.values()))[name]
        assert loaded.dtype == moments and torch.equal(ours, loaded)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_writes_nothing(scale):
    optimizer, master, low = _flat(torch.bfloat16)
    before = master.clone(), low.clone()
    _step(optimizer, 1, scale)
    assert torch.equal(master, before[0]) and torch.equal(low, before[1])
    assert all(t.count_nonzero() == 0 for t in optimizer.state[master].values())
