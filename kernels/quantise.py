"""Quantisers to E4M3 codes and block scales: Triton kernels, one read of the input; formulas in `reference.quantise`.

- rows: tiles of 32 x 128; a program's 32 scales of one column block lie together in memory.
- columns, both: tiles of 128 rows x 64 or 128 columns, turned inside the program (`turn`), so that both sides of memory
  are walked along rows.
- blocks: tiles of 128 x 128, one scale, written as it lies and turned.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepv3.kernels.casts import (
    E4M3_MAX,
    from_e4m3,
    magnitude,
    scale_of,
    store_rows,
    to_e4m3,
)
from deepv3.kernels.checks import ACTIVATIONS, cdiv, check, check_rows8, check_width
from deepv3.kernels.reference.quantise import BLOCK, E4M3, block_scales, round_up, row_scales
from deepv3.kernels.turn import column_words, store_columns, turn_numbers, turn_values, turned_rows

ROWS = 32  # of a program that quantises by rows
ROWS_WARPS = 8
TWO_PROGRAMS = 128  # registers a lane, with which two programs of 8 warps share a processor: one loads, one computes
COLUMNS, COLUMNS_WARPS, COLUMNS_REGISTERS = 64, 4, 80  # of a program that quantises by columns: six share a processor
BOTH_WARPS, BOTH_REGISTERS = 8, TWO_PROGRAMS


@triton.jit
def _rows_kernel(
    x_ptr, codes_ptr, scales_ptr, n_rows, n_cols, x_stride, scale_stride, POW2: tl.constexpr, ROWS: tl.constexpr
):
    blocks = tl.cdiv(n_cols, 128)
    block = tl.program_id(0) % blocks
    rows = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    cols = block * 128 + tl.arange(0, 128)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    store_rows(codes_ptr, scales_ptr, x, rows, block, n_rows, n_cols, scale_stride, POW2)


@triton.jit
def _columns_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    codes_t_ptr,
    scales_t_ptr,
    n_rows,
    n_cols,
    x_stride,
    scale_stride,
    code_stride,
    BOTH: tl.constexpr,
    POW2: tl.constexpr,
    COLS: tl.constexpr,
):
    tiles = tl.cdiv(n_cols, COLS)
    row_block, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    rows = row_block * 128 + turned_rows()
    cols = tile * COLS + tl.arange(0, COLS)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * x_stride + cols[None, :], mask=mask, other=0.0)
    if BOTH:  # COLS is 128
        store_rows(codes_ptr, scales_ptr, x.to(tl.float32), rows, tile, n_rows, n_cols, scale_stride, POW2)
    into = column_words(codes_t_ptr, row_block, cols, code_stride)
    low, high = turn_values(x, into, n_rows < 0)
    store_columns(into, scales_t_ptr, low, high, row_block, cols, n_cols, x.dtype, POW2)


@triton.jit
def _blocks_kernel(
    w_ptr,
    codes_ptr,
    scales_ptr,
    words_t_ptr,
    scales_t_ptr,
    n_out,
    n_in,
    scale_stride,
    scale_t_stride,
    POW2: tl.constexpr,
):
    tiles_n, tiles_k = tl.cdiv(n_out, 128), tl.cdiv(n_in, 128)
    group = (tl.program_id(0) // (tiles_n * tiles_k)).to(tl.int64)
    tile = tl.program_id(0) % (tiles_n * tiles_k)
    tile_n, tile_k = tile // tiles_k, tile % tiles_k
    rows, cols = tile_n * 128 + turned_rows(), tile_k * 128 + tl.arange(0, 128)
    mask = (rows < n_out)[:, None] & (cols < n_in)[None, :]
    matrix = group * n_out * n_in
    address = matrix + rows.to(tl.int64)[:, None] * n_in + cols[None, :]
    w = tl.load(w_ptr + address, mask=mask, other=0.0).to(tl.float32)
    amax = tl.max(tl.max(magnitude(w), axis=1, keep_dims=True), axis=0, keep_dims=True)
    scale, inverse = scale_of(amax, POW2, E4M3_MAX)
    codes = to_e4m3(w * inverse)
    words = tile_n * 32 + tl.arange(0, 32)
    turned = matrix // 4 + cols.to(tl.int64)[:, None] * (n_out // 4) + words[None, :]
    tl.store(
        words_t_ptr + turned, turn_numbers(w * inverse), mask=(cols < n_in)[:, None] & (words < n_out // 4)[None, :]
    )
    tl.store(codes_ptr + address, codes, mask=mask)  # before the turn, Triton 3.7's code crashes ptxas 12.8
    value = tl.max(tl.max(scale, axis=1), axis=0)
    tl.store(scales_ptr + (group * tiles_n + tile_n) * scale_stride + tile_k, value)
    tl.store(scales_t_ptr + (group * tiles_k + tile_k) * scale_t_stride + tile_n, value)


@triton.jit
def _dequantise_kernel(codes_ptr, scales_ptr, x_ptr, n_rows, n_cols, scale_stride, ROWS: tl.constexpr):
    blocks = tl.cdiv(n_cols, 128)
    block = tl.program_id(0) % blocks
    rows = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    cols = block * 128 + tl.arange(0, 128)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    address = rows.to(tl.int64)[:, None] * n_cols + cols[None, :]
    scale = tl.load(scales_ptr + block * scale_stride + rows, mask=rows < n_rows, other=0.0)
    value = from_e4m3(tl.load(codes_ptr + address, mask=mask, other=0.0)) * scale[:, None]
    tl.store(x_ptr + address, value.to(x_ptr.dtype.element_ty), mask=mask)


def _check_input(x: Tensor) -> tuple[int, int]:
    check("x", x, (None, None), ACTIVATIONS, x.device, contiguous=False)
    check_width("x", x.shape[1])
    return x.shape[0], x.shape[1]


def empty_rows(m: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Uninitialised codes [m, k] and their scales."""
    return torch.empty(m, k, dtype=E4M3, device=device), row_scales(m, k, device)


def empty_columns(m: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Uninitialised transposed codes [k, m rounded up to 128] and their scales."""
    height = round_up(m, BLOCK)
    codes = torch.empty(k, height, dtype=E4M3, device=device)
    return codes, torch.empty(height // BLOCK, k, dtype=torch.float32, device=device)


def quantise_rows(x: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """See `reference.quantise.quantise_rows`. Rows of x may be strided."""
    m, k = _check_input(x)
    codes, scales = empty_rows(m, k, x.device)
    if x.numel():
        _rows_kernel[(cdiv(m, ROWS) * cdiv(k, BLOCK),)](
            x, codes, scales, m, k, x.stride(0), scales.stride(1), POW2=pow2, ROWS=ROWS, num_warps=ROWS_WARPS
        )
    return codes, scales


def _launch_columns(x: Tensor, rows: tuple[Tensor, Tensor] | None, columns: tuple[Tensor, Tensor], pow2: bool) -> None:
    m, k = x.shape
    codes_t, scales_t = columns
    codes, scales = rows or (codes_t, scales_t)  # not written without BOTH
    cols, warps, registers = COLUMNS, COLUMNS_WARPS, COLUMNS_REGISTERS
    if rows:
        cols, warps, registers = BLOCK, BOTH_WARPS, BOTH_REGISTERS
    if x.numel():
        _columns_kernel[(cdiv(m, BLOCK) * cdiv(k, cols),)](
            x,
            codes,
            scales,
            codes_t.view(torch.int32),
            scales_t,
            m,
            k,
            x.stride(0),
            scales.stride(1),
            codes_t.shape[1],
            BOTH=rows is not None,
            POW2=pow2,
            COLS=cols,
            num_warps=warps,
            maxnreg=registers,
        )


def quantise_columns(x: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """See `reference.quantise.quantise_columns`. Rows of x may be strided."""
    columns = empty_columns(*_check_input(x), x.device)
    _launch_columns(x, None, columns, pow2)
    return columns


def quantise_both(x: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.quantise.quantise_both`. Rows of x may be strided."""
    m, k = _check_input(x)
    rows, columns = empty_rows(m, k, x.device), empty_columns(m, k, x.device)
    _launch_columns(x, rows, columns, pow2)
    return *rows, *columns


def quantise_blocks(w: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.quantise.quantise_blocks`."""
    check("w", w, (None,) * (3 if w.dim() == 3 else 2), ACTIVATIONS, w.device)
    *groups, n, k = w.shape
    check_width("w", k)
    check_width("w, transposed,", n)
    tiles = cdiv(n, BLOCK), cdiv(k, BLOCK)
    codes, codes_t = torch.empty_like(w, dtype=E4M3), torch.empty(*groups, k, n, dtype=E4M3, device=w.device)
    scales, scales_t = (block_scales(*groups, *sizes, device=w.device) for sizes in (tiles, tiles[::-1]))
    if w.numel():
        _blocks_kernel[(tiles[0] * tiles[1] * (groups[0] if groups else 1),)](
            w,
            codes,
            scales,
            codes_t.view(torch.int32),
            scales_t,
            n,
            k,
            scales.stride(-2),
            scales_t.stride(-2),
            POW2=pow2,
            num_warps=8,
            maxnreg=TWO_PROGRAMS,
        )
    return codes, scales, codes_t, scales_t


def dequantise_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """See `reference.quantise.dequantise_rows`."""
    m, k = check_rows8("codes", codes, scales, codes.device)
    x = torch.empty(m, k, dtype=dtype, device=codes.device)
    if x.numel():
        _dequantise_kernel[(cdiv(m, ROWS) * cdiv(k, BLOCK),)](codes, scales, x, m, k, scales.stride(1), ROWS=ROWS)
    return x
