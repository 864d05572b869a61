"""FP8 rows gathered, and turned from row blocks into column blocks: Triton kernels; formulas in `reference.gather8`.

- permute_fp8: tiles of 16 rows x 1024 codes, and their 8 column blocks of scales. A scale is gathered alone (4 of 32
  bytes), from an array that stays in L2.
- requantise: tiles of 128 rows x 128 codes, one scale per row, turned as codes; gathered rows are read in pieces of 128
  bytes.
Both walk down strips of columns (`routing.strip_tile`): a token's copies are read while its piece is in L2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepv3.kernels.casts import PAD_SCALE
from deepv3.kernels.checks import INT32, cdiv, check, check_rows8
from deepv3.kernels.quantise import empty_columns, empty_rows
from deepv3.kernels.reference.quantise import BLOCK
from deepv3.kernels.routing import strip_tile
from deepv3.kernels.turn import column_words, four, from_word, store_columns, turn_codes, turned_rows

ROWS, COLS, STRIP = 16, 1024, 1  # of permute_fp8: a tile, and the column tiles that are gathered side by side
WARPS, BLOCKS = 4, 8  # of requantise: a program's warps, and the column blocks that are read side by side
GATHERED_WARPS, GATHERED_BLOCKS = 8, 1  # the same where rows are gathered


@triton.jit
def _permute_kernel(
    codes_ptr,
    scales_ptr,
    token_of_slot_ptr,
    out_ptr,
    out_scales_ptr,
    n_rows,
    n_cols,
    scale_stride,
    out_stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STRIP: tl.constexpr,
):
    row_tile, tile = strip_tile(tl.cdiv(n_rows, ROWS), tl.cdiv(n_cols, COLS), STRIP)
    slots = row_tile * ROWS + tl.arange(0, ROWS)
    cols = tile * COLS + tl.arange(0, COLS)
    inside = slots < n_rows
    tokens = tl.load(token_of_slot_ptr + slots, mask=inside, other=-1).to(tl.int64)
    real = tokens >= 0
    taken = real[:, None] & (cols < n_cols)[None, :]
    codes = tl.load(codes_ptr + tokens[:, None] * n_cols + cols[None, :], mask=taken, other=0)
    out = slots.to(tl.int64)[:, None] * n_cols + cols[None, :]
    tl.store(out_ptr + out, codes, mask=inside[:, None] & (cols < n_cols)[None, :])
    blocks = tile * (COLS // 128) + tl.arange(0, COLS // 128)
    wanted = (blocks * 128 < n_cols)[:, None]
    scales = tl.load(
        scales_ptr + blocks[:, None] * scale_stride + tokens[None, :], mask=wanted & real[None, :], other=PAD_SCALE
    )
    tl.store(out_scales_ptr + blocks[:, None] * out_stride + slots[None, :], scales, mask=wanted & inside[None, :])


@triton.jit
def _requantise_kernel(
    codes_ptr,
    scales_ptr,
    token_of_slot_ptr,
    out_ptr,
    out_scales_ptr,
    n_rows,
    n_cols,
    scale_stride,
    code_stride,
    GATHER: tl.constexpr,
    POW2: tl.constexpr,
    STRIP: tl.constexpr,
):
    row_block, block = strip_tile(tl.cdiv(n_rows, 128), tl.cdiv(n_cols, 128), STRIP)
    rows, inside = _source(token_of_slot_ptr, row_block * 128 + turned_rows(), n_rows, GATHER)
    cols = block * 128 + tl.arange(0, 128)
    mask = inside[:, None] & (cols < n_cols)[None, :]
    codes = tl.load(codes_ptr + rows[:, None] * n_cols + cols[None, :], mask=mask, other=0.0)
    rows, inside = _source(token_of_slot_ptr, row_block * 128 + tl.arange(0, 128), n_rows, GATHER)
    scale0, scale1, scale2, scale3 = four(tl.load(scales_ptr + block * scale_stride + rows, mask=inside, other=0.0))
    into = column_words(out_ptr, row_block, cols, code_stride)
    v0, v1, v2, v3 = from_word(turn_codes(codes, into, n_rows < 0))
    low, high = (v0 * scale0, v1 * scale1), (v2 * scale2, v3 * scale3)
    store_columns(into, out_scales_ptr, low, high, row_block, cols, n_cols, tl.float32, POW2)


@triton.jit
def _source(token_of_slot_ptr, slots, n_rows, GATHER: tl.constexpr):
    """(rows to read for these slots, whether there are any)."""
    if GATHER:
        tokens = tl.load(token_of_slot_ptr + slots, mask=slots < n_rows, other=-1).to(tl.int64)
        return tokens, tokens >= 0
    else:
        return slots.to(tl.int64), slots < n_rows


def permute_fp8(codes: Tensor, scales: Tensor, token_of_slot: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.gather8.permute_fp8`."""
    _, k = check_rows8("codes", codes, scales, codes.device)
    check("token_of_slot", token_of_slot, (None,), INT32, codes.device)
    rows = token_of_slot.shape[0]
    out, out_scales = empty_rows(rows, k, codes.device)
    if out.numel():
        _permute_kernel[(cdiv(rows, ROWS) * cdiv(k, COLS),)](
            codes.view(torch.int8),
            scales,
            token_of_slot,
            out.view(torch.int8),
            out_scales,
            rows,
            k,
            scales.stride(1),
            out_scales.stride(1),
            ROWS=ROWS,
            COLS=COLS,
            STRIP=STRIP,
        )
    return out, out_scales


def requantise(
    codes: Tensor, scales: Tensor, token_of_slot: Tensor | None = None, pow2: bool = True
) -> tuple[Tensor, Tensor]:
    """See `reference.gather8.requantise`."""
    rows, k = check_rows8("codes", codes, scales, codes.device)
    if token_of_slot is not None:
        check("token_of_slot", token_of_slot, (None,), INT32, codes.device)
        rows = token_of_slot.shape[0]
    out, out_scales = empty_columns(rows, k, codes.device)
    blocks, warps = (BLOCKS, WARPS) if token_of_slot is None else (GATHERED_BLOCKS, GATHERED_WARPS)
    if out.numel():
        _requantise_kernel[(cdiv(rows, BLOCK) * cdiv(k, BLOCK),)](
            codes,
            scales,
            scales if token_of_slot is None else token_of_slot,  # not read without GATHER
            out.view(torch.int32),
            out_scales,
            rows,
            k,
            scales.stride(1),
            out.shape[1],
            GATHER=token_of_slot is not None,
            POW2=pow2,
            STRIP=blocks,
            num_warps=warps,
        )
    return out, out_scales
