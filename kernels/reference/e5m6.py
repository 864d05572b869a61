"""E5M6: 12-bit floats for the attention output kept for backward (V3 3.3.3), eight values in three words.

Sign, 5 exponent bits of bias 15, 6 mantissa bits; the largest exponent is Inf and NaN, so 65024 is the largest value;
subnormals down to 2^-20. Scales are powers of two per 1x128 block, laid out as those of `quantise_rows`. Plain torch.

Packed words: with v_j the 12 bits of value j of eight, their 96 bits v_0 + v_1 2^12 + ... are cut into three words of
32, low first. A block of 128 values has 16 such triples, stored as 16 first words, 16 second, 16 third.
"""

import torch
from torch import Tensor

from deepv3.kernels.reference.quantise import BLOCK, magnitude, row_scales, scale_of

E5M6_MAX = 65024.0
INFINITE, NAN = 0x7C0, 0x7E0


def e5m6_bits(x: Tensor) -> Tensor:
    """int32 with the 12 bits of the E5M6 nearest to FP32 x: ties to even, saturating at 65024; NaN is 0x7E0."""
    bits = x.view(torch.int32)
    sign, size = (bits >> 31) & 1, bits & 0x7FFFFFFF
    # Normal: 17 mantissa bits go, half of the last one is added (less one where it is even), the bias changes by 112.
    normal = (size - (112 << 23) + 0xFFFF + ((size >> 17) & 1)) >> 17
    # Subnormal: adding 2^3 to a float below 2^-14 leaves multiples of 2^-20, rounded to even, in its last bits.
    small = (size.view(torch.float32) + 8.0).view(torch.int32) - 0x41000000
    code = torch.where(size < (113 << 23), small, normal.clamp(max=INFINITE - 1))
    code = torch.where(size > 0x7F800000, NAN, code)
    return torch.where(code == NAN, code, code | (sign << 11))


def e5m6_values(bits: Tensor) -> Tensor:
    """FP32 value of 12-bit codes (int32)."""
    exponent, mantissa = (bits >> 6) & 31, bits & 63
    normal = ((exponent + 112 << 23) | (mantissa << 17)).view(torch.float32)
    value = torch.where(exponent == 0, mantissa.float() * 2.0**-20, normal)
    value = torch.where(exponent == 31, torch.where(mantissa == 0, float("inf"), float("nan")), value)
    return torch.where((bits >> 11) & 1 == 1, -value, value)


def e5m6_pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] BF16 or FP32, K a multiple of 128. Returns words [M, 3 K / 8] int32 and scales [M, K / 128] FP32."""
    m, k = x.shape
    blocks = x.float().view(m, k // BLOCK, BLOCK)
    scale, inverse = scale_of(magnitude(blocks).amax(2, keepdim=True), True, E5M6_MAX)
    values = e5m6_bits(blocks * inverse).view(m, k // BLOCK, 16, 8).long()
    v = values.unbind(3)
    words = (
        v[0] | v[1] << 12 | (v[2] & 0xFF) << 24,
        v[2] >> 8 | v[3] << 4 | v[4] << 16 | (v[5] & 0xF) << 28,
        v[5] >> 4 | v[6] << 8 | v[7] << 20,
    )
    packed = torch.stack(words, dim=2)  # unsigned values in 64 bits; the wrap to int32 keeps the 32 bits
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()
    scales = row_scales(m, k, x.device)
    scales.copy_(scale.squeeze(2))
    return packed.view(m, k * 3 // 8), scales


def e5m6_unpack(words: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The values [M, K] that `e5m6_pack` kept, in `dtype`. BF16 holds every E5M6 number exactly."""
    m, k = words.shape[0], words.shape[1] * 8 // 3
    a, b, c = (words.view(m, k // BLOCK, 3, 16).long() & 0xFFFFFFFF).unbind(2)
    v = (
        a, a >> 12, a >> 24 | b << 8, b >> 4, b >> 16, b >> 28 | c << 4, c >> 8, c >> 20,
    )  # fmt: skip
    values = e5m6_values((torch.stack(v, dim=3) & 0xFFF).int()).view(m, k // BLOCK, BLOCK)
    return (values * scales[:, :, None]).view(m, k).to(dtype)
