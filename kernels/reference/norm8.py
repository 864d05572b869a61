"""RMSNorm with quantisation at its end: plain torch. Each function equals the named ones in a row, bit for bit."""

from torch import Tensor

from deepv3.kernels.reference.norm import rmsnorm, wide
from deepv3.kernels.reference.quantise import quantise_columns, quantise_rows


def rmsnorm_fp8(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, pow2: bool = False, output: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """`rmsnorm`, then `quantise_rows` of its result.

    x, residual: [T, D]; weight: [D]. Returns codes [T, D], scales [T, Db], rstd [T] FP32, summed [T, D], and y [T, D]
    itself if `output` (the router reads it unquantised), else None. Backward is `rmsnorm_backward`.
    """
    y, rstd, summed = rmsnorm(x, weight, eps, residual)
    return *quantise_rows(y, pow2), rstd, summed, y if output else None


def rmsnorm_fp8_columns(x: Tensor, weight: Tensor, rstd: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """`quantise_columns` of the norm's result, made again from what `rmsnorm` returned as summed and rstd.

    For the weight gradient of the linear map behind a norm. Returns column codes [D, Tr] and scales [Tr / 128, D].
    """
    return quantise_columns((wide(x) * rstd[:, None] * wide(weight)).to(x.dtype), pow2)
