"""Tiles of 128 rows turned on their way through a program, and quantised along what were their columns.

A tile is loaded along its rows and written along its columns, both 16 bytes a lane. It changes lanes as it was read, in
words of four codes or two BF16 rows. A lane then holds 16 neighbouring rows of a column: the largest magnitude of a
column takes 15 comparisons and 3 exchanges, not an exchange for each of the lane's columns and one between the warps,
and four neighbours become one word of codes by two instructions.
"""

import triton
import triton.language as tl

from deepv3.kernels.casts import E4M3_MAX, INTERPRETED, from_e4m3, magnitude, scale_of, to_e4m3


@triton.jit
def turned_rows():
    """The order in which this module wants a tile's 128 rows: place 32 j + i holds row 4 i + j.

    A lane of a tile loaded along its rows holds rows 32 or 16 places apart: so it owns four neighbours, and packs them.
    """
    places = tl.arange(0, 128)
    return places % 32 * 4 + places // 32


@triton.jit
def _four_rows(x):
    """[128 `turned_rows`, COLS] to four of [32, COLS]: rows 4 i, 4 i + 1, 4 i + 2, 4 i + 3."""
    low, high = tl.split(tl.permute(tl.reshape(x, (2, 2, 32, x.shape[1])), (2, 3, 0, 1)))  # by j % 2, then j // 2
    row0, row2 = tl.split(low)
    row1, row3 = tl.split(high)
    return row0, row1, row2, row3


@triton.jit
def _word(row0, row1, row2, row3):
    """int32 of four uint8, row0 lowest."""
    if INTERPRETED:
        low, high = row0.to(tl.int32) | (row1.to(tl.int32) << 8), row2.to(tl.int32) | (row3.to(tl.int32) << 8)
        return low | (high << 16)
    else:  # four neighbours in a register: two instructions a word
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d;
            prmt.b32 a, $4, $5, 0x5140;
            prmt.b32 b, $6, $7, 0x5140;
            prmt.b32 c, $4, $5, 0x7362;
            prmt.b32 d, $6, $7, 0x7362;
            prmt.b32 $0, a, b, 0x5410;
            prmt.b32 $1, a, b, 0x7632;
            prmt.b32 $2, c, d, 0x5410;
            prmt.b32 $3, c, d, 0x7632;
            }""",
            "=&r,=&r,=&r,=&r,r,r,r,r",
            [row0, row1, row2, row3],
            tl.int32,
            is_pure=True,
            pack=4,
        )


@triton.jit
def pair(low, high):
    """int32 of two 16-bit numbers."""
    low, high = low.to(tl.uint16, bitcast=True), high.to(tl.uint16, bitcast=True)
    if INTERPRETED:
        return low.to(tl.int32) | (high.to(tl.int32) << 16)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;",
            "=&r,=&r,r,r",
            [low, high],
            tl.int32,
            is_pure=True,
            pack=2,
        )


@triton.jit
def halves(words):
    """FP32 of the two BF16 in an int32, the lower first."""
    return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def to_pair(low, high):
    """int32 of two FP32 numbers rounded to BF16."""
    if INTERPRETED:
        return pair(low.to(tl.bfloat16), high.to(tl.bfloat16))
    else:  # one instruction; a number rounded alone takes a slow one
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, is_pure=True, pack=1
        )


@triton.jit
def two(a, b, dtype: tl.constexpr):
    """Two FP32 tensors rounded to BF16, as int32 of both; as they are where dtype is FP32."""
    if dtype == tl.bfloat16:
        return to_pair(a, b)
    else:
        return a, b


@triton.jit
def numbers(pair, dtype: tl.constexpr):
    """The two FP32 tensors of which this is `two`, as rounded."""
    if dtype == tl.bfloat16:
        return halves(pair)
    else:
        return pair


@triton.jit
def rounded(a, b, dtype: tl.constexpr):
    """Two FP32 tensors rounded to BF16 and back; the same where dtype is FP32."""
    return numbers(two(a, b, dtype), dtype)


@triton.jit
def _larger(a, b):
    """Per half of two int32, the BF16 number of larger magnitude with any sign, NaN the smaller; no interpreter's."""
    return tl.inline_asm_elementwise(
        "max.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _largest(low, high, dtype: tl.constexpr):
    """FP32 [COLS, 1]: the largest magnitudes along the rows of two `two` [COLS, 32]."""
    if dtype == tl.bfloat16 and not INTERPRETED:  # two numbers an instruction
        v0, v1 = halves(tl.reduce(_larger(low, high), 1, _larger, keep_dims=True))
        return tl.maximum(tl.abs(v0), tl.abs(v1))
    else:
        v0, v1 = numbers(low, dtype)
        v2, v3 = numbers(high, dtype)
        most = tl.maximum(tl.maximum(magnitude(v0), magnitude(v1)), tl.maximum(magnitude(v2), magnitude(v3)))
        return tl.max(most, axis=1, keep_dims=True)


@triton.jit
def _settled(words, into_ptr, never):
    """The same words, spread over lanes as a store to into_ptr [COLS, 32] wants them.

    Triton keeps a value where it was made until it must move, here until the store. A load it cannot leave out, masked
    off at run time, moves it now.
    """
    if never:
        words = tl.load(into_ptr)
    return words


@triton.jit
def turn_codes(codes, into_ptr, never):
    """Codes [128 `turned_rows`, COLS] as int32 [COLS, 32]: word i of a column holds rows 4 i to 4 i + 3."""
    row0, row1, row2, row3 = _four_rows(codes.to(tl.uint8, bitcast=True))
    return _settled(tl.trans(_word(row0, row1, row2, row3)), into_ptr, never)


@triton.jit
def turn_values(x, into_ptr, never):
    """BF16 or FP32 [128 `turned_rows`, COLS] as `two`s [COLS, 32]: of rows 4 i and 4 i + 1, of 4 i + 2 and 4 i + 3."""
    row0, row1, row2, row3 = _four_rows(x)
    if x.dtype == tl.bfloat16:
        low = _settled(tl.trans(pair(row0, row1)), into_ptr, never)
        return low, _settled(tl.trans(pair(row2, row3)), into_ptr, never)
    else:
        return (tl.trans(row0), tl.trans(row1)), (tl.trans(row2), tl.trans(row3))


@triton.jit
def four(rows):
    """Numbers of 128 rows, [128], as four of [1, 32]: of rows 4 i, 4 i + 1, 4 i + 2, 4 i + 3."""
    even, odd = tl.split(tl.reshape(rows, (1, 32, 2, 2)))
    row0, row2 = tl.split(even)
    row1, row3 = tl.split(odd)
    return row0, row1, row2, row3


@triton.jit
def from_word(words):
    """The four FP32 numbers whose E4M3 codes are in an int32, the lowest first."""
    if INTERPRETED:
        return _code(words), _code(words >> 8), _code(words >> 16), _code(words >> 24)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high, h0, h1, h2, h3;
            .reg .b32 a, b;
            mov.b32 {low, high}, $4;
            cvt.rn.f16x2.e4m3x2 a, low;
            cvt.rn.f16x2.e4m3x2 b, high;
            mov.b32 {h0, h1}, a;
            mov.b32 {h2, h3}, b;
            cvt.f32.f16 $0, h0;
            cvt.f32.f16 $1, h1;
            cvt.f32.f16 $2, h2;
            cvt.f32.f16 $3, h3;
            }""",
            "=&f,=&f,=&f,=&f,r",
            [words],
            (tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def _code(word):
    return from_e4m3((word & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True))


@triton.jit
def to_word(v0, v1, v2, v3):
    """The E4M3 codes of four FP32 numbers in an int32, v0's lowest."""
    if INTERPRETED:
        return _word(_byte(v0), _byte(v1), _byte(v2), _byte(v3))
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
            }""",
            "=r,f,f,f,f",
            [v0, v1, v2, v3],
            tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _byte(x):
    return to_e4m3(x).to(tl.uint8, bitcast=True)


@triton.jit
def turn_numbers(x):
    """E4M3 codes of FP32 [128 `turned_rows`, COLS], turned as `turn_codes` does, where they lie until the store."""
    row0, row1, row2, row3 = _four_rows(x)
    return tl.trans(to_word(row0, row1, row2, row3))


@triton.jit
def column_words(words_ptr, row_block, cols, code_stride):
    """int32 pointers [COLS, 32]: where the words of a block of 128 rows lie in transposed codes [K, code_stride]."""
    return words_ptr + cols.to(tl.int64)[:, None] * (code_stride // 4) + (row_block * 32 + tl.arange(0, 32))[None, :]


@triton.jit
def store_columns(into_ptr, scales_ptr, low, high, row_block, cols, n_cols, dtype: tl.constexpr, POW2: tl.constexpr):
    """Quantise along the rows `two`s [COLS, 32], rows as `turn_values` gives them; into_ptr: `column_words`."""
    scale, inverse = scale_of(_largest(low, high, dtype), POW2, E4M3_MAX)
    v0, v1 = numbers(low, dtype)
    v2, v3 = numbers(high, dtype)
    inside = cols < n_cols
    words = to_word(v0 * inverse, v1 * inverse, v2 * inverse, v3 * inverse)
    tl.store(into_ptr, words, mask=inside[:, None])
    tl.store(scales_ptr + row_block * n_cols + cols, tl.reshape(scale, (scale.shape[0],)), mask=inside)
