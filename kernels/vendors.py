"""FP8 GEMMs of other libraries, behind the signatures of `gemm8.BACKENDS`: cuBLAS through torch, and DeepGEMM.

Both read our layouts without a copy. What a library does not take it refuses itself, and `backends` leaves it out; only
what would be computed wrongly is refused here.
"""

import functools
import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepv3.kernels.reference.quantise import round_up

ROWS_OF_128 = (1, 1, 128)  # DeepGEMM's name for one scale per 1 x 128 in both operands


def _whole_blocks(codes: Tensor) -> None:
    if codes.shape[1] % 128:
        raise ValueError(f"{codes.shape[1]} products, needed a multiple of 128")


def _scaled_mm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, b_blocks: Any, dtype: torch.dtype) -> Tensor:
    _whole_blocks(a)
    return F.scaled_mm(
        a,
        b.t(),
        a_scales,
        F.ScalingType.BlockWise1x128,
        b_scales,
        b_blocks,
        swizzle_a=F.SwizzleType.NO_SWIZZLE,
        swizzle_b=F.SwizzleType.NO_SWIZZLE,
        output_dtype=dtype,
    )


def cublas_mm(
    codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, offsets: None, dtype: torch.dtype
) -> Tensor:
    """Dense only. Its 128 x 128 scales are handed over with the reduced dimension first, filling included."""
    blocks, filled = weight_scales.shape[0], round_up(weight_scales.shape[1], 4)
    whole = weight_scales.as_strided((blocks, filled), (weight_scales.stride(0), 1))
    return _scaled_mm(codes, scales, weight, whole.t(), F.ScalingType.BlockWise128x128, dtype)


def cublas_wgrad(
    grad: Tensor,
    dy_codes: Tensor,
    dy_scales: Tensor,
    x_codes: Tensor,
    x_scales: Tensor,
    offsets: None,
    accumulate: bool,
) -> None:
    """Dense only, with one more pass over the gradient: it cannot add to its output."""
    product = _scaled_mm(dy_codes, dy_scales.t(), x_codes, x_scales.t(), F.ScalingType.BlockWise1x128, torch.float32)
    if accumulate:
        grad.add_(product)
    else:
        grad.copy_(product)


def deepgemm_installed() -> bool:
    return importlib.util.find_spec("deep_gemm") is not None


@functools.cache
def _deepgemm() -> Any:
    return importlib.import_module("deep_gemm")


def deepgemm_mm(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    offsets: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Dense, and grouped with the group of every row made from the offsets on the device."""
    _whole_blocks(codes)
    if dtype != torch.bfloat16:
        raise TypeError(f"its result is BF16, asked for {dtype}")
    if offsets is None:
        out = torch.empty(codes.shape[0], weight.shape[0], dtype=dtype, device=codes.device)
        _deepgemm().fp8_gemm_nt((codes, scales), (weight, weight_scales), out)
        return out
    rows = torch.arange(codes.shape[0], dtype=torch.int32, device=codes.device)
    group = torch.searchsorted(offsets, rows, right=True, out_int32=True)
    out = torch.zeros(codes.shape[0], weight.shape[1], dtype=dtype, device=codes.device)  # rows of nobody stay so
    group = group.masked_fill(group == weight.shape[0], -1)
    _deepgemm().m_grouped_fp8_gemm_nt_contiguous((codes, scales), (weight, weight_scales), out, group)
    return out


def deepgemm_wgrad(
    grad: Tensor,
    dy_codes: Tensor,
    dy_scales: Tensor,
    x_codes: Tensor,
    x_scales: Tensor,
    offsets: None,
    accumulate: bool,
) -> None:
    """Dense only: its grouped form wants the groups' sizes on the host. It adds; what is stored is added to zeros."""
    a, b = (dy_codes, dy_scales.t()), (x_codes, x_scales.t())
    if not accumulate:
        grad.zero_()
    _deepgemm().fp8_gemm_nt(a, b, grad, c=grad, recipe=ROWS_OF_128)
