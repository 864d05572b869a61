"""FP8 GEMMs in plain Triton: the backend that runs everywhere, in the interpreter too. Formulas in `reference.gemm8`.

Every step multiplies 128 of the reduced dimension on the tensor cores into a fresh accumulator, then scales it and adds
it in FP32: scale block and promotion are one. Codes and activation scales arrive by descriptors (tensor memory
accelerator), out-of-range parts as zeros; a weight has one scale per step and tile.

- mm: rows x blocks, dense or grouped. A group's rows are whole tiles, so a tile finds its group by comparing its first
  row with the ends; the groups' matrices are one tall matrix.
- wgrad: columns x columns, dense or grouped: a group is a range of the reduced dimension.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deepv3.kernels.casts import INTERPRETED, from_e4m3
from deepv3.kernels.checks import cdiv, next_power_of_2

STEP = 128  # of the reduced dimension


class Tile(NamedTuple):
    """Shape of a program: rows x columns of the result, warps and stages of the pipeline."""

    m: int
    n: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return f"triton {self.m}x{self.n}, {self.warps} warps, {self.stages} stages"


# Both are built for sm_90 by the tests without spills. 64 x 128 leaves room for a second program, that multiplies while
# the first promotes, and reads more from L2: the faster one at every shape of V3 on an H200. 128 x 128 with 8 warps
# fills a processor alone.
MM_TILES = WGRAD_TILES = [Tile(64, 128, 4, 3), Tile(128, 128, 8, 3)]
BAND = 16  # tiles along m that share columns in L2 before the next column of tiles


@triton.jit
def _place(tile, tiles_m, tiles_n, BAND: tl.constexpr):
    """(row, column) of a tile: bands of BAND rows, columns in turn, so that neighbours share both operands in L2."""
    band = tile // (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    return band * BAND + tile % (BAND * tiles_n) % height, tile % (BAND * tiles_n) // height


@triton.jit
def _product(a, b):
    """a [M, 128] @ b [N, 128]^T of codes into a fresh FP32 accumulator."""
    if INTERPRETED:
        return tl.dot(from_e4m3(a), tl.trans(from_e4m3(b)), input_precision="ieee")
    else:
        return tl.dot(a, tl.trans(b))


@triton.jit
def mm_kernel(
    codes,
    scales,
    weight,
    out,
    weight_scales_ptr,
    offsets_ptr,
    n_rows,
    n_out,
    n_in,
    n_groups,
    group_stride,
    scale_stride,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BAND: tl.constexpr,
):
    """GROUPS: n_groups as a power of two, 0 for a dense product."""
    tile_m, tile_n = _place(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_out, BLOCK_N), BAND)
    row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    steps = tl.cdiv(n_in, 128)
    first = col
    if GROUPS:
        groups = tl.arange(0, GROUPS)
        ends = tl.load(offsets_ptr + groups, mask=groups < n_groups, other=0x7FFFFFFF)
        group = tl.sum((ends <= row).to(tl.int32), axis=0)
        if group >= n_groups:  # rows of nobody
            steps = 0
            group = 0
        first += group * n_out
        weight_scales_ptr += group * group_stride
    weight_scales_ptr += col // 128 * scale_stride
    for step in range(steps):
        a = codes.load([row, step * 128])
        b = weight.load([first, step * 128])
        scale = tl.reshape(scales.load([step, row]), (BLOCK_M,)) * tl.load(weight_scales_ptr + step)
        total += _product(a, b) * scale[:, None]
    out.store([row, col], total.to(out.dtype))


@triton.jit
def wgrad_kernel(
    dy,
    x,
    dy_scales,
    x_scales,
    grad_ptr,
    offsets_ptr,
    n_out,
    n_in,
    n_rows,
    GROUPED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BAND: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(n_out, BLOCK_M), tl.cdiv(n_in, BLOCK_N)
    group = tl.program_id(0) // (tiles_m * tiles_n)
    tile_m, tile_n = _place(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, BAND)
    row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
    start, end = 0, n_rows
    if GROUPED:
        start = tl.load(offsets_ptr + group - 1, mask=group > 0, other=0)
        end = tl.load(offsets_ptr + group)
        if ACCUMULATE and start == end:
            return
    rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    grad_ptr += group.to(tl.int64) * n_out * n_in
    inner = rows.to(tl.int64)[:, None] * n_in + cols[None, :]
    mask = (rows < n_out)[:, None] & (cols < n_in)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for place in range(start, end, 128):
        a = dy.load([row, place])
        b = x.load([col, place])
        scale_a = tl.reshape(dy_scales.load([place // 128, row]), (BLOCK_M,))
        scale_b = tl.reshape(x_scales.load([place // 128, col]), (BLOCK_N,))
        total += _product(a, b) * (scale_a[:, None] * scale_b[None, :])
    if ACCUMULATE:
        total += tl.load(grad_ptr + inner, mask=mask, other=0.0)
    tl.store(grad_ptr + inner, total, mask=mask)


def rows_descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    """Descriptor of a matrix whose tiles are `rows` x 128."""
    return TensorDescriptor(tensor, list(tensor.shape), [tensor.stride(0), 1], [rows, STEP])


def scales_descriptor(scales: Tensor, width: int) -> TensorDescriptor:
    """Descriptor of scales [blocks, rows], rows contiguous, of which a tile is 1 x `width`."""
    return TensorDescriptor(scales, list(scales.shape), [scales.stride(0), 1], [1, width])


def launch_mm(
    out: Tensor,
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    offsets: Tensor | None,
    tile: Tile,
) -> None:
    """`fp8_mm`, with offsets `grouped_fp8_mm`, into `out` and without checks."""
    (m, k), n, groups = codes.shape, weight.shape[-2], 1 if offsets is None else weight.shape[0]
    mm_kernel[(cdiv(m, tile.m) * cdiv(n, tile.n),)](
        rows_descriptor(codes, tile.m),
        scales_descriptor(scales.t(), tile.m),
        rows_descriptor(weight.view(-1, k), tile.n),
        TensorDescriptor(out, [m, n], [n, 1], [tile.m, tile.n]),
        weight_scales,
        weight_scales if offsets is None else offsets,  # not read when dense
        m,
        n,
        k,
        groups,
        0 if offsets is None else weight_scales.stride(0),
        weight_scales.stride(-2),
        GROUPS=0 if offsets is None else next_power_of_2(groups),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BAND=BAND,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def launch_wgrad(
    grad: Tensor,
    dy_codes: Tensor,
    dy_scales: Tensor,
    x_codes: Tensor,
    x_scales: Tensor,
    offsets: Tensor | None,
    accumulate: bool,
    tile: Tile,
) -> None:
    """`fp8_wgrad_`, with offsets `grouped_fp8_wgrad_`, without checks."""
    n, k = grad.shape[-2:]
    groups = 1 if offsets is None else grad.shape[0]
    wgrad_kernel[(groups * cdiv(n, tile.m) * cdiv(k, tile.n),)](
        rows_descriptor(dy_codes, tile.m),
        rows_descriptor(x_codes, tile.n),
        scales_descriptor(dy_scales, tile.m),
        scales_descriptor(x_scales, tile.n),
        grad,
        grad if offsets is None else offsets,  # not read when dense
        n,
        k,
        dy_codes.shape[1],
        GROUPED=offsets is not None,
        ACCUMULATE=accumulate,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BAND=BAND,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
