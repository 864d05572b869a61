"""RMSNorm with its result in FP8: Triton kernels; formulas in `reference.norm8`, method of the norm in `norm`.

- rmsnorm_fp8: whole rows in registers as in `norm`, seen as blocks of 128 for the scales. The BF16 result is written
  only on request.
- rmsnorm_fp8_columns: tiles of 128 rows x 64 columns of the norm made again from x and rstd, quantised by columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepv3.kernels.casts import encode
from deepv3.kernels.checks import FP32, cdiv, check, check_width
from deepv3.kernels.norm import check_norm, rows_shape, summed_and_rstd
from deepv3.kernels.quantise import empty_columns, empty_rows
from deepv3.kernels.reference.quantise import BLOCK
from deepv3.kernels.turn import column_words, four, numbers, store_columns, turn_values, turned_rows, two

COLUMNS, COLUMNS_WARPS, COLUMNS_REGISTERS = 64, 4, 96  # of a program that quantises by columns: five share a processor


@triton.jit
def _rmsnorm_fp8_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    codes_ptr,
    scales_ptr,
    y_ptr,
    summed_ptr,
    rstd_ptr,
    n_rows,
    n_cols,
    x_stride,
    residual_stride,
    scale_stride,
    eps,
    RESIDUAL: tl.constexpr,
    OUTPUT: tl.constexpr,
    POW2: tl.constexpr,
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
    y = (x * rstd[:, None] * weight[None, :]).to(y_ptr.dtype.element_ty)
    wide_rows = rows.to(tl.int64)
    if OUTPUT:
        mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        tl.store(y_ptr + wide_rows[:, None] * n_cols + cols[None, :], y, mask=mask)
    # Stored in another shape than x is loaded in: a lane's share of a load then follows x's format alone, as in
    # `norm`, and both kernels add the squares in one order, to the same bits.
    blocks, inner = tl.arange(0, COLS // 128)[None, :, None], tl.arange(0, 128)[None, None, :]
    codes, scale = encode(tl.reshape(y.to(tl.float32), (ROWS, COLS // 128, 128)), 2, POW2)
    mask = (rows < n_rows)[:, None, None] & (blocks * 128 + inner < n_cols)
    tl.store(codes_ptr + wide_rows[:, None, None] * n_cols + blocks * 128 + inner, codes, mask=mask)
    mask = (rows < n_rows)[:, None, None] & (blocks * 128 < n_cols)
    tl.store(scales_ptr + blocks * scale_stride + rows[:, None, None], scale, mask=mask)


@triton.jit
def _columns_kernel(
    x_ptr,
    weight_ptr,
    rstd_ptr,
    words_ptr,
    scales_ptr,
    n_rows,
    n_cols,
    x_stride,
    code_stride,
    POW2: tl.constexpr,
    COLS: tl.constexpr,
):
    tiles = tl.cdiv(n_cols, COLS)
    row_block = tl.program_id(0) // tiles
    rows = row_block * 128 + turned_rows()
    cols = tl.program_id(0) % tiles * COLS + tl.arange(0, COLS)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * x_stride + cols[None, :], mask=mask, other=0.0)
    # All loads before the turn: none is moved up past its barriers.
    rows = row_block * 128 + tl.arange(0, 128)
    rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
    weight = tl.load(weight_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)[:, None]
    into = column_words(words_ptr, row_block, cols, code_stride)
    low, high = turn_values(x, into, n_rows < 0)
    rstd0, rstd1, rstd2, rstd3 = four(rstd)
    # -0 added changes nothing, +0 beyond the last row mends the -0 of a negative weight. As integers: Triton takes the
    # literal -0.0 for 0.0.
    zero0, zero1, zero2, zero3 = four(tl.where(rows < n_rows, -(2**31), 0).to(tl.float32, bitcast=True))
    v0, v1 = numbers(low, x.dtype)
    v2, v3 = numbers(high, x.dtype)
    low = two(v0 * rstd0 * weight + zero0, v1 * rstd1 * weight + zero1, x.dtype)
    high = two(v2 * rstd2 * weight + zero2, v3 * rstd3 * weight + zero3, x.dtype)
    store_columns(into, scales_ptr, low, high, row_block, cols, n_cols, x.dtype, POW2)


def rmsnorm_fp8(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, pow2: bool = False, output: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """See `reference.norm8.rmsnorm_fp8`. Rows of x and residual may be strided; D a multiple of 16, up to 65536."""
    check_norm(x, weight)
    check_width("x", x.shape[1])
    n_rows, n_cols = x.shape
    if residual is not None:
        check("residual", residual, (n_rows, n_cols), (x.dtype,), x.device, contiguous=False)
    codes, scales = empty_rows(n_rows, n_cols, x.device)
    y = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device) if output else None
    rstd = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    summed = x if residual is None else torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
    if x.numel():
        rows, cols, warps = rows_shape(max(n_cols, BLOCK))
        added = x if residual is None else residual  # not read without RESIDUAL, nor y written without OUTPUT
        _rmsnorm_fp8_kernel[(cdiv(n_rows, rows),)](
            x,
            added,
            weight,
            codes,
            scales,
            x if y is None else y,
            summed,
            rstd,
            n_rows,
            n_cols,
            x.stride(0),
            added.stride(0),
            scales.stride(1),
            eps,
            RESIDUAL=residual is not None,
            OUTPUT=output,
            POW2=pow2,
            ROWS=rows,
            COLS=cols,
            num_warps=warps,
        )
    return codes, scales, rstd, summed, y


def rmsnorm_fp8_columns(x: Tensor, weight: Tensor, rstd: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """See `reference.norm8.rmsnorm_fp8_columns`. Rows of x may be strided."""
    check_norm(x, weight)
    check_width("x", x.shape[1])
    n_rows, n_cols = x.shape
    check("rstd", rstd, (n_rows,), FP32, x.device)
    codes, scales = empty_columns(n_rows, n_cols, x.device)
    if x.numel():
        _columns_kernel[(cdiv(n_rows, BLOCK) * cdiv(n_cols, COLUMNS),)](
            x,
            weight,
            rstd,
            codes.view(torch.int32),
            scales,
            n_rows,
            n_cols,
            x.stride(0),
            codes.shape[1],
            POW2=pow2,
            COLS=COLUMNS,
            num_warps=COLUMNS_WARPS,
            maxnreg=COLUMNS_REGISTERS,
        )
    return codes, scales
