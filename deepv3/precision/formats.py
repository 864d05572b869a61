"""Number formats of GEMM operands and kept tensors, and tensors in them. What a format means to the bit is
docs/numerics.md; which tensor has which is `recipe`.

`Rows`, `Columns` and `Blocks` are codes with their scales, laid out as the kernels want them: a product reduces over
the last dimension of both operands, so an operand is quantised along that one, and twice where two products reduce
over different ones. No autograd here.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import deepv3.kernels as kernels
from deepv3.kernels.reference.quantise import BLOCK, round_up, row_scales


class Format(NamedTuple):
    """element: bf16, e4m3 or e5m6. tile: what shares a scale, (1, 128) along the reduced dimension or (128, 128).
    pow2: scales are powers of two, so that quantising again along the other dimension rounds no second time."""

    element: str
    tile: tuple[int, int] = (1, 1)
    pow2: bool = False


BF16 = Format("bf16")
TILES = Format("e4m3", (1, BLOCK))
TILES_POW2 = Format("e4m3", (1, BLOCK), pow2=True)
SQUARES = Format("e4m3", (BLOCK, BLOCK))
E5M6 = Format("e5m6", (1, BLOCK), pow2=True)


class Rows(NamedTuple):
    """E4M3 codes [M, K] and scales [M, ceil(K / 128)]: an operand of Fprop or Dgrad."""

    codes: Tensor
    scales: Tensor


class Columns(NamedTuple):
    """Transposed E4M3 codes [K, M rounded up to 128] and scales [M / 128, K]: an operand of Wgrad."""

    codes: Tensor
    scales: Tensor


class Blocks(NamedTuple):
    """A weight [.., N, K] in blocks of 128 x 128, and the same numbers transposed."""

    codes: Tensor
    scales: Tensor
    codes_t: Tensor
    scales_t: Tensor


def rows_of(x: Tensor, format: Format) -> Rows:
    """x [M, K] for a product that reduces over K."""
    if format.tile == SQUARES.tile:
        return both_of(x, format)[0]
    return Rows(*kernels.quantise_rows(x, format.pow2))


def columns_of(x: Tensor, format: Format) -> Columns:
    """x [M, K] for a product that reduces over M."""
    if format.tile == SQUARES.tile:
        return both_of(x, format)[1]
    return Columns(*kernels.quantise_columns(x, format.pow2))


def both_of(x: Tensor, format: Format) -> tuple[Rows, Columns]:
    """`rows_of` and `columns_of` in one read."""
    if format.tile == SQUARES.tile:
        return _squares(x, format.pow2)
    codes, scales, column_codes, column_scales = kernels.quantise_both(x, format.pow2)
    return Rows(codes, scales), Columns(column_codes, column_scales)


def _squares(x: Tensor, pow2: bool) -> tuple[Rows, Columns]:
    """128 x 128 blocks of an activation, their scales repeated into the two layouts."""
    m, k = x.shape
    padded = F.pad(x, (0, 0, 0, round_up(m, BLOCK) - m))
    codes, scales, codes_t, scales_t = kernels.quantise_blocks(padded, pow2)
    spread = row_scales(m, k, x.device)
    spread.copy_(scales.repeat_interleave(BLOCK, dim=0)[:m])
    spread_t = scales_t.t().repeat_interleave(BLOCK, dim=1)[:, :k].contiguous()
    return Rows(codes[:m], spread), Columns(codes_t, spread_t)


def turned(codes: Tensor, scales: Tensor, token_of_slot: Tensor | None = None) -> Columns:
    """Rows with power-of-two scales as columns, gathered first where token_of_slot is given (-1: a row of zeros)."""
    return Columns(*kernels.requantise(codes, scales, token_of_slot, pow2=True))


def placeholder(like: Tensor, *shape: int) -> Tensor:
    """A tensor of this shape without memory: autograd's handle of a value that exists in FP8 only. It reads as NaN."""
    return like.new_full((), torch.nan).expand(shape)
