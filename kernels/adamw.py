"""AdamW on flat buffers, 22 bytes a parameter in one pass, and the sum of squares: Triton kernels.

AdamW reads master, gradient and both moments, writes master, moments and optionally the low-precision weight. Whether
the step is skipped (gradient scale not finite) is decided on the device by masking every store.
Sum of squares: FP32 per lane, FP64 across lanes and programs; the result depends on the number of multiprocessors only.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepv3.kernels.checks import ACTIVATIONS, FP32, cdiv, check, multiprocessors

ELEMENTS = 1024  # parameters of a program: 8 a lane, 16-byte loads of every tensor
SUM_ELEMENTS = 4096
SUM_PROGRAMS = 8  # a multiprocessor


@triton.jit
def _bias_correction(log_beta, step):
    """1 - beta^step without cancellation: the series of -expm1 where step * log(beta) is small."""
    x = step * log_beta
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5))))
    return tl.where(x > -0.1, series, 1 - tl.exp(x))


@triton.jit
def _adamw_kernel(
    master_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    param_ptr,
    grad_scale_ptr,
    step_ptr,
    n,
    lr,
    beta1,
    beta2,
    rest1,
    rest2,
    log_beta1,
    log_beta2,
    eps,
    decay,
    correction1,
    correction2,
    PARAM: tl.constexpr,
    DEVICE_STEP: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = places < n
    grad_scale = tl.load(grad_scale_ptr)
    grad = tl.load(grad_ptr + places, mask=mask, other=0.0) * grad_scale
    master = tl.load(master_ptr + places, mask=mask, other=0.0)
    m = tl.load(exp_avg_ptr + places, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq_ptr + places, mask=mask, other=0.0).to(tl.float32)
    if DEVICE_STEP:
        step = tl.load(step_ptr).to(tl.float32)
        correction1 = _bias_correction(log_beta1, step)
        correction2 = _bias_correction(log_beta2, step)

    m = beta1 * m + rest1 * grad
    v = beta2 * v + rest2 * grad * grad
    master = master * decay - lr * (m / correction1) / (tl.sqrt(v / correction2) + eps)

    write = mask & (tl.zeros((ELEMENTS,), dtype=tl.float32) * grad_scale == 0.0)  # 0 x inf and 0 x NaN are NaN
    tl.store(master_ptr + places, master, mask=write)
    tl.store(exp_avg_ptr + places, m.to(exp_avg_ptr.dtype.element_ty), mask=write)
    tl.store(exp_avg_sq_ptr + places, v.to(exp_avg_sq_ptr.dtype.element_ty), mask=write)
    if PARAM:
        tl.store(param_ptr + places, master.to(param_ptr.dtype.element_ty), mask=write)


@triton.jit
def _sum_of_squares_kernel(flat_ptr, partial_ptr, n, ELEMENTS: tl.constexpr):
    total = tl.zeros((ELEMENTS,), dtype=tl.float32)
    first = tl.program_id(0).to(tl.int64) * ELEMENTS  # the loop counts in 64 bits
    for start in range(first, n, tl.num_programs(0) * ELEMENTS):
        places = start + tl.arange(0, ELEMENTS)
        x = tl.load(flat_ptr + places, mask=places < n, other=0.0)
        total += x * x
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total.to(tl.float64), axis=0))


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
    """See `reference.adamw.adamw_`."""
    check("master", master, (None,), FP32, master.device)
    n, device = master.shape[0], master.device
    check("grad", grad, (n,), FP32, device)
    check("exp_avg", exp_avg, (n,), ACTIVATIONS, device)
    check("exp_avg_sq", exp_avg_sq, (n,), ACTIVATIONS, device)
    if param_out is not None:
        check("param_out", param_out, (n,), ACTIVATIONS, device)
    check("grad_scale", grad_scale, (), FP32, device)
    on_device = isinstance(step, Tensor)
    if on_device:
        check("step", step, (), (torch.int32, torch.int64, torch.float32), device)
    elif step < 1:
        raise ValueError(f"step is {step}, needed 1 or more: it counts from 1")
    if n == 0:
        return
    _adamw_kernel[(cdiv(n, ELEMENTS),)](
        master,
        grad,
        exp_avg,
        exp_avg_sq,
        master if param_out is None else param_out,  # not touched without PARAM
        grad_scale,
        step if on_device else grad_scale,  # not read without DEVICE_STEP
        n,
        float(lr),
        float(beta1),
        float(beta2),
        1.0 - beta1,
        1.0 - beta2,
        math.log(beta1) if beta1 else -math.inf,
        math.log(beta2) if beta2 else -math.inf,
        float(eps),
        1.0 - lr * weight_decay,
        1.0 if on_device else 1.0 - beta1**step,
        1.0 if on_device else 1.0 - beta2**step,
        PARAM=param_out is not None,
        DEVICE_STEP=on_device,
        ELEMENTS=ELEMENTS,
    )


def sum_of_squares(flat: Tensor) -> Tensor:
    """See `reference.adamw.sum_of_squares`. A square beyond FP32 (value above 1.8e19) makes the sum infinite."""
    check("flat", flat, (None,), FP32, flat.device)
    if flat.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=flat.device)
    programs = min(cdiv(flat.numel(), SUM_ELEMENTS), SUM_PROGRAMS * multiprocessors(flat.device))
    partial = torch.empty(programs, dtype=torch.float64, device=flat.device)
    _sum_of_squares_kernel[(programs,)](flat, partial, flat.numel(), ELEMENTS=SUM_ELEMENTS)
    return partial.sum()
