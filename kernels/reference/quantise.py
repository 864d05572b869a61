"""E4M3 codes with one scale per 1x128, 128x1 or 128x128 block (V3 3.3.2), and back: plain torch.

Every quantiser is `encode`: amax of the block in FP32, at least 2^-80; scale = amax / 448; code = the E4M3 nearest to
x * (448 / amax), ties to even. With `pow2` the scale is rounded up to a power of two: then a block can be quantised
again along its other side without a second rounding. docs/numerics.md has the edge cases.

Layouts, with Kb = ceil(K / 128) and Mr = M rounded up to 128; ragged ends are quantised as if zeros followed:
- rows     codes [M, K], scales [M, Kb] FP32 with strides (1, M rounded up to 4): M is contiguous;
- columns  codes [K, Mr] (transposed, zeros from M on), scales [Mr / 128, K] FP32;
- blocks   codes [.., N, K] and [.., K, N], scales [.., Nb, Kb] and [.., Kb, Nb] FP32, rows padded to 4.
"""

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
SMALLEST_AMAX = 2.0**-80  # of a block of zeros; far below the gradients of a batch of 10^8 tokens (1e-10)
BLOCK = 128


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def row_scales(rows: int, cols: int, device: torch.device) -> Tensor:
    """Uninitialised [rows, ceil(cols / 128)] FP32 scales, contiguous along rows, which cuBLAS and descriptors want."""
    shape, strides = (rows, -(-cols // BLOCK)), (1, round_up(rows, 4))
    return torch.empty_strided(shape, strides, dtype=torch.float32, device=device)


def block_scales(*shape: int, device: torch.device) -> Tensor:
    """Uninitialised FP32 scales of this shape whose rows begin at multiples of 16 bytes, as cuBLAS wants them."""
    return torch.empty(*shape[:-1], round_up(shape[-1], 4), dtype=torch.float32, device=device)[..., : shape[-1]]


def scale_of(amax: Tensor, pow2: bool, largest: float = E4M3_MAX) -> tuple[Tensor, Tensor]:
    """(scale, its inverse) of blocks with this largest magnitude. An infinite amax gives an infinite scale."""
    amax = amax.clamp(min=SMALLEST_AMAX)
    top = torch.full_like(amax, largest)  # tensor by tensor: number / tensor is not the rounded quotient
    scale = amax / top
    if not pow2:
        return scale, top / amax
    bits = scale.view(torch.int32)
    scale = (((bits >> 23) + ((bits & 0x7FFFFF) != 0)) << 23).view(torch.float32)
    return scale, torch.ones_like(scale) / scale


def magnitude(x: Tensor) -> Tensor:
    """|x| with NaN counted as zero: it must not set its block's scale, only poison its own product."""
    return x.abs().masked_fill(x.isnan(), 0.0)


def to_codes(scaled: Tensor) -> Tensor:
    """E4M3 nearest to FP32 values, saturating at 448; NaN is 0x7F whatever its sign."""
    codes = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return codes.view(torch.uint8).masked_fill(scaled.isnan(), 0x7F).view(E4M3)


def encode(blocks: Tensor, pow2: bool, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Codes of FP32 blocks and their scales (dims kept with size 1), one scale over the dimensions `dims`."""
    scale, inverse = scale_of(magnitude(blocks).amax(dims, keepdim=True), pow2)
    return to_codes(blocks * inverse), scale


def _padded(x: Tensor, rows: int, cols: int) -> Tensor:
    """FP32 copy of the last two dimensions with zeros up to (rows, cols)."""
    return torch.nn.functional.pad(x.float(), (0, cols - x.shape[-1], 0, rows - x.shape[-2]))


def quantise_rows(x: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """1x128 blocks of x [M, K], BF16 or FP32. Returns codes [M, K] and scales [M, Kb]; K a multiple of 16."""
    (m, k), width = x.shape, round_up(x.shape[1], BLOCK)
    codes, scale = encode(_padded(x, m, width).view(m, width // BLOCK, BLOCK), pow2, (2,))
    scales = row_scales(m, k, x.device)
    scales.copy_(scale.squeeze(2))
    return codes.reshape(m, width)[:, :k].contiguous(), scales


def quantise_columns(x: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """128x1 blocks of x [M, K], transposed. Returns codes [K, Mr] and scales [Mr / 128, K]."""
    k, height = x.shape[1], round_up(x.shape[0], BLOCK)
    codes, scale = encode(_padded(x, height, k).view(height // BLOCK, BLOCK, k), pow2, (1,))
    return codes.view(height, k).t().contiguous(), scale.squeeze(1)


def quantise_both(x: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantise_rows` and `quantise_columns` of x in one read: (codes, scales, column codes, column scales)."""
    return *quantise_rows(x, pow2), *quantise_columns(x, pow2)


def quantise_blocks(w: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """128x128 blocks of a weight [N, K] or [G, N, K], as it is for Fprop and transposed for Dgrad.

    Returns codes [.., N, K], scales [.., Nb, Kb], transposed codes [.., K, N] and scales [.., Kb, Nb]: the same numbers
    in both orders, because a block has one scale. N and K are multiples of 16.
    """
    *groups, n, k = w.shape
    high, wide = round_up(n, BLOCK), round_up(k, BLOCK)
    tiles = _padded(w, high, wide).view(*groups, high // BLOCK, BLOCK, wide // BLOCK, BLOCK)
    codes, scale = encode(tiles, pow2, (-3, -1))
    codes, scale = codes.reshape(*groups, high, wide)[..., :n, :k].contiguous(), scale.squeeze(-1).squeeze(-2)
    scales = block_scales(*groups, high // BLOCK, wide // BLOCK, device=w.device)
    scales_t = block_scales(*groups, wide // BLOCK, high // BLOCK, device=w.device)
    scales.copy_(scale)
    scales_t.copy_(scale.transpose(-1, -2))
    return codes, scales, codes.transpose(-1, -2).contiguous(), scales_t


def dequantise_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """codes [M, K] times scales [M, Kb], one per 128 columns, in `dtype`."""
    return (codes.float() * scales.repeat_interleave(BLOCK, dim=1)[:, : codes.shape[1]]).to(dtype)


def dequantise_columns(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Transposed codes [K, Mr] and scales [Mr / 128, K] to values [K, Mr] in `dtype`, still transposed."""
    return (codes.float() * scales.t().repeat_interleave(BLOCK, dim=1)).to(dtype)


def dequantise_blocks(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes [.., N, K] times scales [.., Nb, Kb], one per 128 x 128, in `dtype`."""
    n, k = codes.shape[-2:]
    spread = scales.repeat_interleave(BLOCK, dim=-2)[..., :n, :].repeat_interleave(BLOCK, dim=-1)[..., :k]
    return (codes.float() * spread).to(dtype)
