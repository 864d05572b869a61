"""Every kernel builds for sm_90 at the shapes it is shipped for, and its machine code has what makes it fast.

No GPU is needed: inputs are meta tensors of the shapes of mini (hidden 2048, 64 experts) and of V3 (7168, 256).
"""

import pytest
import torch
from inputs import kernel
from sass import Built, building

from deepv3.kernels import gemm

SHARED_LIMIT = 232_448  # bytes of shared memory a program can have on sm_90; ptxas does not check it, the launch does
VECTOR_LOADS = r"\bLDG(STS)?\.E(\.\w+)*\.128"
VECTOR_STORES = r"\bSTG\.E(\.\w+)*\.128"


def bf16(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def fp32(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device="meta")


def int32(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32, device="meta")


def int64(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def build(name: str, *args, **kwargs) -> list[Built]:
    """What one call of the launcher builds."""
    with building() as built:
        kernel(name)(*args, **kwargs)
    return built


T, TABLE, BIG = 8192, (fp32(8192, 32), fp32(8192, 32)), 1 << 33  # BIG: a flat buffer beyond 32-bit offsets

STREAMING = {
    "rmsnorm mini": ("rmsnorm", bf16(T, 2048), bf16(2048), 1e-6, bf16(T, 2048)),
    "rmsnorm V3": ("rmsnorm", bf16(T, 7168), bf16(7168), 1e-6, bf16(T, 7168)),
    "rmsnorm latent": ("rmsnorm", bf16(T, 576)[:, :512], bf16(512), 1e-6),
    "rmsnorm_backward mini": ("rmsnorm_backward", bf16(T, 2048), bf16(T, 2048), bf16(2048), fp32(T), bf16(T, 2048)),
    "rmsnorm_backward V3": ("rmsnorm_backward", bf16(T, 7168), bf16(T, 7168), bf16(7168), fp32(T), bf16(T, 7168)),
    "rope_query_": ("rope_query_", bf16(T, 16, 192), *TABLE),
    "assemble_key mini": ("assemble_key", bf16(T, 16, 256), bf16(T, 576)[:, 512:], *TABLE),
    "assemble_key V3": ("assemble_key", bf16(T, 128, 256), bf16(T, 576)[:, 512:], *TABLE),
    "assemble_key_backward": ("assemble_key_backward", bf16(T, 128, 192), bf16(T, 128, 128), *TABLE),
    "permute mini": ("permute", bf16(T, 2048), int32(8 * T)),
    "permute V3": ("permute", bf16(T, 7168), int32(8 * T)),
    "unpermute": ("unpermute", bf16(8 * T, 7168), int32(T, 8), bf16(T, 7168)),
    "swiglu": ("swiglu", bf16(8 * T, 2048), fp32(8 * T)),
    "swiglu_backward mini": ("swiglu_backward", bf16(8 * T, 1024), bf16(8 * T, 2048), fp32(8 * T), True),
    "swiglu_backward V3 dense": ("swiglu_backward", bf16(T, 18432), bf16(T, 36864), None, True),
    "cross_entropy_": ("cross_entropy_", bf16(2048, 129280), int64(2048), 1.0),
    "adamw_": ("adamw_", *[fp32(BIG)] * 2, *[bf16(BIG)] * 3, 1e-3, 0.9, 0.95, 1e-8, 0.1, int32(), fp32()),
}


@pytest.mark.parametrize("case", STREAMING)
def test_streaming_kernels_move_16_bytes_at_a_time_and_do_not_spill(case):
    name, *args = STREAMING[case]
    (built,) = build(name, *args)
    assert built.spills == 0
    assert built.count(VECTOR_LOADS) >= 2 and built.count(VECTOR_STORES) >= 1
    # What is narrower must be per row or per token (indices, statistics, tables), not per element.
    assert built.count(VECTOR_LOADS) * 2 >= built.count(r"\bLDG(STS)?\.E") - 9


def test_sum_of_squares_reads_16_bytes_at_a_time():
    (built,) = build("sum_of_squares", fp32(BIG))
    assert built.spills == 0 and built.count(VECTOR_LOADS) == 8


@pytest.mark.parametrize("experts", [64, 256])
def test_router_and_tables_build_without_spills(experts):
    logits = fp32(T, experts)
    built = build("router_topk", logits, fp32(experts), 8, 8, 4, 2.5)
    if experts == 256:
        assert built[0].count(r"\bC?REDUX") == 16  # maxima over a warp are single instructions
    assert built[0].count(r"\bVIMNMX") <= 180, "the eight best are sought in the groups that stay, not in all"
    built += build("router_topk_backward", fp32(T, 8), logits, int32(T, 8), 2.5)
    built += build("balance_loss_backward", fp32(2), logits, 8, 4096)
    built += build("routing_tables", int32(T, 8), experts)
    # Histograms are added where they were loaded, all loads before the first sum; pairs compared without predicates.
    tables = built[-1]
    assert tables.count(r"\bBAR\.SYNC") <= 20 and tables.count("SHFL") <= 16 and tables.count("P2R") == 0
    assert experts == 64 or tables.registers > 128
    assert len(built) == 6
    assert [part.spills for part in built] == [0] * 6


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("tile", gemm.TILES, ids=str)
def test_grouped_weight_gradient_uses_tensor_cores_from_shared_memory(tile, accumulate):
    grad, dy, x = fp32(64, 2048, 2048), bf16(65536, 2048), bf16(65536, 2048)
    with building() as built:
        gemm.launch_grouped_wgrad(grad, dy, x, int32(64), accumulate, tile)
    (code,) = built
    assert code.spills == 0
    assert code.shared <= SHARED_LIMIT
    # Both operands are read transposed by the tensor cores: none is rearranged in registers.
    assert code.count(r"HGMMA\S* R\d+, gdesc\[UR\d+\]\.tnspA\.tnspB") >= 4
    assert code.count("UTMALDG" if tile.descriptors else "LDGSTS.E.BYPASS.128") >= 4
    assert code.count(VECTOR_STORES) >= 16


def test_grouped_weight_gradient_of_odd_widths_and_of_fp32_builds_without_spills():
    built = build("grouped_wgrad_", fp32(4, 100, 52), bf16(300, 100), bf16(300, 52), int32(4), True)
    built += build("grouped_wgrad_", fp32(4, 128, 64), fp32(300, 128), fp32(300, 64), int32(4), True)
    assert [part.spills for part in built] == [0, 0]
    assert built[0].count("HGMMA") and not built[1].count("HGMMA")


def test_embedding_gradient_builds_without_atomics():
    (built,) = build("embedding_wgrad_", fp32(129280, 2048), int64(T), bf16(T, 2048))
    assert built.spills == 0 and not built.count(r"\b(ATOM|RED)\b") and built.count(VECTOR_LOADS) >= 4
