"""The FP8 GEMMs: checks, and the choice among implementations; formulas in `reference.gemm8`.

`BACKENDS` names, per operation, what can do it: Triton tiles (`triton8`), Gluon tiles (`gluon8`), cuBLAS and DeepGEMM
(`vendors`). `backends` measures those that may be taken unasked, and chooses; without a choice the first one runs.
"""

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from deepv3.kernels import backends, triton8, vendors
from deepv3.kernels.casts import INTERPRETED
from deepv3.kernels.checks import (
    ACTIVATIONS,
    E4M3,
    FP32,
    INT32,
    check,
    check_block_scales,
    check_rows8,
    check_width,
    next_power_of_2,
)

GLUON_FOR = "3.6."  # the Triton whose Gluon the kernels are written in
# Versions of Triton the Gluon kernels have passed the GPU tests with, as they are now: elsewhere they run when forced
# only, because a wrong barrier does not fail, it hangs.
GLUON_PASSED: tuple[str, ...] = ("3.6.",)

Backend = Callable[..., Any]


def _mm(launch: Callable[..., None], tile: Any) -> Backend:
    """A product into a new tensor by a launcher and one of its tiles."""

    def run(
        codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, offsets: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        out = torch.empty(codes.shape[0], weight.shape[-2], dtype=dtype, device=codes.device)
        launch(out, codes, scales, weight, weight_scales, offsets, tile)
        return out

    return run


def _wgrad(launch: Callable[..., None], tile: Any) -> Backend:
    return lambda *args: launch(*args, tile)


def _gluon() -> tuple[dict[str, Backend], dict[str, Backend]]:
    """(products, weight gradients) in Gluon; none, and on a CUDA machine one warning, where its language differs."""
    if INTERPRETED.value:
        return {}, {}
    if not triton.__version__.startswith(GLUON_FOR):
        if torch.cuda.is_available():
            warnings.warn(
                f"FP8 GEMMs in Gluon are for Triton {GLUON_FOR}x, this is {triton.__version__}: plain Triton runs",
                stacklevel=2,
            )
        return {}, {}
    gluon8_mm = importlib.import_module("deepv3.kernels.gluon8_mm")
    gluon8_wgrad = importlib.import_module("deepv3.kernels.gluon8_wgrad")
    mm = {tile.name: _mm(gluon8_mm.launch_mm, tile) for tile in gluon8_mm.MM_TILES}
    return mm, {tile.name: _wgrad(gluon8_wgrad.launch_wgrad, tile) for tile in gluon8_wgrad.WGRAD_TILES}


def _table() -> dict[str, dict[str, Backend]]:
    gluon_mm, gluon_wgrad = _gluon()
    mm = {tile.name: _mm(triton8.launch_mm, tile) for tile in triton8.MM_TILES} | gluon_mm
    wgrad = {tile.name: _wgrad(triton8.launch_wgrad, tile) for tile in triton8.WGRAD_TILES} | gluon_wgrad
    dense_mm, dense_wgrad = mm | {"cublas": vendors.cublas_mm}, wgrad | {"cublas": vendors.cublas_wgrad}
    if vendors.deepgemm_installed():
        mm, dense_mm = mm | {"deepgemm": vendors.deepgemm_mm}, dense_mm | {"deepgemm": vendors.deepgemm_mm}
        dense_wgrad = dense_wgrad | {"deepgemm": vendors.deepgemm_wgrad}
    return {"fp8_mm": dense_mm, "grouped_fp8_mm": mm, "fp8_wgrad_": dense_wgrad, "grouped_fp8_wgrad_": wgrad}


BACKENDS = _table()


def unasked(op: str) -> list[str]:
    """The names of `BACKENDS[op]` among which is measured."""
    passed = triton.__version__.startswith(GLUON_PASSED)
    return [name for name in BACKENDS[op] if passed or not name.startswith("gluon")]


def _chosen(op: str, shape: tuple[Any, ...], run: backends.Run, device: torch.device) -> Backend:
    return BACKENDS[op][backends.choose(op, shape, BACKENDS[op], unasked(op), run, device)]


def _about(rows: int) -> int:
    """Rows as a choice counts them: up to a power of two, since with natural routing no two calls have as many.

    Exactly where they are not whole tiles of the tensor cores, which an implementation may refuse.
    """
    return rows if rows % 16 else next_power_of_2(rows)


def _product(op: str, args: tuple[Any, ...], shape: tuple[Any, ...]) -> Tensor:
    return _chosen(op, shape, lambda implementation: implementation(*args), args[0].device)(*args)


def _gradient(op: str, grad: Tensor, args: tuple[Any, ...]) -> None:
    def trial(implementation: Backend) -> Tensor:
        scratch = torch.zeros_like(grad)
        implementation(scratch, *args)
        return scratch

    shape = *grad.shape, _about(args[0].shape[1]), "add" if args[-1] else "store"
    _chosen(op, shape, trial, grad.device)(grad, *args)


def fp8_mm(
    codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """See `reference.gemm8.fp8_mm`."""
    m, k = check_rows8("codes", codes, scales, codes.device)
    check("weight", weight, (None, k), E4M3, codes.device)
    n = weight.shape[0]
    check_block_scales("weight_scales", weight_scales, (-(-n // 128), -(-k // 128)), codes.device)
    _check_result(n, dtype)
    if m * n * k == 0:
        return torch.zeros(m, n, dtype=dtype, device=codes.device)
    return _product("fp8_mm", (codes, scales, weight, weight_scales, None, dtype), (_about(m), n, k, dtype))


def grouped_fp8_mm(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    offsets: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """See `reference.gemm8.grouped_fp8_mm`. Offsets that are not multiples of 128 are not noticed."""
    m, k = check_rows8("codes", codes, scales, codes.device)
    check("weight", weight, (None, None, k), E4M3, codes.device)
    groups, n, _ = weight.shape
    check_block_scales("weight_scales", weight_scales, (groups, -(-n // 128), -(-k // 128)), codes.device)
    check("offsets", offsets, (groups,), INT32, codes.device)
    _check_result(n, dtype)
    if m % 128:
        raise ValueError(f"codes has {m} rows, needed a multiple of 128: take the rows of routing_tables(align=128)")
    if m * n * k * groups == 0:
        return torch.zeros(m, n, dtype=dtype, device=codes.device)
    return _product(
        "grouped_fp8_mm", (codes, scales, weight, weight_scales, offsets, dtype), (groups, _about(m), n, k, dtype)
    )


def fp8_wgrad_(
    grad: Tensor, dy_codes: Tensor, dy_scales: Tensor, x_codes: Tensor, x_scales: Tensor, accumulate: bool
) -> None:
    """See `reference.gemm8.fp8_wgrad_`."""
    check("grad", grad, (None, None), FP32, grad.device)
    _check_columns(grad, dy_codes, dy_scales, x_codes, x_scales)
    if grad.numel() and dy_codes.shape[1]:
        _gradient("fp8_wgrad_", grad, (dy_codes, dy_scales, x_codes, x_scales, None, accumulate))
    elif not accumulate:
        grad.zero_()


def grouped_fp8_wgrad_(
    grad: Tensor,
    dy_codes: Tensor,
    dy_scales: Tensor,
    x_codes: Tensor,
    x_scales: Tensor,
    offsets: Tensor,
    accumulate: bool,
) -> None:
    """See `reference.gemm8.grouped_fp8_wgrad_`. Offsets that are not multiples of 128 are not noticed."""
    check("grad", grad, (None, None, None), FP32, grad.device)
    _check_columns(grad, dy_codes, dy_scales, x_codes, x_scales)
    check("offsets", offsets, (grad.shape[0],), INT32, grad.device)
    if grad.numel() and dy_codes.shape[1]:
        _gradient("grouped_fp8_wgrad_", grad, (dy_codes, dy_scales, x_codes, x_scales, offsets, accumulate))
    elif not accumulate:
        grad.zero_()


def _check_columns(grad: Tensor, dy_codes: Tensor, dy_scales: Tensor, x_codes: Tensor, x_scales: Tensor) -> None:
    n, k = grad.shape[-2:]
    check("dy_codes", dy_codes, (n, None), E4M3, grad.device)
    rows = dy_codes.shape[1]
    check("x_codes", x_codes, (k, rows), E4M3, grad.device)
    if rows % 128:
        raise ValueError(f"dy_codes has {rows} columns, needed a multiple of 128: take them from `quantise_columns`")
    check("dy_scales", dy_scales, (rows // 128, n), FP32, grad.device)
    check("x_scales", x_scales, (rows // 128, k), FP32, grad.device)
    check_width("dy_scales", n)
    check_width("x_scales", k)


def _check_result(n: int, dtype: torch.dtype) -> None:
    check_width("the result", n)
    if dtype not in ACTIVATIONS:
        raise TypeError(f"dtype is {dtype}, needed {' or '.join(str(allowed) for allowed in ACTIVATIONS)}")
