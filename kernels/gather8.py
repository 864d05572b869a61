"""FP8 rows gathered, and turned from row blocks into column blocks: Triton kernels; formulas in `reference.gather8`.

- permute_fp8: tiles of 16 rows x 1024 codes, and their 8 column blocks of scales. A scale is gathered alone (4 of 32
  bytes), from an array that stays in L2.
- requantise: tiles of 128 rows x 128 codes, one scale per row; gathered rows are read in pieces of 128 bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepv3.kernels.casts import PAD_SCALE, from_e4m3, store_columns, turned_rows
from deepv3.kernels.checks import INT32, check, check_rows8
from deepv3.kernels.quantise import empty_columns, empty_rows
from deepv3.kernels.reference.quantise import BLOCK

ROWS, COLS = 16, 1024


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
):
    tiles = tl.cdiv(n_cols, COLS)
    slots = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(0) % tiles
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
):
    blocks = tl.cdiv(n_cols, 128)
    row_block, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    slots = row_block * 128 + turned_rows()
    cols = block * 128 + tl.arange(0, 128)
    if GATHER:
        tokens = tl.load(token_of_slot_ptr + slots, mask=slots < n_rows, other=-1).to(tl.int64)
        real = tokens >= 0
    else:
        tokens, real = slots.to(tl.int64), slots < n_rows
    mask = real[:, None] & (cols < n_cols)[None, :]
    codes = tl.load(codes_ptr + tokens[:, None] * n_cols + cols[None, :], mask=mask, other=0.0)
    scale = tl.load(scales_ptr + block * scale_stride + tokens, mask=real, other=0.0)
    x = from_e4m3(codes) * scale[:, None]
    store_columns(out_ptr, out_scales_ptr, x, row_block, cols, n_cols, code_stride, POW2)


def permute_fp8(codes: Tensor, scales: Tensor, token_of_slot: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.gather8.permute_fp8`."""
    _, k = check_rows8("codes", codes, scales, codes.device)
    check("token_of_slot", token_of_slot, (None,), INT32, codes.device)
    rows = token_of_slot.shape[0]
    out, out_scales = empty_rows(rows, k, codes.device)
    if out.numel():
        _permute_kernel[(triton.cdiv(rows, ROWS) * triton.cdiv(k, COLS),)](
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
    if out.numel():
        _requantise_kernel[(triton.cdiv(rows, BLOCK) * triton.cdiv(k, BLOCK),)](
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
            num_warps=8,
        )
    return out, out_scales
