"""The FP8 GEMMs of a linear layer (V3 3.3.2), FP32 accumulation: plain torch, on dequantised operands.

    Fprop  y [M, N]  = x [M, K]  @ w [N, K]^T    x in rows, w in blocks
    Dgrad  dx [M, K] = dy [M, N] @ w [N, K]      dy in rows, w's transposed copy in blocks: the same function
    Wgrad  dw [N, K] = dy [R, N]^T @ x [R, K]    dy and x in columns, R a multiple of 128

Formats and scale layouts are those of `quantise`. offsets [G] int32 are cumulative ends, multiples of 128: group g owns
rows offsets[g-1] .. offsets[g], pad rows included (codes 0). Kernels sum 128 products on the tensor cores, then scale
and add them in FP32.
"""

import torch
from torch import Tensor

from deepv3.kernels.reference.gemm import _groups
from deepv3.kernels.reference.quantise import dequantise_blocks, dequantise_columns, dequantise_rows


def fp8_mm(
    codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """[M, N] = codes [M, K] @ weight [N, K]^T in `dtype`. scales: [M, Kb]; weight_scales: [Nb, Kb]."""
    x = dequantise_rows(codes, scales, torch.float32)
    return (x @ dequantise_blocks(weight, weight_scales).t()).to(dtype)


def fp8_wgrad_(
    grad: Tensor, dy_codes: Tensor, dy_scales: Tensor, x_codes: Tensor, x_scales: Tensor, accumulate: bool
) -> None:
    """grad[N, K] FP32 (+)= dy_codes [N, R] @ x_codes [K, R]^T. Scales: [R / 128, N] and [R / 128, K]."""
    dy, x = dequantise_columns(dy_codes, dy_scales), dequantise_columns(x_codes, x_scales)
    if accumulate:
        grad.addmm_(dy, x.t())
    else:
        torch.mm(dy, x.t(), out=grad)


def grouped_fp8_mm(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    offsets: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """[R, N] = codes [R, K] @ weight[g][N, K]^T, the group by row. weight: [G, N, K]; weight_scales: [G, Nb, Kb].

    Rows from offsets[G-1] on belong to nobody: their results are zeros.
    """
    out = torch.zeros(codes.shape[0], weight.shape[1], dtype=dtype, device=codes.device)
    for g, start, end in _groups(offsets):
        out[start:end] = fp8_mm(codes[start:end], scales[start:end], weight[g], weight_scales[g], dtype)
    return out


def grouped_fp8_wgrad_(
    grad: Tensor,
    dy_codes: Tensor,
    dy_scales: Tensor,
    x_codes: Tensor,
    x_scales: Tensor,
    offsets: Tensor,
    accumulate: bool,
) -> None:
    """grad[g][N, K] FP32 (+)= dy_codes[:, rows of g] @ x_codes[:, rows of g]^T; no rows store 0 or add nothing."""
    for g, start, end in _groups(offsets):
        rows, blocks = slice(start, end), slice(start // 128, end // 128)
        fp8_wgrad_(grad[g], dy_codes[:, rows], dy_scales[blocks], x_codes[:, rows], x_scales[blocks], accumulate)
