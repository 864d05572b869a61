"""SwiGLU with FP8 at its ends: Triton kernels; formulas in `reference.swiglu8`, gradients in `activation`.

- forward: tiles of 16 rows x 128 outputs, that is a block of the output, of the gates and of the ups: three quantised
  blocks from one read.
- backward, rows: programs of 16 rows walk along the outputs, 128 at a time; dh in rows, and the gate's gradient in
  registers until the row's end.
- backward, columns: tiles of 128 rows x 32 outputs; dh and the output once more, in columns. The inputs are turned, two
  tiles of codes and one of BF16, and the results made where they are written.
Given up: backward reads its inputs twice (4 bytes beside 9 a value). One kernel for rows and columns needs three tiles
of 128 x 128 in registers at once, and spills.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepv3.kernels.activation import check_gated, swiglu_gradient, swiglu_output
from deepv3.kernels.casts import from_e4m3, store_rows
from deepv3.kernels.checks import ACTIVATIONS, E4M3, FP32, cdiv, check, check_rows8
from deepv3.kernels.quantise import empty_columns, empty_rows
from deepv3.kernels.reference.quantise import BLOCK
from deepv3.kernels.turn import (
    column_words,
    four,
    from_word,
    numbers,
    rounded,
    store_columns,
    turn_codes,
    turn_values,
    turned_rows,
    two,
)

FORWARD_ROWS, BACKWARD_ROWS = 16, 8
ROWS_WARPS = 2
COLUMNS, COLUMNS_WARPS, COLUMNS_REGISTERS = 32, 4, 128  # of a program by columns: four share a processor
STAGES = 5  # of the loads of a program that walks along the outputs


@triton.jit
def _forward_kernel(
    h_ptr,
    weight_ptr,
    codes_ptr,
    scales_ptr,
    kept_ptr,
    kept_scales_ptr,
    n_rows,
    n_cols,
    scale_stride,
    WEIGHT: tl.constexpr,
    CACHE: tl.constexpr,
    POW2: tl.constexpr,
    ROWS: tl.constexpr,
):
    blocks = n_cols // 128
    block = tl.program_id(0) % blocks
    rows = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    inside = (rows < n_rows)[:, None]
    address = rows.to(tl.int64)[:, None] * (2 * n_cols) + block * 128 + tl.arange(0, 128)[None, :]
    gate = tl.load(h_ptr + address, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + address + n_cols, mask=inside, other=0.0).to(tl.float32)
    y = swiglu_output(gate, up)
    if WEIGHT:
        y *= tl.load(weight_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
    y = y.to(h_ptr.dtype.element_ty).to(tl.float32)
    store_rows(codes_ptr, scales_ptr, y, rows, block, n_rows, n_cols, scale_stride, POW2)
    if CACHE:
        store_rows(kept_ptr, kept_scales_ptr, gate, rows, block, n_rows, 2 * n_cols, scale_stride, True)
        store_rows(kept_ptr, kept_scales_ptr, up, rows, block + blocks, n_rows, 2 * n_cols, scale_stride, True)


@triton.jit
def _kept(codes_ptr, scales_ptr, rows, first, WIDTH: tl.constexpr, n_rows, n_cols, scale_stride):
    """FP32 tile of row-quantised values: WIDTH columns from `first` on, within one block of 128 of the n_cols."""
    scale = tl.load(scales_ptr + first // 128 * scale_stride + rows, mask=rows < n_rows, other=0.0)
    address = rows.to(tl.int64)[:, None] * n_cols + (first + tl.arange(0, WIDTH))[None, :]
    return from_e4m3(tl.load(codes_ptr + address, mask=(rows < n_rows)[:, None], other=0.0)) * scale[:, None]


@triton.jit
def _backward_rows_kernel(
    dy_ptr,
    h_ptr,
    h_scales_ptr,
    weight_ptr,
    codes_ptr,
    scales_ptr,
    dweight_ptr,
    n_rows,
    n_cols,
    scale_stride,
    WEIGHT: tl.constexpr,
    POW2: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n_rows
    weight = tl.full((ROWS, 1), 1.0, dtype=tl.float32)
    if WEIGHT:
        weight = tl.load(weight_ptr + rows, mask=inside, other=0.0)[:, None]
    total = tl.zeros((ROWS, 128), dtype=tl.float32)
    blocks = n_cols // 128
    for block in tl.range(0, blocks, num_stages=STAGES):
        first = block * 128
        gate = _kept(h_ptr, h_scales_ptr, rows, first, 128, n_rows, 2 * n_cols, scale_stride)
        up = _kept(h_ptr, h_scales_ptr, rows, first + n_cols, 128, n_rows, 2 * n_cols, scale_stride)
        address = rows.to(tl.int64)[:, None] * n_cols + (first + tl.arange(0, 128))[None, :]
        dy = tl.load(dy_ptr + address, mask=inside[:, None], other=0.0).to(tl.float32)
        dgate, dup, act = swiglu_gradient(dy, gate, up, weight)
        dgate, dup = rounded(dgate, dup, dy_ptr.dtype.element_ty)
        store_rows(codes_ptr, scales_ptr, dgate, rows, block, n_rows, 2 * n_cols, scale_stride, POW2)
        store_rows(codes_ptr, scales_ptr, dup, rows, block + blocks, n_rows, 2 * n_cols, scale_stride, POW2)
        if WEIGHT:
            total += dy * act
    if WEIGHT:
        tl.store(dweight_ptr + rows, tl.sum(total, axis=1), mask=inside)


@triton.jit
def _backward_columns_kernel(
    dy_ptr,
    h_ptr,
    h_scales_ptr,
    weight_ptr,
    dh_ptr,
    dh_scales_ptr,
    y_ptr,
    y_scales_ptr,
    n_rows,
    n_cols,
    scale_stride,
    code_stride,
    WEIGHT: tl.constexpr,
    POW2: tl.constexpr,
    COLS: tl.constexpr,
):
    tiles = n_cols // COLS
    row_block, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first = tile * COLS
    cols = first + tl.arange(0, COLS)
    h_cols, never = 2 * n_cols, n_rows < 0
    into_gate = column_words(dh_ptr, row_block, cols, code_stride)
    into_up = column_words(dh_ptr, row_block, cols + n_cols, code_stride)
    into_y = column_words(y_ptr, row_block, cols, code_stride)

    # Beyond the last row everything read is +0, and so is everything made of it.
    rows = row_block * 128 + turned_rows()
    inside = (rows < n_rows)[:, None]
    address = rows.to(tl.int64)[:, None] * h_cols + tl.max_contiguous(cols, 8)[None, :]
    gates = tl.load(h_ptr + address, mask=inside, other=0.0)
    ups = tl.load(h_ptr + address + n_cols, mask=inside, other=0.0)
    dy = tl.load(dy_ptr + rows.to(tl.int64)[:, None] * n_cols + cols[None, :], mask=inside, other=0.0)
    rows = row_block * 128 + tl.arange(0, 128)
    scale_ptrs = h_scales_ptr + first // 128 * scale_stride + rows
    gate_scale = tl.load(scale_ptrs, mask=rows < n_rows, other=0.0)
    up_scale = tl.load(scale_ptrs + n_cols // 128 * scale_stride, mask=rows < n_rows, other=0.0)
    weight = tl.full((128,), 1.0, dtype=tl.float32)
    if WEIGHT:
        weight = tl.load(weight_ptr + rows, mask=rows < n_rows, other=0.0)
    # All loads before the first turn: none is moved up past its barriers.
    gates, ups = turn_codes(gates, into_gate, never), turn_codes(ups, into_up, never)
    dy_low, dy_high = turn_values(dy, into_y, never)
    gate_scale0, gate_scale1, gate_scale2, gate_scale3 = four(gate_scale)
    up_scale0, up_scale1, up_scale2, up_scale3 = four(up_scale)
    weight0, weight1, weight2, weight3 = four(weight)
    gate0, gate1, gate2, gate3 = from_word(gates)
    up0, up1, up2, up3 = from_word(ups)
    dtype: tl.constexpr = dy.dtype
    dy0, dy1 = numbers(dy_low, dtype)
    gate0, up0, y0 = swiglu_gradient(dy0, gate0 * gate_scale0, up0 * up_scale0, weight0)
    gate1, up1, y1 = swiglu_gradient(dy1, gate1 * gate_scale1, up1 * up_scale1, weight1)
    y_low, gate_low, up_low = two(y0 * weight0, y1 * weight1, dtype), two(gate0, gate1, dtype), two(up0, up1, dtype)
    dy2, dy3 = numbers(dy_high, dtype)
    gate2, up2, y2 = swiglu_gradient(dy2, gate2 * gate_scale2, up2 * up_scale2, weight2)
    gate3, up3, y3 = swiglu_gradient(dy3, gate3 * gate_scale3, up3 * up_scale3, weight3)
    y_high, gate_high, up_high = (
        two(y2 * weight2, y3 * weight3, dtype),
        two(gate2, gate3, dtype),
        two(up2, up3, dtype),
    )
    store_columns(into_y, y_scales_ptr, y_low, y_high, row_block, cols, n_cols, dtype, POW2)
    store_columns(into_gate, dh_scales_ptr, gate_low, gate_high, row_block, cols, h_cols, dtype, POW2)
    store_columns(into_up, dh_scales_ptr, up_low, up_high, row_block, cols + n_cols, h_cols, dtype, POW2)


def swiglu_fp8(
    h: Tensor, weight: Tensor | None = None, pow2: bool = False, cache: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See `reference.swiglu8.swiglu_fp8`."""
    n_rows, n_cols = check_gated(h, weight)
    _check_half(n_cols)
    codes, scales = empty_rows(n_rows, n_cols, h.device)
    kept, kept_scales = empty_rows(n_rows, 2 * n_cols, h.device) if cache else (None, None)
    if codes.numel():
        _forward_kernel[(cdiv(n_rows, FORWARD_ROWS) * (n_cols // BLOCK),)](
            h,
            h if weight is None else weight,
            codes,
            scales,
            codes if kept is None else kept,
            scales if kept_scales is None else kept_scales,
            n_rows,
            n_cols,
            scales.stride(1),
            WEIGHT=weight is not None,
            CACHE=cache,
            POW2=pow2,
            ROWS=FORWARD_ROWS,
        )
    return codes, scales, kept, kept_scales


def swiglu_fp8_backward(
    dy: Tensor, h_codes: Tensor, h_scales: Tensor, weight: Tensor | None = None, pow2: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """See `reference.swiglu8.swiglu_fp8_backward`."""
    check("dy", dy, (None, None), ACTIVATIONS, dy.device)
    n_rows, n_cols = dy.shape
    _check_half(n_cols)
    check("h_codes", h_codes, (n_rows, 2 * n_cols), E4M3, dy.device)
    check_rows8("h_codes", h_codes, h_scales, dy.device)
    if weight is not None:
        check("weight", weight, (n_rows,), FP32, dy.device)
    rows = empty_rows(n_rows, 2 * n_cols, dy.device)
    columns = empty_columns(n_rows, 2 * n_cols, dy.device)
    y = empty_columns(n_rows, n_cols, dy.device)
    dweight = None if weight is None else torch.zeros_like(weight)
    if dy.numel():
        given = dy, h_codes, h_scales, dy if weight is None else weight
        sizes = n_rows, n_cols, h_scales.stride(1)
        weighted = weight is not None
        _backward_rows_kernel[(cdiv(n_rows, BACKWARD_ROWS),)](
            *given,
            *rows,
            given[3] if dweight is None else dweight,
            *sizes,
            WEIGHT=weighted,
            POW2=pow2,
            ROWS=BACKWARD_ROWS,
            STAGES=STAGES,
            num_warps=ROWS_WARPS,
        )
        _backward_columns_kernel[(cdiv(n_rows, BLOCK) * (n_cols // COLUMNS),)](
            *given,
            columns[0].view(torch.int32),
            columns[1],
            y[0].view(torch.int32),
            y[1],
            *sizes,
            y[0].shape[1],
            WEIGHT=weighted,
            POW2=pow2,
            COLS=COLUMNS,
            num_warps=COLUMNS_WARPS,
            maxnreg=COLUMNS_REGISTERS,
        )
    return *rows, *columns, *y, dweight


def _check_half(n_cols: int) -> None:
    if n_cols % BLOCK:
        raise ValueError(
            f"SwiGLU of width {n_cols}, FP8 needs a multiple of {BLOCK}: otherwise gates and ups share a scale; "
            "use swiglu and quantise_rows"
        )
