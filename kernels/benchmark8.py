"""The FP8 kernels at the shapes of V3 and mini beside their peers: checked first, then timed, in one run.

`check()` holds every implementation of every product to plain Triton and to FP64 of the same codes, and the fused
kernels to the unfused; `table()` is markdown: streaming kernels by the share of the copy bandwidth measured in this
run and beside a copy of as many bytes, products in TFLOP/s, with geometric means per operation and implementation.
Peers of a product: cuBLAS block-scaled (dense), DeepGEMM where it is installed, and torch in BF16.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import deepv3.kernels as kernels
from deepv3.kernels import backends, gemm8
from deepv3.kernels.reference.quantise import dequantise_blocks, dequantise_columns, dequantise_rows
from deepv3.kernels.shapes import MINI, V3, Shape, bf16, fp32, machine_rates
from deepv3.kernels.testing import Timing, product_tolerance, relative_norm, time_gpu

TOKENS = 4096
# N x K of V3's matrices (its dgrads are the same with N and K exchanged) and of the experts: gate and up, down.
DENSE = [(2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048), (36864, 7168), (7168, 18432)]
DGRAD = [(1536, 24576), (16384, 7168), (7168, 4096), (2048, 7168)]
EXPERTS = [(4, 32768, 4096, 7168), (4, 32768, 7168, 2048), (8, 32768, 4096, 7168), (8, 32768, 7168, 2048)]
EXPERTS += [(64, 24576, 2816, 2048), (64, 24576, 2048, 1408)]  # 384 rows an expert
GRADIENTS = [(4096, 7168), (7168, 16384), (7168, 2048), (24576, 1536)]


class Streaming(NamedTuple):
    """A memory-bound kernel: the call, and the bytes that must move once."""

    name: str
    shape: str
    call: Callable[[], Any]
    bytes: float


def _bytes(*tensors: Any) -> int:
    """Bytes of the tensors among these, tuples searched."""
    total = 0
    for value in tensors:
        if isinstance(value, tuple):
            total += _bytes(*value)
        elif isinstance(value, Tensor):
            total += value.numel() * value.element_size()
    return total


def _moving(name: str, shape: str, *args: Any) -> Streaming:
    """Bytes: every input and every result once."""
    function = getattr(kernels, name)
    return Streaming(name, shape, lambda: function(*args), _bytes(*args, function(*args)))


def streaming(s: Shape) -> Iterator[Streaming]:
    """Every memory-bound FP8 kernel at one model's shapes, inputs made as they are needed."""
    x, where = bf16(s.tokens, s.hidden), f"{s.tokens} x {s.hidden}"
    residual, weight = bf16(s.tokens, s.hidden), bf16(s.hidden)
    yield _moving("quantise_rows", where, x)
    yield _moving("quantise_columns", where, x)
    yield _moving("quantise_both", where, x)
    yield _moving("rmsnorm_fp8", where, x, weight, 1e-6, residual, True)
    yield _moving("rmsnorm_fp8_columns", where, x, weight, torch.rand(s.tokens, device="cuda"))
    wide = bf16(s.tokens, s.heads * 128)
    words, scales = kernels.e5m6_pack(wide)
    yield _moving("e5m6_pack", f"{s.tokens} x {s.heads * 128}", wide)
    yield _moving("e5m6_unpack", f"{s.tokens} x {s.heads * 128}", words, scales)
    del x, residual, wide, words
    w = bf16(4, 2 * s.width, s.hidden)
    yield _moving("quantise_blocks", f"4 x {2 * s.width} x {s.hidden}", w)
    del w
    codes, scales = kernels.quantise_rows(bf16(s.rows // 8, s.hidden), True)
    order = (torch.randperm(s.rows, device="cuda") // 8).int()
    where = f"{s.rows // 8} to {s.rows} x {s.hidden}"
    yield _moving("permute_fp8", where, codes, scales, order)
    gathered = _moving("requantise", where, codes, scales, order)
    yield gathered._replace(name="requantise, gathered", bytes=gathered.bytes + (s.rows - s.rows // 8) * s.hidden)
    rows, row_scales = kernels.permute_fp8(codes, scales, order)
    yield _moving("requantise", f"{s.rows} x {s.hidden}", rows, row_scales)
    del rows, codes
    h, gate, where = bf16(s.rows, 2 * s.width), torch.rand(s.rows, device="cuda"), f"{s.rows} x {s.width}"
    yield _moving("swiglu_fp8", where, h, gate, False, False)
    yield _moving("swiglu_fp8", where + ", kept", h, gate)
    kept = kernels.quantise_rows(h, True)
    yield _moving("swiglu_fp8_backward", where, bf16(s.rows, s.width), *kept, gate)


class Product(NamedTuple):
    """A GEMM: its operation, the call with a new result, its FLOP, and torch's in BF16."""

    op: str
    shape: str
    call: Callable[[], Any]
    flops: float
    peer: Callable[[], Any]


def _names(op: str, every: bool) -> list[str]:
    return list(gemm8.BACKENDS[op]) if every else gemm8.unasked(op)


def _rows8(m: int, k: int) -> tuple[Tensor, Tensor]:
    return kernels.quantise_rows(bf16(m, k), True)


def products() -> Iterator[Product]:
    """Dense and grouped products and weight gradients at V3's shapes, random operands."""
    for kind, sizes in (("", DENSE), (" dgrad", DGRAD)):
        for n, k in sizes:
            operands = *_rows8(TOKENS, k), *kernels.quantise_blocks(bf16(n, k))[:2]
            a, b = bf16(TOKENS, k), bf16(n, k)
            yield Product(
                "fp8_mm",
                f"{TOKENS} x {n} x {k}{kind}",
                lambda o=operands: kernels.fp8_mm(*o),
                2.0 * TOKENS * n * k,
                lambda a=a, b=b: torch.mm(a, b.t()),
            )
    for n, k in GRADIENTS:
        dy, x = bf16(TOKENS, n), bf16(TOKENS, k)
        columns, grad = (*kernels.quantise_columns(dy), *kernels.quantise_columns(x)), fp32(n, k)
        yield Product(
            "fp8_wgrad_",
            f"{n} x {k}, {TOKENS} rows, add",
            lambda g=grad, c=columns: kernels.fp8_wgrad_(g, *c, True),
            2.0 * TOKENS * n * k,
            lambda g=grad, d=dy, x=x: kernels.dense_wgrad_(g, d, x, True),
        )
    for groups, rows, n, k in EXPERTS:
        yield from _grouped(groups, rows, n, k)


def _grouped(groups: int, rows: int, n: int, k: int) -> Iterator[Product]:
    """Balanced groups, multiples of 128 rows."""
    offsets = (torch.arange(1, groups + 1, device="cuda") * (rows // groups)).int()
    x, dy, where = bf16(rows, k), bf16(rows, n), f"{groups} groups, {rows} rows, {n} x {k}"
    w, flops = bf16(groups, n, k), 2.0 * rows * n * k
    operands = *kernels.quantise_rows(x, True), *kernels.quantise_blocks(w)[:2], offsets
    yield Product(
        "grouped_fp8_mm",
        where,
        lambda o=operands: kernels.grouped_fp8_mm(*o),
        flops,
        lambda: kernels.grouped_mm(x, w, offsets),
    )
    columns, grad = (*kernels.quantise_columns(dy), *kernels.quantise_columns(x)), fp32(groups, n, k)
    for accumulate in (False, True):
        yield Product(
            "grouped_fp8_wgrad_",
            f"{where}, {'add' if accumulate else 'store'}",
            lambda c=columns, g=grad, add=accumulate: kernels.grouped_fp8_wgrad_(g, *c, offsets, add),
            flops,
            lambda g=grad, add=accumulate: kernels.grouped_wgrad_(g, dy, x, offsets, add),
        )


def check(every: bool) -> str:
    """One line per implementation: its distance from FP64 of the same codes. RuntimeError for one that is off.

    every: Gluon too where it does not run unasked yet; under a time limit, for it may hang.
    """
    m, n, k = 384, 1408, 2048
    rows, weight = _rows8(m, k), kernels.quantise_blocks(bf16(3, n, k))[:2]
    dy, x = kernels.quantise_columns(bf16(m, n)), kernels.quantise_columns(bf16(m, k))
    offsets = torch.tensor([128, 128, 384], dtype=torch.int32, device="cuda")
    values, matrices = dequantise_rows(*rows, torch.float64), dequantise_blocks(*weight).double()
    dys, xs = dequantise_columns(*dy).double(), dequantise_columns(*x).double()
    first, last = slice(0, 128), slice(128, 384)
    zero = torch.zeros(n, k, dtype=torch.float64, device="cuda")
    exact = {
        "fp8_mm": values @ matrices[0].t(),
        "grouped_fp8_mm": torch.cat((values[first] @ matrices[0].t(), values[last] @ matrices[2].t())),
        "fp8_wgrad_": dys @ xs.t(),
        "grouped_fp8_wgrad_": torch.stack((dys[:, first] @ xs[:, first].t(), zero, dys[:, last] @ xs[:, last].t())),
    }

    def run(op: str, implementation: Callable[..., Any]) -> Tensor:
        ends = offsets if op.startswith("grouped") else None
        if op.endswith("mm"):
            matrix = weight if ends is not None else tuple(part[0] for part in weight)
            return implementation(*rows, *matrix, ends, torch.bfloat16)
        grad = torch.zeros(exact[op].shape, device="cuda")
        implementation(grad, *dy, *x, ends, True)
        return grad

    lines = []
    for op, table in gemm8.BACKENDS.items():
        for name in _names(op, every):
            try:
                result = run(op, table[name])
            except Exception as refusal:  # a library's refusal of this shape: shown
                lines.append(f"{op}, {name}: {type(refusal).__name__}: {str(refusal)[:150]}")
                continue
            error = relative_norm(result, exact[op])
            lines.append(f"{op}, {name}: off by {error:.1e} of the norm")
            if error > product_tolerance(result.numel(), result.dtype):
                raise RuntimeError(lines[-1])
    _check_fused()
    return "\n".join(lines)


def _check_fused() -> None:
    """Norm and SwiGLU with quantisation give the bits of norm and SwiGLU followed by it."""
    x, weight, h = bf16(512, 7168), bf16(7168), bf16(512, 4096)
    pairs = {
        "rmsnorm_fp8": (
            kernels.rmsnorm_fp8(x, weight, 1e-6),
            kernels.quantise_rows(kernels.rmsnorm(x, weight, 1e-6)[0]),
        ),
        "swiglu_fp8": (kernels.swiglu_fp8(h), kernels.quantise_rows(kernels.swiglu(h))),
    }
    for name, (fused, unfused) in pairs.items():
        for a, b in zip(fused[:2], unfused):
            if not torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)):
                raise RuntimeError(f"{name} differs from its parts")


def _implementations(product: Product, every: bool) -> dict[str, Timing]:
    """Every implementation that takes the shape, timed by forcing it."""
    times = {}
    for name in _names(product.op, every):
        backends.force(product.op, name)
        try:
            times[name] = time_gpu(product.call)
        except Exception as refusal:  # a library that does not take this shape has no time
            print(f"{product.op} {product.shape}, {name}: {type(refusal).__name__}", flush=True)
        finally:
            backends.force(product.op, None)
    return times


def table(every: bool) -> str:
    """All tables under the machine and its measured rates; every: as in `check`."""
    bandwidth, _ = machine_rates()
    lines = [f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e9:.0f} GB/s", ""]
    lines += ["| FP8 kernel | shape | us | GB/s | of copy | copy of as many bytes, us |", "|" + "---|" * 6]
    for shape in (V3, MINI):
        for work in streaming(shape):
            time, spread = time_gpu(work.call)
            rate = work.bytes / time * 1e6
            source = torch.empty(int(work.bytes) // 2, dtype=torch.uint8, device="cuda").random_()
            copy = time_gpu(source.clone).median_us
            figures = f"{time:.1f} ± {spread:.1f} | {rate / 1e9:.0f} | {rate / bandwidth:.2f} | {copy:.1f}"
            lines.append(f"| {work.name} | {shape.name} {work.shape} | {figures} |")
        torch.cuda.empty_cache()
    lines += ["", "| product | shape | by | us | TFLOP/s | BF16 torch TFLOP/s |", "|" + "---|" * 6]
    rates: dict[str, list[float]] = defaultdict(list)
    for product in products():
        peer = product.flops / time_gpu(product.peer).median_us / 1e6
        rates[f"{product.op}, torch BF16"].append(peer)
        for name, (time, spread) in _implementations(product, every).items():
            rate = product.flops / time / 1e6
            rates[f"{product.op}, {name}"].append(rate)
            figures = f"{time:.1f} ± {spread:.1f} | {rate:.0f} | {peer:.0f}"
            lines.append(f"| {product.op} | {product.shape} | {name} | {figures} |")
        torch.cuda.empty_cache()
    lines += ["", "| geometric mean | shapes | TFLOP/s |", "|" + "---|" * 3]
    for name, values in rates.items():
        mean = math.exp(sum(math.log(value) for value in values) / len(values))
        lines.append(f"| {name} | {len(values)} | {mean:.0f} |")
    return "\n".join(lines)
