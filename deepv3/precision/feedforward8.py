"""The SwiGLU feed-forward in FP8, dense or by experts.

    [gate | up] = x @ w_up^T,  out = (silu(gate) * up * gates) @ w_down^T

One autograd function, because what lies between the two products never exists in BF16 backward: SwiGLU's kernel writes
its output and its gradient as codes, by rows and by columns. Kept are [gate | up] in FP8 with power-of-two scales and
the gates; the output is made again (V3 3.3.3).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

import deepv3.kernels as kernels
from deepv3.kernels.reference.quantise import BLOCK
from deepv3.precision.formats import Columns, Rows, both_of, columns_of, rows_of, turned
from deepv3.precision.linear8 import Weight8, dgrad, fprop, prepare, recall, remember, wgrad
from deepv3.precision.recipe import GRADIENT, INPUT, SWIGLU_INPUT, SWIGLU_OUTPUT, Recipe
from deepv3.precision.saved import Operand, Passed


class _FeedForward8(torch.autograd.Function):
    """x is autograd's handle of the operand; the weights are arguments for their gradients' sake."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gates: Tensor | None,
        w_up: Tensor,
        w_down: Tensor,
        operand: Operand,
        up: Weight8,
        down: Weight8,
        offsets: Tensor | None,
        passed: Passed | None,
        keep: bool,
    ) -> Tensor:
        rows, source = prepare(operand, up.recipe[INPUT], keep)
        h = fprop(rows, up.codes(), offsets, x.dtype)
        output, kept = swiglu(h, gates, down.recipe, keep)
        ctx.up, ctx.down, ctx.passed, ctx.dtype = up, down, passed, x.dtype
        remember(ctx, source, offsets, gates, *(kept or ()))
        return fprop(output, down.codes(), offsets, x.dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (offsets, gates, *kept), x_columns = recall(ctx)
        up, down, dtype = ctx.up, ctx.down, ctx.dtype
        if ctx.passed is None:
            dout_rows, columns = both_of(dout.to(dtype).contiguous(), down.recipe[GRADIENT])
            dout_columns = partial(Columns, *columns)
        else:
            dout_rows = ctx.passed.take(dout)
            dout_columns = partial(turned, *dout_rows)
        dy = dgrad(dout_rows, down.codes(), offsets, dtype)
        dh_rows, dh_columns, y_columns, dgates = swiglu_backward(dy, Rows(*kept), gates, down.recipe)
        dw_down = wgrad(down, dout_columns, lambda: y_columns, offsets)
        dx = dgrad(dh_rows, up.codes(), offsets, dtype) if ctx.needs_input_grad[0] else None
        dw_up = wgrad(up, lambda: dh_columns, x_columns, offsets)
        return dx, dgates, dw_up, dw_down, None, None, None, None, None, None


def feed_forward8(
    x: Operand,
    up: Weight8,
    down: Weight8,
    gates: Tensor | None = None,
    offsets: Tensor | None = None,
    passed: Passed | None = None,
) -> Tensor:
    """x: [R, D]; up: [2I, D]; down: [D, I]; with offsets [G] int32 [G, 2I, D] and [G, D, I]; gates: [R] FP32.

    passed: where the output's gradient arrives in FP8; None: as autograd brings it. Returns [R, D].
    """
    keep = torch.is_grad_enabled()
    return _FeedForward8.apply(x.value, gates, up.weight, down.weight, x, up, down, offsets, passed, keep)


def swiglu(h: Tensor, gates: Tensor | None, recipe: Recipe, keep: bool) -> tuple[Rows, Rows | None]:
    """The output's rows, and h's to keep. h: [R, 2I]. One kernel where I is a multiple of 128, with the same bits."""
    output, kept = recipe[SWIGLU_OUTPUT], recipe[SWIGLU_INPUT]
    if h.shape[1] % (2 * BLOCK) == 0:
        codes, scales, *input = kernels.swiglu_fp8(h, gates, output.pow2, keep)
        return Rows(codes, scales), Rows(*input) if keep else None
    return rows_of(kernels.swiglu(h, gates), output), rows_of(h, kept) if keep else None


def swiglu_backward(
    dy: Tensor, h: Rows, gates: Tensor | None, recipe: Recipe
) -> tuple[Rows, Columns, Columns, Tensor | None]:
    """Rows and columns of dh [R, 2I], columns of the output [R, I] made again, and dgates [R]. dy: [R, I]."""
    gradient, output = recipe[GRADIENT], recipe[SWIGLU_OUTPUT]
    if gradient == output and h.codes.shape[1] % (2 * BLOCK) == 0:
        *codes, dgates = kernels.swiglu_fp8_backward(dy, *h, gates, gradient.pow2)
        return Rows(*codes[:2]), Columns(*codes[2:4]), Columns(*codes[4:]), dgates
    wide = kernels.dequantise_rows(*h, dy.dtype)  # exact: BF16 holds every code times a power of two
    dh, dgates, y = kernels.swiglu_backward(dy, wide, gates, want_output=True)
    assert y is not None
    return *both_of(dh, gradient), columns_of(y, output), dgates
