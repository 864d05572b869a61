"""E5M6 packing, eight 12-bit floats in three words: Triton kernels; the format is told in `reference.e5m6`.

A lane loads eight neighbours (16 bytes of BF16), splits them into eight registers and shifts them into three words;
first, second and third words of a block's 16 triples lie in 64 bytes each, so lanes store next to each other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepv3.kernels.casts import magnitude, scale_of
from deepv3.kernels.checks import ACTIVATIONS, cdiv, check, check_scales
from deepv3.kernels.reference.quantise import BLOCK, row_scales

E5M6_MAX = tl.constexpr(65024.0)
ROWS = 32


@triton.jit
def _to_e5m6(x):
    """int32 with the 12 bits nearest to FP32 x; see `reference.e5m6.e5m6_bits`."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = tl.minimum((size - (112 << 23) + 0xFFFF + ((size >> 17) & 1)) >> 17, 0x7BF)
    small = (size.to(tl.float32, bitcast=True) + 8.0).to(tl.int32, bitcast=True) - 0x41000000
    code = tl.where(size < (113 << 23), small, normal) | ((bits >> 20) & 0x800)
    return tl.where(size > 0x7F800000, 0x7E0, code)


@triton.jit
def _from_e5m6(bits):
    """FP32 of 12-bit codes (int32, higher bits ignored)."""
    exponent, mantissa = (bits >> 6) & 31, bits & 63
    high = tl.where(exponent == 31, 255, exponent + 112)  # Inf and NaN keep their mantissa
    normal = ((high << 23) | (mantissa << 17)).to(tl.float32, bitcast=True)
    value = tl.where(exponent == 0, mantissa.to(tl.float32) * (2.0**-20), normal)
    sign = (bits & 0x800) << 20
    return (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _split8(x):
    """[R, 8 G] to eight of [R, G], by position within eight neighbours."""
    R: tl.constexpr = x.shape[0]
    G: tl.constexpr = x.shape[1] // 8
    even, odd = tl.split(tl.reshape(x, (R, G, 2, 2, 2)))
    v04, v26 = tl.split(even)
    v15, v37 = tl.split(odd)
    v0, v4 = tl.split(v04)
    v2, v6 = tl.split(v26)
    v1, v5 = tl.split(v15)
    v3, v7 = tl.split(v37)
    return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit
def _join8(v0, v1, v2, v3, v4, v5, v6, v7):
    """The inverse of `_split8`."""
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    return tl.reshape(tl.join(even, odd), (v0.shape[0], v0.shape[1] * 8))


@triton.jit
def _pack_kernel(x_ptr, words_ptr, scales_ptr, n_rows, n_cols, x_stride, scale_stride, ROWS: tl.constexpr):
    blocks = n_cols // 128
    block = tl.program_id(0) % blocks
    rows = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    cols = block * 128 + tl.arange(0, 128)
    inside = (rows < n_rows)[:, None]
    x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * x_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    scale, inverse = scale_of(tl.max(magnitude(x), axis=1, keep_dims=True), True, E5M6_MAX)
    v0, v1, v2, v3, v4, v5, v6, v7 = _split8(_to_e5m6(x * inverse))
    first = v0 | (v1 << 12) | (v2 << 24)
    second = (v2 >> 8) | (v3 << 4) | (v4 << 16) | (v5 << 28)
    third = (v5 >> 4) | (v6 << 8) | (v7 << 20)
    words = words_ptr + (rows.to(tl.int64) * blocks + block)[:, None] * 48 + tl.arange(0, 16)[None, :]
    tl.store(words, first, mask=inside)
    tl.store(words + 16, second, mask=inside)
    tl.store(words + 32, third, mask=inside)
    tl.store(scales_ptr + block * scale_stride + rows, tl.reshape(scale, (ROWS,)), mask=rows < n_rows)


@triton.jit
def _unpack_kernel(words_ptr, scales_ptr, x_ptr, n_rows, n_cols, scale_stride, ROWS: tl.constexpr):
    blocks = n_cols // 128
    block = tl.program_id(0) % blocks
    rows = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    inside = (rows < n_rows)[:, None]
    words = words_ptr + (rows.to(tl.int64) * blocks + block)[:, None] * 48 + tl.arange(0, 16)[None, :]
    a = tl.load(words, mask=inside, other=0)
    b = tl.load(words + 16, mask=inside, other=0)
    c = tl.load(words + 32, mask=inside, other=0)
    # Arithmetic shifts drag the sign along; where it would reach the 12 bits it is masked away.
    v2, v5 = ((a >> 24) & 0xFF) | (b << 8), ((b >> 28) & 0xF) | (c << 4)
    value = _from_e5m6(_join8(a, a >> 12, v2, b >> 4, b >> 16, v5, c >> 8, c >> 20))
    scale = tl.load(scales_ptr + block * scale_stride + rows, mask=rows < n_rows, other=0.0)
    out = x_ptr + rows.to(tl.int64)[:, None] * n_cols + block * 128 + tl.arange(0, 128)[None, :]
    tl.store(out, (value * scale[:, None]).to(x_ptr.dtype.element_ty), mask=inside)


def e5m6_pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.e5m6.e5m6_pack`. Rows of x may be strided."""
    check("x", x, (None, None), ACTIVATIONS, x.device, contiguous=False)
    m, k = x.shape
    if k % BLOCK:
        raise ValueError(f"x has {k} columns, E5M6 packs multiples of {BLOCK}")
    words, scales = torch.empty(m, k * 3 // 8, dtype=torch.int32, device=x.device), row_scales(m, k, x.device)
    if x.numel():
        _pack_kernel[(cdiv(m, ROWS) * (k // BLOCK),)](x, words, scales, m, k, x.stride(0), scales.stride(1), ROWS=ROWS)
    return words, scales


def e5m6_unpack(words: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """See `reference.e5m6.e5m6_unpack`."""
    check("words", words, (None, None), (torch.int32,), words.device)
    if words.shape[1] % 48:
        raise ValueError(f"words has {words.shape[1]} columns, needed a multiple of 48: a block of 128 values has 48")
    m, k = words.shape[0], words.shape[1] * 8 // 3
    check_scales("scales", scales, (m, k // BLOCK), words.device)
    x = torch.empty(m, k, dtype=dtype, device=words.device)
    if x.numel():
        _unpack_kernel[(cdiv(m, ROWS) * (k // BLOCK),)](words, scales, x, m, k, scales.stride(1), ROWS=ROWS)
    return x
