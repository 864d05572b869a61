"""SwiGLU with the router's gate, forward and backward: Triton kernels, one pass each.

Forward: tiles of 2048 outputs. Backward: a program takes whole rows, so that the gate's gradient (a dot product along
the row) is summed in registers in a fixed order, and writes gradient and, on request, the output again in one pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepv3.kernels.casts import INTERPRETED, special
from deepv3.kernels.checks import ACTIVATIONS, FP32, block, cdiv, check, next_power_of_2

ELEMENTS = 2048  # outputs of a tile: 4 warps x 32 lanes x 16


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in FP32; 0 below -87, where it would be denormal."""
    if INTERPRETED:
        return tl.sigmoid(x)
    else:  # two instructions of the special function unit; Triton's own guard against denormals, and divide by more
        power = special("ex2.approx.ftz.f32 $0, $1;", x * -1.4426950408889634)
        return special("rcp.approx.ftz.f32 $0, $1;", 1.0 + power)


@triton.jit
def swiglu_output(gate, up):
    """silu(gate) * up in FP32."""
    return gate * sigmoid(gate) * up


@triton.jit
def swiglu_gradient(dy, gate, up, weight):
    """(gradients of gate and up, the output before its weight) in FP32; weight broadcasts."""
    share = sigmoid(gate)
    silu = gate * share
    dact = dy * weight
    return dact * up * (share + silu * (1 - share)), dact * silu, silu * up


@triton.jit
def _swiglu_kernel(
    h_ptr,
    weight_ptr,
    y_ptr,
    n_rows,
    n_cols,
    WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    col_blocks = tl.cdiv(n_cols, COLS)
    rows = tl.program_id(0) // col_blocks * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % col_blocks * COLS + tl.arange(0, COLS)[None, :]
    mask = (rows < n_rows)[:, None] & (cols < n_cols)
    wide_rows = rows.to(tl.int64)[:, None]
    gate = tl.load(h_ptr + wide_rows * (2 * n_cols) + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + wide_rows * (2 * n_cols) + n_cols + cols, mask=mask, other=0.0).to(tl.float32)
    y = swiglu_output(gate, up)
    if WEIGHT:
        y *= tl.load(weight_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
    tl.store(y_ptr + wide_rows * n_cols + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(
    dy_ptr,
    h_ptr,
    weight_ptr,
    dh_ptr,
    dweight_ptr,
    y_ptr,
    n_rows,
    n_cols,
    WEIGHT: tl.constexpr,
    OUTPUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < n_rows
    wide_rows = rows.to(tl.int64)[:, None]
    weight = tl.full((ROWS, 1), 1.0, dtype=tl.float32)
    if WEIGHT:
        weight = tl.load(weight_ptr + rows, mask=row_mask, other=0.0)[:, None]
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for first in range(0, n_cols, COLS):
        cols = first + tl.arange(0, COLS)[None, :]
        mask = row_mask[:, None] & (cols < n_cols)
        pair = wide_rows * (2 * n_cols) + cols
        gate = tl.load(h_ptr + pair, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + pair + n_cols, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + wide_rows * n_cols + cols, mask=mask, other=0.0).to(tl.float32)
        dgate, dup, act = swiglu_gradient(dy, gate, up, weight)
        tl.store(dh_ptr + pair, dgate.to(dh_ptr.dtype.element_ty), mask=mask)
        tl.store(dh_ptr + pair + n_cols, dup.to(dh_ptr.dtype.element_ty), mask=mask)
        if WEIGHT:
            total += dy * act
        if OUTPUT:
            tl.store(y_ptr + wide_rows * n_cols + cols, (act * weight).to(y_ptr.dtype.element_ty), mask=mask)
    if WEIGHT:
        tl.store(dweight_ptr + rows, tl.sum(total, axis=1), mask=row_mask)


def swiglu(h: Tensor, weight: Tensor | None = None) -> Tensor:
    """See `reference.activation.swiglu`."""
    n_rows, n_cols = check_gated(h, weight)
    y = torch.empty((n_rows, n_cols), dtype=h.dtype, device=h.device)
    if y.numel():
        cols = block(n_cols, 1024)
        rows = max(1, ELEMENTS // cols)
        _swiglu_kernel[(cdiv(n_rows, rows) * cdiv(n_cols, cols),)](
            h, h if weight is None else weight, y, n_rows, n_cols, WEIGHT=weight is not None, ROWS=rows, COLS=cols
        )
    return y


def swiglu_backward(
    dy: Tensor, h: Tensor, weight: Tensor | None = None, want_output: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `reference.activation.swiglu_backward`."""
    n_rows, n_cols = check_gated(h, weight)
    check("dy", dy, (n_rows, n_cols), ACTIVATIONS, h.device)
    dh = torch.empty_like(h)
    dweight = None if weight is None else torch.empty_like(weight)
    y = torch.empty((n_rows, n_cols), dtype=h.dtype, device=h.device) if want_output else None
    if dh.numel():
        cols = min(next_power_of_2(n_cols), 2048)
        rows = max(1, ELEMENTS // cols)
        _swiglu_backward_kernel[(cdiv(n_rows, rows),)](
            dy,
            h,
            h if weight is None else weight,  # not touched without WEIGHT, nor y without OUTPUT
            dh,
            dh if dweight is None else dweight,
            dh if y is None else y,
            n_rows,
            n_cols,
            WEIGHT=weight is not None,
            OUTPUT=want_output,
            ROWS=rows,
            COLS=cols,
        )
    elif dweight is not None:
        dweight.zero_()
    return dh, dweight, y


def check_gated(h: Tensor, weight: Tensor | None) -> tuple[int, int]:
    """Rows and output columns of h, after its checks and the gate's."""
    check("h", h, (None, None), ACTIVATIONS, h.device)
    if h.shape[1] % 2:
        raise ValueError(f"h has {h.shape[1]} columns, needed an even number: [gate | up]")
    if weight is not None:
        check("weight", weight, (h.shape[0],), FP32, h.device)
    return h.shape[0], h.shape[1] // 2
