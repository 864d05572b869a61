"""What other libraries are handed: the layouts cuBLAS's block-scaled product asks for, and what is refused for it."""

import pytest
import torch
import torch.nn.functional as F
from inputs import Maker
from inputs8 import make

from deepv3.kernels import vendors


@pytest.fixture
def handed(monkeypatch) -> list:
    """Operands and scales of the calls to `F.scaled_mm`, which needs a GPU."""
    calls = []

    def scaled_mm(a, b, a_scales, a_kind, b_scales, b_kind, output_dtype, **kwargs):
        calls.append((a, b, a_scales, b_scales))
        return torch.zeros(a.shape[0], b.shape[1], dtype=output_dtype)

    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    return calls


@pytest.mark.parametrize(("n", "k"), [(128, 128), (272, 1408), (16, 512)])
def test_cublas_gets_block_scales_by_columns_filled_up_to_fours(handed, n, k):
    codes, scales, weight, weight_scales, _ = make("fp8_mm", Maker(1, torch.float32), rows=64, n=n, k=k)
    vendors.cublas_mm(codes, scales, weight, weight_scales, None, torch.bfloat16)
    ((a, b, a_scales, b_scales),) = handed
    blocks, filled = -(-k // 128), -(-k // 512) * 4
    assert a.shape == (64, k) and b.shape == (k, n) and a_scales.shape == (64, blocks)
    assert b_scales.shape == (filled, -(-n // 128)) and b_scales.stride() == (1, filled)
    assert torch.equal(b_scales[:blocks], weight_scales.t())


def test_cublas_gets_the_scales_of_a_gradient_by_rows_of_the_result(handed):
    grad, *operands, _ = make("fp8_wgrad_", Maker(2, torch.float32), rows=64, n=32, k=48)
    vendors.cublas_wgrad(grad, *operands, None, False)
    ((_, _, a_scales, b_scales),) = handed
    assert a_scales.shape == (32, 1) and b_scales.shape == (48, 1) and (grad == 0).all()


def test_a_short_last_block_is_refused_for_cublas():
    *operands, _ = make("fp8_mm", Maker(3, torch.float32), rows=64, n=32, k=144)
    with pytest.raises(ValueError, match="144 products, needed a multiple of 128"):
        vendors.cublas_mm(*operands, None, torch.bfloat16)
