"""FP8 arithmetic written down once more, plainly and in FP64: quantise, dequantise, multiply. And the bounds of all
tests of the recipe. Nothing here is taken from the code under test.
"""

import torch
from torch import Tensor

# Relative error norms. The bits of FP8 operands are exact; what is left is the order and format of the sums.
BOUNDS = {
    torch.bfloat16: 2e-3,  # result rounded to BF16, against FP64 of the dequantised operands
    torch.float32: 1e-6,  # weight gradients, the same
    "linear": 4e-2,  # an FP8 product against the BF16 one, normal data: 2^-4 / sqrt(12), twice
    "layer": 6e-2,  # output of one layer against the BF16 layer's
}


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, norms over all elements."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def through_fp8(x: Tensor, high: int, wide: int, pow2: bool = False) -> Tensor:
    """x [M, K] after E4M3 with one scale per block of high x wide, FP64; ragged blocks are blocks too."""
    out = torch.empty_like(x, dtype=torch.float64)
    for top in range(0, x.shape[0], high):
        for left in range(0, x.shape[1], wide):
            where = slice(top, top + high), slice(left, left + wide)
            block = x[where].float()
            amax = block.abs().max().clamp_min(2.0**-80)
            scale, inverse = amax / torch.tensor(448.0), torch.tensor(448.0) / amax
            if pow2:
                scale = torch.exp2(torch.ceil(torch.log2(scale.double()))).float()
                inverse = 1 / scale
            codes = (block * inverse).clamp(-448, 448).to(torch.float8_e4m3fn)
            out[where] = codes.double() * scale.double()
    return out


def rows(x: Tensor, pow2: bool = False) -> Tensor:
    return through_fp8(x, 1, 128, pow2)


def columns(x: Tensor, pow2: bool = False) -> Tensor:
    return through_fp8(x, 128, 1, pow2)


def squares(x: Tensor) -> Tensor:
    """A weight, or a gradient by the wrong recipe."""
    return through_fp8(x, 128, 128)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).bfloat16()
