"""The attention output kept in 12 bits, E5M6 (V3 3.3.3): once, for attention's backward and for the weight gradient of
the output projection. It is unpacked for each, so that a delayed weight gradient holds 1.5 bytes a value.
"""

import torch
from torch import Tensor

import deepv3.kernels as kernels
from deepv3.kernels.reference.quantise import BLOCK
from deepv3.precision.formats import TILES_POW2, Columns, columns_of
from deepv3.precision.saved import Stored


class Packed:
    """Holds one output [T, W], W a multiple of 128 (`fits`)."""

    def __init__(self, out: Tensor) -> None:
        self._words, self._scales = kernels.e5m6_pack(out.detach())
        self._dtype = out.dtype

    @staticmethod
    def fits(width: int) -> bool:
        return width % BLOCK == 0

    def __call__(self) -> Tensor:
        """The output [T, W] as it was kept."""
        return kernels.e5m6_unpack(self._words, self._scales, self._dtype)

    def columns(self) -> Stored:
        """Its column codes; power-of-two scales on both sides."""
        return Stored(_columns, (self._words, self._scales))


def _columns(words: Tensor, scales: Tensor) -> Columns:
    return columns_of(kernels.e5m6_unpack(words, scales, torch.bfloat16), TILES_POW2)
