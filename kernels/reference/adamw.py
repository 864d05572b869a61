"""AdamW on flat buffers and the sum of squares for the gradient norm: plain torch."""

import torch
from torch import Tensor

CHUNK = 1 << 16  # elements worked on at a time: their temporaries stay in the cache


def adamw_(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    param_out: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int | Tensor,
    grad_scale: Tensor,
) -> None:
    """One AdamW step with decoupled decay (Loshchilov 2019) in FP32; BF16 moments are rounded to nearest even.

    g = grad * grad_scale; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
    master = master (1 - lr wd) - lr (m / (1 - b1^step)) / (sqrt(v / (1 - b2^step)) + eps); param_out = master, rounded.
    The update uses the moments before rounding. master, grad: flat FP32; exp_avg, exp_avg_sq: flat BF16 or FP32;
    param_out: flat, any float format, or None. step counts from 1: an int, or a 0-dim tensor on the same device.
    grad_scale: 0-dim FP32 tensor (clip factor over loss scale); if it is not finite, nothing is written.
    """
    if not torch.isfinite(grad_scale):
        return
    step = torch.as_tensor(step, dtype=torch.float64)
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    for first in range(0, master.numel(), CHUNK):
        part = slice(first, first + CHUNK)
        g = grad[part] * grad_scale
        m = (beta1 * exp_avg[part].to(g.dtype)).add_(g, alpha=1 - beta1)
        v = (beta2 * exp_avg_sq[part].to(g.dtype)).addcmul_(g, g, value=1 - beta2)
        exp_avg[part], exp_avg_sq[part] = m, v
        master[part].mul_(1 - lr * weight_decay).sub_(
            m.div_(correction1).mul_(lr) / v.div_(correction2).sqrt_().add_(eps)
        )
        if param_out is not None:
            param_out[part] = master[part]


def sum_of_squares(flat: Tensor) -> Tensor:
    """Sum of squares of a flat tensor as a 0-dim FP64 tensor."""
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    for chunk in flat.split(CHUNK):
        total += chunk.double().square().sum()
    return total
