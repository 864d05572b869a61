"""Scales without division: the FMAs of `casts` give the correctly rounded quotients.

Here with a model of them, on a GPU with the instructions themselves and every amax.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from deepv3.kernels import casts


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of FP32, rounded once: summed in FP64 to odd, so that the second rounding cannot err."""
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    back = total - product
    rest = (product - (total - back)) + (addend - back)
    even = (total.view(np.int64) & 1) == 0
    towards = np.where(rest > 0, np.inf, -np.inf)
    return np.where((rest != 0) & even, np.nextafter(total, towards), total).astype(np.float32)


@pytest.mark.parametrize("ulps", [-2, -1, 0, 1, 2])
def test_quotients_are_rounded_correctly_whatever_reciprocal_within_two_ulps_the_gpu_guesses(ulps):
    """All exponents behave alike, as nothing is denormal: one of them, every 31st mantissa and the ends."""
    bits = np.append(np.arange(0, 1 << 23, 31, dtype=np.int32), [1, (1 << 23) - 1]).astype(np.int32) | (127 << 23)
    amax = bits.view(np.float32)
    largest, share = np.full_like(amax, 448), np.full_like(amax, np.float32(1 / 448))
    scale = amax * share
    assert (fma(fma(-scale, largest, amax), share, scale) == amax / largest).all()

    eighth, part, one = largest / 8, amax / 8, np.ones_like(amax)
    guess = ((one / part).view(np.int32) + np.int32(ulps)).view(np.float32)
    guess = fma(fma(-guess, part, one), guess, guess)
    inverse = guess * eighth
    assert (fma(fma(-inverse, part, eighth), guess, inverse) == largest / amax).all()


def test_the_model_rounds_once():
    """(1 + 2^-23)^2 is 1 + 2^-22 + 2^-46: a product rounded alone loses the last term."""
    x = np.array([1 + 2.0**-23], dtype=np.float32)
    assert fma(x, x, -(x * x))[0] == 2.0**-46


@triton.jit
def _differing_kernel(counts_ptr, first, SIZE: tl.constexpr):
    bits = first + tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    amax = bits.to(tl.float32, bitcast=True)
    largest = tl.full((SIZE,), 448.0, tl.float32)
    scale, inverse = casts.scale_of(amax, False, casts.E4M3_MAX)
    wrong = (scale != tl.div_rn(amax, largest)) | (inverse != tl.div_rn(largest, amax))
    tl.store(counts_ptr + tl.program_id(0), tl.sum(wrong.to(tl.int32), axis=0))


@pytest.mark.gpu
def test_scales_of_every_amax_are_those_of_division():
    first, infinity, size = 0x17800000, 0x7F800000, 4096  # 2^-80; bits of FP32
    counts = torch.empty((infinity - first) // size, dtype=torch.int32, device="cuda")
    _differing_kernel[(len(counts),)](counts, first, SIZE=size)
    assert int(counts.sum()) == 0
    end = torch.empty(1, dtype=torch.int32, device="cuda")
    _differing_kernel[(1,)](end, infinity, SIZE=1)
    assert int(end) == 0
