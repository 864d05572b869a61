"""RMSNorm whose result is an FP8 operand: codes by rows come from the norm's own kernel, BF16 only for who asks for it.

Column codes for the weight gradients behind it are made in the same read and kept, or made again in backward straight
from the norm's input and statistic (`remake`), with the same bits.
"""

from typing import Any

import torch
from torch import Tensor

import deepv3.kernels as kernels
from deepv3.precision.formats import Columns, Rows, both_of, placeholder
from deepv3.precision.recipe import Result
from deepv3.precision.saved import Operand, Remade, Stored
from deepv3.precision.wgrad import deliver_value


class _RMSNorm8(torch.autograd.Function):
    """Returns the value or its placeholder, x + residual, rows, kept columns (or None) and the statistic [T] FP32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, result: Result, columns: bool
    ) -> tuple[Tensor, Tensor, Rows, Columns | None, Tensor]:
        kept: Columns | None = None
        if columns:
            y, rstd, summed = kernels.rmsnorm(x, weight, eps, residual)
            rows, kept = both_of(y, result.format)
        else:
            pow2 = result.format.pow2
            codes, scales, rstd, summed, y = kernels.rmsnorm_fp8(x, weight, eps, residual, pow2, result.value)
            rows = Rows(codes, scales)
        ctx.save_for_backward(summed, rstd)
        ctx.weight, ctx.has_residual = weight, residual is not None
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        return y if result.value else placeholder(x, *x.shape), summed, rows, kept, rstd

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        summed, rstd = ctx.saved_tensors
        dstream = None if dstream is None else dstream.contiguous()
        dx, dweight = kernels.rmsnorm_backward(dy.contiguous(), summed, ctx.weight, rstd, dstream)
        dweight = deliver_value(ctx.weight, dweight) if ctx.needs_input_grad[2] else None
        return dx, dx if ctx.has_residual else None, dweight, None, None, None


def rmsnorm8(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, result: Result, remake: bool
) -> tuple[Operand, Tensor]:
    """(norm(x + residual), x + residual). x, residual: [T, D]. Without gradients the value is made in any case."""
    grad = torch.is_grad_enabled()
    result = result._replace(value=result.value or not grad)
    y, summed, rows, kept, rstd = _RMSNorm8.apply(x, residual, weight, eps, result, grad and not remake)
    if not grad:
        return Operand(y, rows=rows), summed
    if kept is not None:
        return Operand(y, rows=rows, columns=Stored(Columns, tuple(kept))), summed
    stream, pow2 = summed.detach(), result.format.pow2
    again = Remade(lambda: kernels.rmsnorm(stream, weight, eps)[0])
    columns = Remade(lambda: Columns(*kernels.rmsnorm_fp8_columns(stream, weight, rstd, pow2)))
    return Operand(y, again, rows, columns), summed
