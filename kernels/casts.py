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
def special(INSTRUCTION: tl.constexpr, x):
    """One instruction of the GPU's special function unit on FP32; not in the interpreter."""
    return tl.inline_asm_elementwise(INSTRUCTION, "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _quotients(amax, LARGEST: tl.constexpr):
    """(amax / LARGEST, LARGEST / amax), both correctly rounded, for amax from 2^-80 to infinity.

    No result and no remainder is denormal in this range, so a quotient within an ulp is mended by one FMA with its
    exact remainder, and none of the branches of `div_rn` is needed. Holds for 448 with any reciprocal within 2 ulp:
    tried with every mantissa.
    """
    if INTERPRETED:
        largest = tl.full(amax.shape, LARGEST, tl.float32)
        return tl.div_rn(amax, largest), tl.div_rn(largest, amax)
    else:
        share: tl.constexpr = 1.0 / LARGEST
        eighth: tl.constexpr = LARGEST / 8
        scale = amax * share
        scale = tl.fma(tl.fma(-scale, LARGEST, amax), share, scale)
        part = amax * 0.125  # its reciprocal is a normal number also where amax is near the largest
        guess = special("rcp.approx.ftz.f32 $0, $1;", part)
        guess = tl.fma(tl.fma(-guess, part, 1.0), guess, guess)
        inverse = guess * eighth
        inverse = tl.fma(tl.fma(-inverse, part, eighth), guess, inverse)
        infinite = amax == float("inf")
        return tl.where(infinite, amax, scale), tl.where(infinite, 0.0, inverse)


@triton.jit
def scale_of(amax, POW2: tl.constexpr, LARGEST: tl.constexpr):
    """(scale, its inverse) of blocks with these largest magnitudes; see `reference.quantise.scale_of`.

    A power of two needs no division: the quotient's exponent is the difference of the exponents, rounded up by one more
    where amax has the larger mantissa.
    """
    amax = tl.maximum(amax, SMALLEST_AMAX)
    if POW2:
        largest = tl.full(amax.shape, LARGEST, tl.float32)
        bits, top = amax.to(tl.int32, bitcast=True), largest.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) - (top >> 23) + tl.where((bits & 0x7FFFFF) > (top & 0x7FFFFF), 128, 127)
        infinite = bits == 0x7F800000
        scale = tl.where(infinite, bits, exponent << 23)
        inverse = tl.where(infinite, 0, (254 - exponent) << 23)
        return scale.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)
    else:
        return _quotients(amax, LARGEST)


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
