"""Errors as one number per tensor, and times of GPU kernels: helpers of the GPU tests and of the kernel benchmark."""

import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# More than any L2, so that writing it leaves no input of the next call there; and enough work, 170 us on an H100, for
# the host to launch that call behind it: the time between the events is the GPU's, not the launcher's. What
# it wrote and L2 holds goes to memory during that call, as the results of a training step's kernels do during the next.
FLUSH_BYTES = 512 << 20

# Relative error norms allowed against an FP64 reference of the same inputs, by the format of what the kernel writes
# (FP64: sums whose terms were made in FP32).
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 3e-3}

# Of FP8 products, against FP64 of the dequantised operands. A tensor core's sums of 128 products have about 14 bits,
# which is all an FP32 result is off by. Rounding to BF16 (8 bits) moves an element by up to 2^-8 of itself and so the
# norm of any result by up to 2^-8. The error of many elements is random, uniform within half a step: its norm is at
# most 2^-8 / sqrt(3), where all lie just above a power of two, and 1.7e-3 for normal values.
PRODUCT_SUMS, ROUNDED_ELEMENT, ROUNDED_MANY = 1e-3, 2.0**-8, 2e-3
MANY = 1000  # elements from which the norm of the rounding is near its mean


def relative_norm(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in FP64; |actual| where nothing is expected; infinite if finiteness differs."""
    if actual.shape != expected.shape:
        raise ValueError(f"actual has shape {list(actual.shape)}, expected {list(expected.shape)}")
    actual, expected = actual.double(), expected.double()
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(actual)):
        return math.inf
    actual, expected = actual.where(finite, 0.0), expected.where(finite, 0.0)
    norm = float(expected.norm())
    return float((actual - expected).norm()) / (norm if norm > 0 else 1.0)


def product_tolerance(elements: int, dtype: torch.dtype) -> float:
    """Relative error norm allowed of an FP8 product with so many elements in this format."""
    if dtype == torch.float32:
        return PRODUCT_SUMS
    return ROUNDED_MANY if elements >= MANY else ROUNDED_ELEMENT + PRODUCT_SUMS


def worst_block(actual: Tensor, expected: Tensor, size: int = 128) -> float:
    """The largest relative error norm of `size` consecutive elements, against at least a hundredth of the mean block.

    Finds a wrong tile that the norm of a large tensor hides.
    """
    actual, expected = actual.double().flatten(), expected.double().flatten()
    whole = expected.numel() // size * size
    if whole == 0:
        return relative_norm(actual, expected)
    errors = (actual - expected)[:whole].view(-1, size).norm(dim=1)
    norms = expected[:whole].view(-1, size).norm(dim=1)
    floor = float(norms.square().mean().sqrt()) / 100
    return float((errors / norms.clamp(min=max(floor, 1e-300))).max())


class Timing(NamedTuple):
    """Microseconds: median and the distance between the quartiles."""

    median_us: float
    spread_us: float


def time_gpu(call: Callable[[], Any], repeats: int = 20, seconds: float = 0.2) -> Timing:
    """Time one call on the current CUDA device with a cold L2, by events, clock warmed up for `seconds` first.

    Events are recorded around each call and read at the end: nothing waits in between. Inputs should be random, not
    zero: zeros save power and flatter by 10 to 20 %.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    call()
    start.record()
    call()
    end.record()
    end.synchronize()
    for _ in range(min(1000, int(seconds * 1e3 / max(start.elapsed_time(end), 1e-2)))):
        call()
    events = []
    for _ in range(repeats):
        flush.zero_()
        begin, finish = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        finish.record()
        events.append((begin, finish))
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(finish) * 1e3 for begin, finish in events)
    quartiles = statistics.quantiles(times, n=4)
    return Timing(statistics.median(times), quartiles[2] - quartiles[0])


def time_graph(call: Callable[[], Any], copies: int = 20, repeats: int = 20) -> Timing:
    """Time one call by replaying a CUDA graph of `copies` of it: the GPU's share, where the host launches slowly.

    Inputs stay in L2, and no host is waited for between the kernels.
    """
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(copies):
            call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / copies)
    quartiles = statistics.quantiles(times, n=4)
    return Timing(statistics.median(times), quartiles[2] - quartiles[0])
