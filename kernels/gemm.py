"""GEMMs of linear layers that torch does not have, or has under another name; all formulas in `reference.gemm`.

- grouped_mm, grouped_mm_t: torch's grouped GEMM (CUTLASS, BF16, offsets stay on the device).
- dense_wgrad_: cuBLAS with FP32 output that adds to its own output buffer, so that accumulating costs no extra pass.
- grouped_wgrad_: Triton, a GEMM per expert over its own rows, BF16 operands, FP32 result stored or added in place. Rows
  are the reduced dimension: both operands are read as they lie, [rows, columns], and enter the tensor cores transposed.

Tiles of grouped_wgrad_: every expert has the same number of output tiles whatever its rows, so a program finds its
expert by one division. Programs are not persistent: experts differ in length, and the hardware hands the next tile to
whichever multiprocessor is free. Accumulating starts from the gradient instead of adding it at the end: its load
overlaps the first operands'.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from deepv3.kernels.checks import ACTIVATIONS, FP32, INT32, cdiv, check


class Tile(NamedTuple):
    """Shape of a program of grouped_wgrad_: output rows x columns, rows reduced per step, and how operands arrive."""

    n: int
    k: int
    rows: int
    warps: int
    stages: int
    descriptors: bool  # tensor memory accelerator, else cp.async


# Candidates for BF16, all built for sm_90 by the tests without spills. 128 x 256 needs 48 bytes of L2 per clock and
# multiprocessor at full rate, about what Hopper's L2 gives; 128 x 128 needs 64, but with 4 warps two of its programs
# share a multiprocessor and hide each other's start and end.
TILES = [
    Tile(128, 256, 64, 8, 4, True),
    Tile(256, 128, 64, 8, 4, True),
    Tile(128, 256, 64, 8, 3, True),
    Tile(128, 256, 128, 8, 2, True),
    Tile(128, 128, 64, 4, 3, True),
    Tile(128, 128, 128, 8, 3, True),
    Tile(128, 128, 64, 8, 3, False),
    Tile(128, 128, 64, 8, 4, False),
]
BEST = TILES[0]
UNALIGNED = Tile(64, 64, 32, 8, 2, False)  # rows that do not start at 16 bytes: no descriptors
EXACT = Tile(64, 64, 32, 4, 2, False)  # FP32 operands: no tensor cores, FP32 products
GROUPED = 8  # tiles along n that share x in L2 before the next column of tiles


@triton.jit
def _grouped_wgrad_kernel(
    grad_ptr,
    dy_ptr,
    x_ptr,
    offsets_ptr,
    n_out,
    n_in,
    ACCUMULATE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUPED: tl.constexpr,
):
    tiles_n, tiles_k = tl.cdiv(n_out, BLOCK_N), tl.cdiv(n_in, BLOCK_K)
    group = tl.program_id(0) // (tiles_n * tiles_k)
    tile = tl.program_id(0) % (tiles_n * tiles_k)
    band = tile // (GROUPED * tiles_k)
    height = tl.minimum(tiles_n - band * GROUPED, GROUPED)
    first_n = (band * GROUPED + tile % (GROUPED * tiles_k) % height) * BLOCK_N
    first_k = tile % (GROUPED * tiles_k) // height * BLOCK_K

    start = tl.load(offsets_ptr + group - 1, mask=group > 0, other=0)
    end = tl.load(offsets_ptr + group)
    if ACCUMULATE and start == end:
        return
    cols_n, cols_k = first_n + tl.arange(0, BLOCK_N), first_k + tl.arange(0, BLOCK_K)
    grad_ptr += (group.to(tl.int64) * n_out + first_n) * n_in + first_k
    inner = tl.arange(0, BLOCK_N)[:, None] * n_in + tl.arange(0, BLOCK_K)[None, :]
    mask = (cols_n < n_out)[:, None] & (cols_k < n_in)[None, :]
    if ACCUMULATE:
        total = tl.load(grad_ptr + inner, mask=mask, other=0.0)
    else:
        total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)

    if DESCRIPTORS:  # the group's end is made the tensors' end: rows beyond it arrive as zeros
        bottom = tl.maximum(end, 1)
        dy_rows = tl.make_tensor_descriptor(dy_ptr, [bottom, n_out], [n_out, 1], [BLOCK_R, BLOCK_N])
        x_rows = tl.make_tensor_descriptor(x_ptr, [bottom, n_in], [n_in, 1], [BLOCK_R, BLOCK_K])
        for row in range(start, end, BLOCK_R):
            dy = dy_rows.load([row, first_n])
            x = x_rows.load([row, first_k])
            total = tl.dot(tl.trans(dy), x, total, input_precision="ieee")
    else:
        rows = tl.arange(0, BLOCK_R)
        dy_ptrs = dy_ptr + (start.to(tl.int64) + rows)[:, None] * n_out + cols_n[None, :]
        x_ptrs = x_ptr + (start.to(tl.int64) + rows)[:, None] * n_in + cols_k[None, :]
        for row in range(start, end, BLOCK_R):
            inside = (rows < end - row)[:, None]
            dy = tl.load(dy_ptrs, mask=inside & (cols_n < n_out)[None, :], other=0.0)
            x = tl.load(x_ptrs, mask=inside & (cols_k < n_in)[None, :], other=0.0)
            total = tl.dot(tl.trans(dy), x, total, input_precision="ieee")
            dy_ptrs += BLOCK_R * n_out
            x_ptrs += BLOCK_R * n_in
    tl.store(grad_ptr + inner, total, mask=mask)


def grouped_mm(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """See `reference.gemm.grouped_mm`. BF16; FP32 takes torch's fallback, which reads the offsets on the host."""
    check("rows", rows, (None, None), ACTIVATIONS, rows.device)
    check("weight", weight, (None, None, rows.shape[1]), (rows.dtype,), rows.device)
    check("offsets", offsets, (weight.shape[0],), INT32, rows.device)
    if rows.numel() == 0:
        return rows.new_zeros(rows.shape[0], weight.shape[1])
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)


def grouped_mm_t(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """See `reference.gemm.grouped_mm_t`. BF16; FP32 takes torch's fallback, which reads the offsets on the host."""
    check("rows", rows, (None, None), ACTIVATIONS, rows.device)
    check("weight", weight, (None, rows.shape[1], None), (rows.dtype,), rows.device)
    check("offsets", offsets, (weight.shape[0],), INT32, rows.device)
    if rows.numel() == 0:
        return rows.new_zeros(rows.shape[0], weight.shape[2])
    return F.grouped_mm(rows, weight, offs=offsets)


def dense_wgrad_(grad: Tensor, dy: Tensor, x: Tensor, accumulate: bool) -> None:
    """See `reference.gemm.dense_wgrad_`. Relies on `out` being the addend itself, which torch then does not copy."""
    check("grad", grad, (None, None), FP32, grad.device)
    check("dy", dy, (None, grad.shape[0]), ACTIVATIONS, grad.device, contiguous=False)
    check("x", x, (dy.shape[0], grad.shape[1]), (dy.dtype,), grad.device, contiguous=False)
    mixed = {} if dy.dtype == grad.dtype else {"out_dtype": grad.dtype}
    if accumulate:
        torch.addmm(grad, dy.t(), x, out=grad, **mixed)
    else:
        torch.mm(dy.t(), x, out=grad, **mixed)


def grouped_wgrad_(grad: Tensor, dy: Tensor, x: Tensor, offsets: Tensor, accumulate: bool) -> None:
    """See `reference.gemm.grouped_wgrad_`. Reproducible: one program owns a tile and walks its rows in order."""
    check("grad", grad, (None, None, None), FP32, grad.device)
    groups, n_out, n_in = grad.shape
    check("dy", dy, (None, n_out), ACTIVATIONS, grad.device)
    check("x", x, (dy.shape[0], n_in), (dy.dtype,), grad.device)
    check("offsets", offsets, (groups,), INT32, grad.device)
    if grad.numel():
        launch_grouped_wgrad(grad, dy, x, offsets, accumulate, choose_tile(dy, x))


def choose_tile(dy: Tensor, x: Tensor) -> Tile:
    """The tile for these operands: exact products for FP32, else BEST where descriptors can read the rows."""
    if dy.dtype == torch.float32:
        return EXACT
    aligned = dy.shape[1] % 8 == 0 and x.shape[1] % 8 == 0 and dy.data_ptr() % 16 == 0 and x.data_ptr() % 16 == 0
    return BEST if aligned else UNALIGNED


def launch_grouped_wgrad(grad: Tensor, dy: Tensor, x: Tensor, offsets: Tensor, accumulate: bool, tile: Tile) -> None:
    """Run grouped_wgrad_ with a given tile and without checks: for the choice of tiles on a device."""
    groups, n_out, n_in = grad.shape
    if tile.descriptors:  # per thread, so per launch: backward runs on autograd's threads
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=grad.device))
    _grouped_wgrad_kernel[(groups * cdiv(n_out, tile.n) * cdiv(n_in, tile.k),)](
        grad,
        dy,
        x,
        offsets,
        n_out,
        n_in,
        ACCUMULATE=accumulate,
        DESCRIPTORS=tile.descriptors,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        BLOCK_R=tile.rows,
        GROUPED=GROUPED,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
