"""SwiGLU with quantisation at its ends: plain torch. Each function equals the named ones in a row, bit for bit."""

import torch
from torch import Tensor

from deepv3.kernels.reference.activation import swiglu, swiglu_backward
from deepv3.kernels.reference.quantise import dequantise_rows, quantise_both, quantise_columns, quantise_rows


def swiglu_fp8(
    h: Tensor, weight: Tensor | None = None, pow2: bool = False, cache: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`quantise_rows(swiglu(h, weight), pow2)`, and h itself in FP8 for the backward (V3 3.3.3).

    h: [R, 2I] BF16 or FP32, I a multiple of 128; weight: [R] FP32. Returns codes [R, I], scales [R, I / 128], and with
    `cache` codes [R, 2I] and power-of-two scales [R, 2I / 128] of h, else None twice.
    """
    codes, scales = quantise_rows(swiglu(h, weight), pow2)
    kept = quantise_rows(h, True) if cache else (None, None)
    return codes, scales, *kept


def swiglu_fp8_backward(
    dy: Tensor, h_codes: Tensor, h_scales: Tensor, weight: Tensor | None = None, pow2: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """`swiglu_backward` of the cached h, quantised for the four GEMMs that follow.

    dy: [R, I] BF16 or FP32; h_codes: [R, 2I] E4M3; h_scales: [R, 2I / 128]; weight: [R] FP32. Returns
    1. dh in rows: codes [R, 2I], scales [R, 2I / 128] (Dgrad of the gate and up matrices);
    2. dh in columns: codes [2I, Rr], scales [Rr / 128, 2I] (their Wgrad);
    3. the output again, in columns: codes [I, Rr], scales [Rr / 128, I] (Wgrad of the down matrix);
    4. dweight [R] FP32, None without weight.
    dh and the output are rounded to dy's format before they are quantised.
    """
    h = dequantise_rows(h_codes, h_scales, torch.float32)
    dh, dweight, y = swiglu_backward(dy, h, weight, want_output=True)
    assert y is not None
    return *quantise_both(dh.to(dy.dtype), pow2), *quantise_columns(y.to(dy.dtype), pow2), dweight
