"""Shapes the kernels are measured at, random inputs, and the rates of the machine: for the benchmarks."""

from typing import NamedTuple

import torch
from torch import Tensor

from deepv3.kernels.testing import time_gpu


class Shape(NamedTuple):
    """What one GPU sees of a model: T tokens, and the R rows of the G experts it holds."""

    name: str
    tokens: int
    hidden: int
    heads: int
    experts: int
    groups: int
    rows: int
    width: int


MINI = Shape("mini", 8192, 2048, 16, 64, 64, 65536, 1024)
V3 = Shape("V3", 4096, 7168, 128, 256, 32, 32768, 2048)  # 32 of 256 experts: expert parallelism over 8


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def fp32(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda")


def machine_rates() -> tuple[float, float]:
    """(copy bandwidth in bytes/s, read and write counted; BF16 FLOP/s of cuBLAS on 8192^3)."""
    source, a, b = bf16(1 << 29), bf16(8192, 8192), bf16(8192, 8192)
    target = torch.empty_like(source)
    copy = time_gpu(lambda: target.copy_(source)).median_us
    multiply = time_gpu(lambda: torch.mm(a, b)).median_us
    return 2 * source.numel() * source.element_size() / copy * 1e6, 2 * 8192**3 / multiply * 1e6
