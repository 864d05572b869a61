"""RMSNorm with an optional residual addition before it: plain torch. Statistics in FP32 (FP64 for FP64 inputs)."""

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the format statistics are kept in: FP64 stays, everything else becomes FP32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def rmsnorm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """y = summed * rstd * weight with rstd = 1 / sqrt(mean(summed^2) + eps) and summed = x + residual (Zhang 2019).

    x, residual: [T, D]; weight: [D]. Returns y [T, D] and summed [T, D] in x's format (summed is x itself without a
    residual) and rstd [T] in FP32. The norm is taken of `summed` as rounded: backward needs nothing else.
    """
    summed = x if residual is None else (wide(x) + wide(residual)).to(x.dtype)
    value = wide(summed)
    rstd = torch.rsqrt(value.square().mean(-1) + eps)
    return (value * rstd[:, None] * wide(weight)).to(x.dtype), rstd, summed


def rmsnorm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dresidual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of `rmsnorm`; x is the `summed` it returned.

    With n = x * rstd and g = dy * weight:  dx = rstd * (g - n * mean(g * n)) + dresidual,  dweight = sum_t dy * n.
    dresidual [T, D] is the gradient that reaches `summed` past the norm. Returns dx [T, D] in x's format (the
    gradient of both x and residual) and dweight [D] in FP32.
    """
    normed = wide(x) * rstd[:, None]
    wide_dy = wide(dy)
    scaled = wide_dy * wide(weight)
    dx = rstd[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    if dresidual is not None:
        dx = dx + wide(dresidual)
    return dx.to(x.dtype), (wide_dy * normed).sum(0)
