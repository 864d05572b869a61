"""Linear maps in FP8: one autograd function around three FP8 GEMMs (V3 3.3.1, Figure 6), accumulated in FP32.

    Fprop  y [R, N]   = x [R, K] @ w [N, K]^T         x by rows, w in blocks
    Dgrad  dx [R, K]  = dy [R, N] @ w [N, K]          dy by rows, w's transposed blocks
    Wgrad  dw [N, K] += dy [R, N]^T @ x [R, K]        both by columns, in FP32, now or queued

With `offsets` (cumulative row ends per group, multiples of 128) w is [G, N, K]. Backward keeps x's column codes, or
what makes them; never x. Results have x's format, BF16 in training.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import deepv3.kernels as kernels
from deepv3.precision.formats import Blocks, Columns, Format, Rows, both_of, columns_of, rows_of
from deepv3.precision.recipe import GRADIENT, INPUT, Recipe
from deepv3.precision.saved import Operand, Remade, Stored
from deepv3.precision.weights8 import WeightCodes
from deepv3.precision.wgrad import WeightGradQueue, deliver


class Weight8(NamedTuple):
    """A weight whose products are FP8: its codes, the run's recipe, and where its gradient waits."""

    weight: Tensor
    codes: WeightCodes
    recipe: Recipe
    queue: WeightGradQueue | None


def fprop(x: Rows, w: Blocks, offsets: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x @ w^T in `dtype`."""
    return _multiply(x, w.codes, w.scales, offsets, dtype)


def dgrad(dy: Rows, w: Blocks, offsets: Tensor | None, dtype: torch.dtype) -> Tensor:
    """dy @ w in `dtype`."""
    return _multiply(dy, w.codes_t, w.scales_t, offsets, dtype)


def _multiply(rows: Rows, w: Tensor, scales: Tensor, offsets: Tensor | None, dtype: torch.dtype) -> Tensor:
    if offsets is None:
        return kernels.fp8_mm(*rows, w, scales, dtype)
    return kernels.grouped_fp8_mm(*rows, w, scales, offsets, dtype)


def wgrad(w: Weight8, dy: Callable[[], Columns], x: Callable[[], Columns], offsets: Tensor | None) -> Tensor | None:
    """dw = dy^T @ x, now or when the queue is flushed; both are fetched only then."""

    def write(buffer: Tensor, accumulate: bool) -> None:
        if offsets is None:
            kernels.fp8_wgrad_(buffer, *dy(), *x(), accumulate)
        else:
            kernels.grouped_fp8_wgrad_(buffer, *dy(), *x(), offsets, accumulate)

    return deliver(w.weight, write, w.queue)


# -- an operand's way through an autograd function -----------------------------------------------------------------


def prepare(x: Operand, format: Format, keep: bool) -> tuple[Rows, Remade | Stored | None]:
    """Row codes for the product, and where backward will find the columns (None where nothing is kept)."""
    if keep and x.columns is None and x.again is None:
        rows, columns = both_of(x.value, format)
        return x.rows or rows, Stored(Columns, tuple(columns))
    rows = x.rows or rows_of(x.value, format)
    if not keep:
        return rows, None
    return rows, x.columns or Remade(lambda value: columns_of(value, format), x.source())


def remember(ctx: Any, source: Remade | Stored | None, *tensors: Tensor | None) -> None:
    """Save `tensors` and what `source` needs. Stored tensors are saved as autograd's, so that activation checkpointing
    can drop them."""
    ctx.again = source.reserve() if isinstance(source, Remade) else None
    ctx.make, stored = (source.make, source.tensors) if isinstance(source, Stored) else (None, ())
    ctx.save_for_backward(*tensors, *stored)
    ctx.own = len(tensors)


def recall(ctx: Any) -> tuple[tuple[Tensor, ...], Callable[[], Columns]]:
    """The tensors of `remember`, and what fetches the columns."""
    saved, again = ctx.saved_tensors, ctx.again
    ctx.again = None
    return saved[: ctx.own], again if again is not None else partial(ctx.make, *saved[ctx.own :])


class _Linear8(torch.autograd.Function):
    """x is autograd's handle of the operand and is not read; the weight is an argument for its gradient's sake."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, operand: Operand, w: Weight8, offsets: Tensor | None, keep: bool
    ) -> Tensor:
        rows, source = prepare(operand, w.recipe[INPUT], keep)
        ctx.w, ctx.dtype = w, x.dtype
        remember(ctx, source, offsets)
        return fprop(rows, w.codes(), offsets, x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (offsets,), columns = recall(ctx)
        w, dx = ctx.w, None
        rows, dy_columns = both_of(dy.to(ctx.dtype).contiguous(), w.recipe[GRADIENT])
        if ctx.needs_input_grad[0]:
            dx = dgrad(rows, w.codes(), offsets, ctx.dtype)
        return dx, wgrad(w, lambda: dy_columns, columns, offsets), None, None, None, None


def linear8(x: Operand, w: Weight8, offsets: Tensor | None = None) -> Tensor:
    """x @ w^T, differentiable. x: [R, K]; w: [N, K], or [G, N, K] with offsets [G] int32. Returns [R, N]."""
    return _Linear8.apply(x.value, w.weight, x, w, offsets, torch.is_grad_enabled())
