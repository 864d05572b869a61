"""Inputs of the FP8 kernels by name and shape, hard ones among them, and comparison of bits with the references.

`make(name, maker, **shape)` returns the positional arguments of deepv3.kernels.<name>. References make the operands, so
that a kernel is never judged by its own quantiser.
"""

from typing import Any

import torch
from inputs import Maker, kernel
from torch import Tensor

import deepv3.kernels as kernels
from deepv3.kernels.reference import quantise as formats


def quantise_rows(m: Maker, rows: int, width: int, pow2: bool = False) -> tuple:
    return m.normal(rows, width) * 3, pow2


quantise_columns = quantise_both = quantise_rows


def quantise_blocks(m: Maker, n: int, k: int, groups: int | None = None, pow2: bool = False) -> tuple:
    return m.normal(n, k) if groups is None else m.normal(groups, n, k), pow2


def rows8(m: Maker, rows: int, width: int, pow2: bool = True) -> tuple[Tensor, Tensor]:
    """Row-quantised random values."""
    return formats.quantise_rows(m.normal(rows, width) * 3, pow2)


def dequantise_rows(m: Maker, rows: int, width: int) -> tuple:
    return *rows8(m, rows, width), m.dtype


def slots(m: Maker, tokens: int, rows: int) -> Tensor:
    """Random tokens, a quarter of them none."""
    chosen = m.integers(tokens, rows)
    return chosen.where(m.fp32(rows) > -0.6, -1).int()


def permute_fp8(m: Maker, rows: int, width: int, taken: int) -> tuple:
    return *rows8(m, rows, width), slots(m, rows, taken)


def requantise(m: Maker, rows: int, width: int, taken: int | None = None, pow2: bool = True) -> tuple:
    return *rows8(m, rows, width, pow2), None if taken is None else slots(m, rows, taken), pow2


def fp8_mm(m: Maker, rows: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> tuple:
    return *rows8(m, rows, k), *formats.quantise_blocks(m.normal(n, k))[:2], dtype


def fp8_wgrad_(m: Maker, rows: int, n: int, k: int, accumulate: bool = False) -> tuple:
    dy, x = formats.quantise_columns(m.normal(rows, n)), formats.quantise_columns(m.normal(rows, k))
    return m.fp32(n, k), *dy, *x, accumulate


def grouped_fp8_mm(m: Maker, ends: list[int], rows: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> tuple:
    weight = formats.quantise_blocks(m.normal(len(ends), n, k))[:2]
    return *rows8(m, rows, k), *weight, torch.tensor(ends, dtype=torch.int32, device=m.device), dtype


def grouped_fp8_wgrad_(m: Maker, ends: list[int], rows: int, n: int, k: int, accumulate: bool = False) -> tuple:
    _, *operands, _ = fp8_wgrad_(m, rows, n, k)
    offsets = torch.tensor(ends, dtype=torch.int32, device=m.device)
    return m.fp32(len(ends), n, k), *operands, offsets, accumulate


def swiglu_fp8(m: Maker, rows: int, width: int, weight: bool = True, pow2: bool = False, cache: bool = True) -> tuple:
    return m.normal(rows, 2 * width), m.fp32(rows) if weight else None, pow2, cache


def swiglu_fp8_backward(m: Maker, rows: int, width: int, weight: bool = True, pow2: bool = False) -> tuple:
    return m.normal(rows, width), *rows8(m, rows, 2 * width), m.fp32(rows) if weight else None, pow2


def rmsnorm_fp8(
    m: Maker, tokens: int, width: int, residual: bool = True, pow2: bool = False, output: bool = False
) -> tuple:
    added = m.normal(tokens, width) if residual else None
    return m.normal(tokens, width), m.normal(width), 1e-6, added, pow2, output


def rmsnorm_fp8_columns(m: Maker, tokens: int, width: int, pow2: bool = False) -> tuple:
    x = m.normal(tokens, width)
    return x, m.normal(width), torch.rsqrt(x.float().square().mean(-1) + 1e-6), pow2


def e5m6_pack(m: Maker, rows: int, width: int) -> tuple:
    return (m.normal(rows, width) * 3,)


def e5m6_unpack(m: Maker, rows: int, width: int) -> tuple:
    return *kernels.e5m6_pack(m.normal(rows, width) * 3), m.dtype


def make(name: str, maker: Maker, **shape: Any) -> tuple:
    """Positional arguments of the kernel `name`."""
    return globals()[name](maker, **shape)


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers, so that NaN and the sign of zero count."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def tensors(result: Any) -> list[Tensor]:
    return [value for value in (result if isinstance(result, tuple) else (result,)) if value is not None]


def assert_same(ours: Any, theirs: Any, name: str) -> None:
    """Equal shapes, formats and bits; strides too where they matter."""
    pairs = list(zip(tensors(ours), tensors(theirs), strict=True))
    assert pairs
    for place, (a, b) in enumerate(pairs):
        assert a.shape == b.shape and a.dtype == b.dtype, f"{name}: result {place} is {a.shape}, not {b.shape}"
        assert [s for s, size in zip(a.stride(), a.shape) if size > 1] == [
            s for s, size in zip(b.stride(), b.shape) if size > 1
        ], f"{name}: result {place} has strides {a.stride()}, not {b.stride()}"
        wrong = int((bits(a) != bits(b)).sum())
        assert wrong == 0, f"{name}: {wrong} of {a.numel()} elements of result {place} differ"


def same_bits(name: str, *args: Any) -> None:
    """The kernel gives the bits of its reference."""
    assert_same(kernel(name)(*args), getattr(kernels, name).__wrapped__(*args), name)


def hard_values(device: str = "cpu") -> dict[str, Tensor]:
    """FP32 matrices [130, 272] that BF16 holds, each hard in its own way; every one has an ordinary rest."""
    m = Maker(0, torch.bfloat16, device)

    def ordinary() -> Tensor:
        return m.normal(130, 272).float()

    cases = {"zeros": torch.zeros(130, 272, device=device)}
    cases["outlier in every block"] = ordinary()
    cases["outlier in every block"][::32, ::32] = 9984.0
    cases["outlier in another row"] = ordinary()
    cases["outlier in another row"][7] = 3e4
    cases["denormals"] = ordinary()
    cases["denormals"][:, 128:] = 2.0**-133
    cases["negative zeros"] = ordinary()
    cases["negative zeros"][3:50, :140] = -0.0
    cases["largest BF16"] = ordinary()
    cases["largest BF16"][5, 5] = torch.finfo(torch.bfloat16).max
    cases["NaN"] = ordinary()
    cases["NaN"][6, 131] = float("nan")
    cases["Inf"] = ordinary()
    cases["Inf"][8, 20], cases["Inf"][9, 200] = float("inf"), -float("inf")
    ties = torch.tensor([448.0, 1.0625, 1.1875, -17.0, 19.0, 2.0**-10, 3 * 2.0**-10, -(2.0**-11)], device=device)
    cases["ties"] = ties.repeat(130, 34)
    powers = torch.tensor([2.0**-9, 1.0, 448.0, 2.0**20], device=device).repeat(130, 68)
    cases["amax a power of two times 448"] = powers
    cases["amax a step above a power of two"] = ordinary().clamp(-1, 1)
    cases["amax a step above a power of two"][:, 3] = 1.0 + 2.0**-7
    cases["below the smallest amax"] = ordinary() * 2.0**-20
    return cases
