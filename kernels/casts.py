"""Casts and block scales inside kernels: the same bits as `reference.quantise`, on a GPU and in the interpreter.

On a GPU FP32 becomes E4M3 by one instruction, which rounds to even, saturates and writes 0x7F for NaN. The interpreter
rounds wrongly and reads NaN as 480, so there both directions go through integers.

Codes are addressed with 64 bits, scales with 32: 2^31 of them would belong to 275 GB of codes.
"""

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
E4M3_MAX = tl.constexpr(448.0)
SMALLEST_AMAX = tl.constexpr(2.0**-80)
PAD_SCALE = tl.constexpr(2.0**-88)


@triton.jit
def to_e4m3(x):
    """FP32 to E4M3, nearest even, saturating; NaN is 0x7F."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        normal = tl.minimum((size - (120 << 23) + 0x7FFFF + ((size >> 20) & 1)) >> 20, 0x7E)
        small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(size < (121 << 23), small, normal) | ((bits >> 24) & 0x80)
        code = tl.where(size > 0x7F800000, 0x7F, code)
        return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        return x.to(tl.float8e4nv)


@triton.jit
def from_e4m3(codes):
    """E4M3 to FP32, exact."""
    value = codes.to(tl.float32)
    if INTERPRETED:
        value = tl.where((codes.to(tl.uint8, bitcast=True) & 0x7F) == 0x7F, float("nan"), value)
    return value


@triton.jit
def scale_of(amax, POW2: tl.constexpr, LARGEST: tl.constexpr):
    """(scale, its inverse) of blocks with these largest magnitudes; see `reference.quantise.scale_of`.

    A power of two needs no division: the quotient's exponent is the difference of the exponents, rounded up by one more
    where amax has the larger mantissa.
    """
    amax = tl.maximum(amax, SMALLEST_AMAX)
    largest = tl.full(amax.shape, LARGEST, tl.float32)
    if POW2:
        bits, top = amax.to(tl.int32, bitcast=True), largest.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) - (top >> 23) + tl.where((bits & 0x7FFFFF) > (top & 0x7FFFFF), 128, 127)
        infinite = bits == 0x7F800000
        scale = tl.where(infinite, bits, exponent << 23)
        inverse = tl.where(infinite, 0, (254 - exponent) << 23)
        return scale.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)
    else:
        return tl.div_rn(amax, largest), tl.div_rn(largest, amax)


@triton.jit
def magnitude(x):
    """|x|; NaN as zero in the interpreter. A GPU's maximum takes the other number, and `scale_of` the smallest amax."""
    return tl.where(x == x, tl.abs(x), 0.0) if INTERPRETED else tl.abs(x)


@triton.jit
def encode(x, AXIS: tl.constexpr, POW2: tl.constexpr):
    """E4M3 codes of the FP32 tile x and its scales, one along AXIS, which stays with size 1."""
    scale, inverse = scale_of(tl.max(magnitude(x), axis=AXIS, keep_dims=True), POW2, E4M3_MAX)
    return to_e4m3(x * inverse), scale


@triton.jit
def store_rows(codes_ptr, scales_ptr, x, rows, block, n_rows, n_cols, scale_stride, POW2: tl.constexpr):
    """Quantise the tile x [ROWS, 128] by rows and store it: rows `rows`, the 128 columns of `block`."""
    codes, scale = encode(x, 1, POW2)
    inside, cols = rows < n_rows, block * 128 + tl.arange(0, 128)
    address = rows.to(tl.int64)[:, None] * n_cols + cols[None, :]
    tl.store(codes_ptr + address, codes, mask=inside[:, None] & (cols < n_cols)[None, :])
    tl.store(scales_ptr + block * scale_stride + rows, tl.reshape(scale, (scale.shape[0],)), mask=inside)


@triton.jit
def turned_rows():
    """The order in which `turn` wants a tile's 128 rows: place 32 j + i holds row 4 i + j.

    A lane of a tile loaded along its rows holds rows 32 or 16 places apart: so it owns four neighbours, and packs them.
    """
    places = tl.arange(0, 128)
    return places % 32 * 4 + places // 32


@triton.jit
def turn(codes):
    """Codes [128 `turned_rows`, COLS] transposed, as int32 [COLS, 32]: word i of a column holds rows 4 i to 4 i + 3."""
    COLS: tl.constexpr = codes.shape[1]
    bytes = codes.to(tl.uint8, bitcast=True).to(tl.int32)
    low, high = tl.split(tl.permute(tl.reshape(bytes, (2, 2, 32, COLS)), (2, 3, 0, 1)))  # by j % 2, then j // 2
    row0, row2 = tl.split(low)
    row1, row3 = tl.split(high)
    return tl.trans(row0 | (row1 << 8) | (row2 << 16) | (row3 << 24))


@triton.jit
def store_columns(words_ptr, scales_ptr, x, row_block, cols, n_cols, code_stride, POW2: tl.constexpr):
    """Quantise the tile x [128 `turned_rows`, COLS] by columns and store it transposed.

    words_ptr: the codes [K, code_stride] as int32; scales_ptr: [.., K].
    """
    codes, scale = encode(x, 0, POW2)
    address = cols.to(tl.int64)[:, None] * (code_stride // 4) + (row_block * 32 + tl.arange(0, 32))[None, :]
    tl.store(words_ptr + address, turn(codes), mask=(cols < n_cols)[:, None])
    tl.store(scales_ptr + row_block * n_cols + cols, tl.reshape(scale, (x.shape[1],)), mask=cols < n_cols)
