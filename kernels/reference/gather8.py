"""FP8 rows into expert order, and from row blocks to column blocks: plain torch."""

import torch
from torch import Tensor

from deepv3.kernels.reference.quantise import E4M3, dequantise_rows, quantise_columns, row_scales

PAD_SCALE = 2.0**-88  # of a row that is not there: the power of two above 2^-80 / 448


def permute_fp8(codes: Tensor, scales: Tensor, token_of_slot: Tensor) -> tuple[Tensor, Tensor]:
    """`permute` of quantised rows: row r is row token_of_slot[r]; where that is -1, codes 0 and scale 2^-88.

    codes: [T, K] E4M3; scales: [T, Kb]; token_of_slot: [R] int32. Returns codes [R, K] and scales [R, Kb].
    """
    missing = token_of_slot < 0
    tokens = token_of_slot.clamp(min=0)
    taken = codes.view(torch.uint8).index_select(0, tokens).masked_fill_(missing[:, None], 0)
    spread = row_scales(token_of_slot.shape[0], codes.shape[1], codes.device)
    spread.copy_(scales.index_select(0, tokens).masked_fill(missing[:, None], PAD_SCALE))
    return taken.view(E4M3), spread


def requantise(
    codes: Tensor, scales: Tensor, token_of_slot: Tensor | None = None, pow2: bool = True
) -> tuple[Tensor, Tensor]:
    """Row-quantised values to column blocks, transposed, for a weight gradient; with token_of_slot gathered first.

    codes: [T, K] E4M3; scales: [T, Kb]; token_of_slot: [R] int32, -1 for a zero row. Returns column codes [K, Rr] and
    scales [Rr / 128, K], R = T without token_of_slot. With power-of-two scales on both sides nothing is rounded that
    stays within E4M3's normal range (V3 3.3.3).
    """
    if token_of_slot is not None:
        codes, scales = permute_fp8(codes, scales, token_of_slot)
    return quantise_columns(dequantise_rows(codes, scales, torch.float32), pow2)
