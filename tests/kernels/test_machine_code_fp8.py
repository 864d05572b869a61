"""The FP8 kernels build for sm_90 at the shapes of V3 and mini, without spills and with what makes them fast.

No GPU is needed, see `sass`.
"""

import pytest
import torch
from inputs import kernel
from sass import Built, building

from deepv3.kernels import triton8
from deepv3.kernels.reference.quantise import row_scales

SHARED_LIMIT = 232_448
VECTOR_LOADS = r"\bLDG(STS)?\.E(\.\w+)*\.128"
VECTOR_STORES = r"\bSTG\.E(\.\w+)*\.128"
META = torch.device("meta")
T, R = 4096, 32768


def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def bf16(*shape: int) -> torch.Tensor:
    return empty(torch.bfloat16, *shape)


def fp32(*shape: int) -> torch.Tensor:
    return empty(torch.float32, *shape)


def int32(*shape: int) -> torch.Tensor:
    return empty(torch.int32, *shape)


def codes(*shape: int) -> torch.Tensor:
    return empty(torch.float8_e4m3fn, *shape)


def rows8(m: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return codes(m, k), row_scales(m, k, META)


def build(name: str, *args) -> list[Built]:
    with building() as built:
        kernel(name)(*args)
    return built


# (kernel, arguments, most registers of a lane: up to 128 sixteen warps share a processor, up to 168 twelve)
STREAMING = {
    "quantise_rows": ("quantise_rows", (bf16(T, 7168),), 64),
    "quantise_columns": ("quantise_columns", (bf16(T, 7168),), 128),
    "quantise_both": ("quantise_both", (bf16(T, 7168),), 128),
    "quantise_blocks": ("quantise_blocks", (bf16(4, 4096, 7168),), 128),
    "quantise_blocks FP32": ("quantise_blocks", (fp32(4096, 7168),), 128),
    "permute_fp8": ("permute_fp8", (*rows8(T, 7168), int32(R)), 64),
    "requantise": ("requantise", rows8(T, 7168), 168),
    "requantise gathered": ("requantise", (*rows8(T, 7168), int32(R)), 64),
    "rmsnorm_fp8 V3": ("rmsnorm_fp8", (bf16(T, 7168), bf16(7168), 1e-6, bf16(T, 7168), True, True), 64),
    "rmsnorm_fp8 mini": ("rmsnorm_fp8", (bf16(T, 2048), bf16(2048), 1e-6, bf16(T, 2048)), 64),
    "rmsnorm_fp8_columns": ("rmsnorm_fp8_columns", (bf16(T, 7168), bf16(7168), fp32(T)), 128),
    "swiglu_fp8": ("swiglu_fp8", (bf16(R, 4096), fp32(R)), 128),
    "swiglu_fp8_backward": ("swiglu_fp8_backward", (bf16(R, 2048), *rows8(R, 4096), fp32(R)), 128),
    "e5m6_pack": ("e5m6_pack", (bf16(T, 16384),), 64),
    "e5m6_unpack": ("e5m6_unpack", (int32(T, 6144), row_scales(T, 16384, META)), 64),
}


@pytest.mark.parametrize("case", STREAMING)
def test_streaming_kernels_move_16_bytes_at_a_time_and_do_not_spill(case):
    name, args, registers = STREAMING[case]
    for built in build(name, *args):
        assert built.spills == 0
        assert built.registers <= registers
        assert built.count(VECTOR_LOADS) >= 2 and built.count(VECTOR_STORES) >= 1
        assert not built.count(r"\b(ST|LD)S\.U8"), "codes are turned in words, not byte by byte"
        if name not in ("permute_fp8", "e5m6_pack", "e5m6_unpack"):
            assert built.count(r"F2FP\.SATFINITE\.E4M3\.F32\.PACK_AB") >= 8
        assert not built.count("FCHK"), "scales need no division with its branches"


# Instructions of a program's lane for each of its values: what bounds these kernels once their loads are wide.
TURNED = {
    "quantise_columns": (64, 11),
    "quantise_both": (64, 17),
    "requantise": (128, 10),
    "requantise gathered": (64, 13),
    "rmsnorm_fp8_columns": (64, 16),
    "swiglu_fp8_backward": (32, 53),
}


@pytest.mark.parametrize("case", TURNED)
def test_tiles_are_turned_before_they_are_reduced(case):
    name, args, _ = STREAMING[case]
    values, most = TURNED[case]
    built = build(name, *args)[-1]
    assert built.count(r"/\*[0-9a-f]{4,5}\*/ +(@!?U?P\w+ )?[A-Z]") <= most * values
    # A lane has 16 rows of a column: three exchanges a column, not two for each of its 8 and a round of all warps.
    assert built.count("SHFL") <= (24 if case in ("quantise_both", "requantise") else 18)
    assert not built.count(r"F2F\.BF16"), "numbers are rounded in pairs"


@pytest.mark.parametrize(("make", "width"), [(bf16, 7168), (bf16, 1408), (bf16, 128), (fp32, 2048)])
@pytest.mark.parametrize("residual", [False, True])
def test_a_norm_adds_its_squares_in_the_same_order_with_quantisation_as_without(residual, make, width):
    """Equal bits by construction: the sum over a row is distributed over the lanes in the same way."""
    added = make(T, width) if residual else None
    args = make(T, width), make(width), 1e-6, added
    (plain,) = build("rmsnorm", *args)
    for output in (False, True):
        (fused,) = build("rmsnorm_fp8", *args, True, output)
        assert fused.reductions[0] == plain.reductions[0]


# Operands of the GEMMs at R rows and 4 experts: product and weight gradient of the gate and up matrices.
GROUPS, N, K = 4, 4096, 7168
PRODUCT = (bf16(R, N), *rows8(R, K), codes(GROUPS, N, K), fp32(GROUPS, 32, 56), int32(GROUPS))
DENSE = (bf16(T, 2112), *rows8(T, K), codes(2112, K), fp32(17, 56), None)
GRADIENT = (fp32(GROUPS, N, K), codes(N, R), fp32(R // 128, N), codes(K, R), fp32(R // 128, K), int32(GROUPS))


def lint_product(built: Built) -> None:
    assert built.spills == 0
    assert built.shared <= SHARED_LIMIT
    assert built.count(r"QGMMA\.64x128x32\.F32\.E4M3\.E4M3 R\d+, gdesc\[UR\d+\]") >= 4
    assert not built.count("HGMMA") and not built.count(r"\bDFMA|\bDMUL|\bDADD")
    assert built.count("UTMALDG") >= 3


CASES = [(PRODUCT, tile) for tile in triton8.MM_TILES] + [(DENSE, triton8.MM_TILES[0])]


@pytest.mark.parametrize(("args", "tile"), CASES, ids=[str(tile) for _, tile in CASES[:-1]] + ["dense"])
def test_plain_product_reads_by_descriptor_and_does_not_spill(args, tile):
    with building() as built:
        triton8.launch_mm(*args, tile)
    lint_product(built[0])
    assert built[0].count("UTMASTG") >= 1


@pytest.mark.parametrize("tile", triton8.WGRAD_TILES, ids=str)
def test_plain_weight_gradient_reads_by_descriptor_and_does_not_spill(tile):
    with building() as built:
        triton8.launch_wgrad(*GRADIENT, True, tile)
    lint_product(built[0])
    assert built[0].count(VECTOR_STORES) >= 16
