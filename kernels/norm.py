"""RMSNorm with residual addition: Triton kernels. One pass over memory each way; statistics in FP32.

Forward: a program takes whole rows, at least 2048 elements, so that 16 bytes are in flight per lane and load.
Backward: programs stride over the rows, the next of them on their way into shared memory, and keep their share of
dweight in registers; the shares go through a buffer of [programs, D] and one small sum, so the result does not depend
on the order in which programs finish.
Given up: rows wider than 65536 (a row lives in the registers of one program).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepv3.kernels.checks import ACTIVATIONS, FP32, cdiv, check, multiprocessors, next_power_of_2

WIDEST = 65536
FORWARD_ELEMENTS = 2048  # per program and tensor: 4 warps x 32 lanes x 16 elements
STAGES = 3  # rows of backward a program has in hand: one in work, the others on their way
SHARED = 200 << 10  # bytes of a multiprocessor for rows on their way


def rows_shape(cols: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program: 16 elements per lane and tensor, from 4 to 16 warps."""
    columns = next_power_of_2(cols)
    rows = max(1, FORWARD_ELEMENTS // columns)
    return rows, columns, min(16, max(4, rows * columns // 512))


@triton.jit
def summed_and_rstd(
    x_ptr,
    residual_ptr,
    summed_ptr,
    rstd_ptr,
    rows,
    cols,
    n_rows,
    n_cols,
    x_stride,
    residual_stride,
    eps,
    RESIDUAL: tl.constexpr,
):
    """The first half of every RMSNorm: stores x + residual and 1 / rms, returns both, the sum as rounded, in FP32."""
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    wide_rows = rows.to(tl.int64)[:, None]
    x = tl.load(x_ptr + wide_rows * x_stride + cols[None, :], mask=mask, other=0.0)
    if RESIDUAL:
        residual = tl.load(residual_ptr + wide_rows * residual_stride + cols[None, :], mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + wide_rows * n_cols + cols[None, :], x, mask=mask)
    x = x.to(tl.float32)  # of the rounded sum: backward sees the same numbers
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / n_cols + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)
    return x, rstd


@triton.jit
def _rmsnorm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    summed_ptr,
    rstd_ptr,
    n_rows,
    n_cols,
    x_stride,
    residual_stride,
    eps,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    x, rstd = summed_and_rstd(
        x_ptr,
        residual_ptr,
        summed_ptr,
        rstd_ptr,
        rows,
        cols,
        n_rows,
        n_cols,
        x_stride,
        residual_stride,
        eps,
        RESIDUAL,
    )
    weight = tl.load(weight_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    y = x * rstd[:, None] * weight[None, :]
    out = rows.to(tl.int64)[:, None] * n_cols + cols[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=(rows < n_rows)[:, None] & (cols < n_cols)[None, :])


@triton.jit
def _rmsnorm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dresidual_ptr,
    dx_ptr,
    partial_ptr,
    n_rows,
    n_cols,
    dy_stride,
    x_stride,
    dresidual_stride,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    cols = tl.arange(0, COLS)
    col_mask = cols < n_cols
    weight = tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        row_mask = rows < n_rows
        mask = row_mask[:, None] & col_mask[None, :]
        wide_rows = rows.to(tl.int64)[:, None]
        x = tl.load(x_ptr + wide_rows * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + wide_rows * dy_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)
        if RESIDUAL:
            along = tl.load(dresidual_ptr + wide_rows * dresidual_stride + cols[None, :], mask=mask, other=0.0)
        normed = x * rstd[:, None]
        dweight += dy * normed
        scaled = dy * weight[None, :]
        mean = tl.sum(scaled * normed, axis=1) / n_cols
        dx = (scaled - normed * mean[:, None]) * rstd[:, None]
        if RESIDUAL:
            dx += along.to(tl.float32)
        out = wide_rows * n_cols + cols[None, :]
        tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + tl.program_id(0) * n_cols + cols, tl.sum(dweight, axis=0), mask=col_mask)


def rmsnorm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.norm.rmsnorm`. Rows of x and residual may be strided; D up to 65536."""
    check_norm(x, weight)
    n_rows, n_cols = x.shape
    if residual is not None:
        check("residual", residual, (n_rows, n_cols), (x.dtype,), x.device, contiguous=False)
    y = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
    rstd = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    summed = x if residual is None else torch.empty_like(y)
    if x.numel():
        rows, cols, warps = rows_shape(n_cols)
        added = x if residual is None else residual  # not read without RESIDUAL
        _rmsnorm_kernel[(cdiv(n_rows, rows),)](
            x,
            added,
            weight,
            y,
            summed,
            rstd,
            n_rows,
            n_cols,
            x.stride(0),
            added.stride(0),
            eps,
            RESIDUAL=residual is not None,
            ROWS=rows,
            COLS=cols,
            num_warps=warps,
        )
    return y, rstd, summed


def rmsnorm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dresidual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `reference.norm.rmsnorm_backward`. dweight is reproducible on devices with as many multiprocessors."""
    check_norm(x, weight)
    n_rows, n_cols = x.shape
    check("dy", dy, (n_rows, n_cols), ACTIVATIONS, x.device, contiguous=False)
    check("rstd", rstd, (n_rows,), FP32, x.device)
    if dresidual is not None:
        check("dresidual", dresidual, (n_rows, n_cols), ACTIVATIONS, x.device, contiguous=False)
    dx = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return dx, torch.zeros(n_cols, dtype=torch.float32, device=x.device)
    rows, cols, warps = rows_shape(n_cols)
    # As many programs as fit (120 registers a lane), and as many rows on their way to each as its shared memory holds.
    programs = min(cdiv(n_rows, rows), max(1, 16 // warps) * multiprocessors(x.device))
    read = (x, dy) if dresidual is None else (x, dy, dresidual)
    bytes_ahead = rows * cols * sum(tensor.element_size() for tensor in read) * max(1, 16 // warps)
    stages = min(STAGES, 1 + SHARED // bytes_ahead)
    partial = torch.empty((programs, n_cols), dtype=torch.float32, device=x.device)
    along = x if dresidual is None else dresidual  # not read without RESIDUAL
    _rmsnorm_backward_kernel[(programs,)](
        dy,
        x,
        weight,
        rstd,
        along,
        dx,
        partial,
        n_rows,
        n_cols,
        dy.stride(0),
        x.stride(0),
        along.stride(0),
        RESIDUAL=dresidual is not None,
        ROWS=rows,
        COLS=cols,
        STAGES=stages,
        num_warps=warps,
    )
    return dx, partial.sum(0)


def check_norm(x: Tensor, weight: Tensor) -> None:
    check("x", x, (None, None), ACTIVATIONS, x.device, contiguous=False)
    check("weight", weight, (x.shape[1],), ACTIVATIONS, x.device)
    if x.shape[1] > WIDEST:
        raise ValueError(f"x has {x.shape[1]} columns, RMSNorm takes at most {WIDEST}")
