"""Cross-entropy on a chunk of logits, gradient over the logits in place: one Triton program a row.

1. Read the row once: every lane keeps the largest of its columns and a sum of exponentials relative to it, with one
   exponential a value, one more a block, and no exchange between lanes.
2. Join the lanes' pairs, write the loss.
3. Read the row again, last columns first, and write scale * softmax; then the label's own column once more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepv3.kernels.casts import INTERPRETED, special
from deepv3.kernels.checks import ACTIVATIONS, check, next_power_of_2

COLS = 32768
WARPS = 32
IGNORED = tl.constexpr(-100)


@triton.jit
def _power(x):
    """exp(x) of FP32 x <= 0; 0 where that would be denormal."""
    if INTERPRETED:
        return tl.exp(x)
    else:
        return special("ex2.approx.ftz.f32 $0, $1;", x * 1.4426950408889634)


@triton.jit
def _joined(high, total, x, LANES: tl.constexpr):
    """(largest, sum of exponentials relative to it) of every lane's columns, those of the block x joined."""
    x = tl.reshape(x.to(tl.float32), (x.shape[0] // (8 * LANES), LANES, 8))
    higher = tl.maximum(high, tl.max(tl.max(x, axis=2), axis=0))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but -inf so far: exp(-inf - 0), not of NaN
    block = tl.sum(tl.sum(_power(x - base[None, :, None]), axis=2), axis=0)
    return higher, total * _power(high - base) + block


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,
    labels_ptr,
    loss_ptr,
    n_cols,
    stride,
    scale,
    GRADIENT: tl.constexpr,
    COLS: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    label = tl.load(labels_ptr + row)
    n_blocks = tl.cdiv(n_cols, COLS)
    if label == IGNORED:
        tl.store(loss_ptr + row, 0.0)
        if GRADIENT:
            for index in range(n_blocks):
                cols = index * COLS + tl.arange(0, COLS)
                zeros = tl.zeros((COLS,), dtype=logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + cols, zeros, mask=cols < n_cols)
    else:
        # A label outside the row makes the loss NaN: visible, and no address is read that is not ours.
        inside = (label >= 0) & (label < n_cols)
        target = tl.load(logits_ptr + label, mask=inside, other=float("nan")).to(tl.float32)
        high = tl.full((LANES,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((LANES,), dtype=tl.float32)
        for index in range(n_blocks):
            cols = index * COLS + tl.arange(0, COLS)
            x = tl.load(logits_ptr + cols, mask=cols < n_cols, other=float("-inf"), eviction_policy="evict_last")
            high, total = _joined(high, total, x, LANES)
        row_high = tl.max(high, axis=0)
        row_total = tl.sum(total * _power(high - tl.where(row_high == float("-inf"), 0.0, row_high)), axis=0)
        tl.store(loss_ptr + row, tl.log(row_total) + row_high - target)
        if GRADIENT:
            factor = scale / row_total
            for index in range(n_blocks):
                cols = (n_blocks - 1 - index) * COLS + tl.arange(0, COLS)
                x = tl.load(logits_ptr + cols, mask=cols < n_cols, other=0.0, eviction_policy="evict_first")
                gradient = _power(x.to(tl.float32) - row_high) * factor
                tl.store(
                    logits_ptr + cols,
                    gradient.to(logits_ptr.dtype.element_ty),
                    mask=cols < n_cols,
                    eviction_policy="evict_first",
                )
            tl.debug_barrier()  # the label's own is written again, after all lanes
            gradient = _power(target - row_high) * factor - scale
            tl.store(logits_ptr + label, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """See `reference.loss.cross_entropy`. A label outside 0 to V - 1 other than -100 gives a NaN loss."""
    return _run(logits, labels, 0.0, gradient=False)


def cross_entropy_(logits: Tensor, labels: Tensor, scale: float) -> Tensor:
    """See `reference.loss.cross_entropy_`. A label outside 0 to V - 1 other than -100 gives a NaN loss."""
    return _run(logits, labels, scale, gradient=True)


def _run(logits: Tensor, labels: Tensor, scale: float, gradient: bool) -> Tensor:
    check("logits", logits, (None, None), ACTIVATIONS, logits.device, contiguous=False)
    n_rows, n_cols = logits.shape
    check("labels", labels, (n_rows,), (torch.int64,), logits.device)
    if n_cols == 0:
        raise ValueError("logits has no columns, needed at least one")
    loss = torch.empty(n_rows, dtype=torch.float32, device=logits.device)
    if n_rows:
        # Rows that do not begin at multiples of 16 are read a number at a time: fewer of them, or addresses spill.
        most = COLS if n_cols % 16 == 0 and logits.stride(0) % 16 == 0 else COLS // 4
        # A row in two blocks at least: 32,000 columns in one took 212 us where two take 188.
        cols = min(most, max(1024, next_power_of_2(n_cols) // 2))
        warps = max(4, min(WARPS, cols // 512))
        _cross_entropy_kernel[(n_rows,)](
            logits,
            labels,
            loss,
            n_cols,
            logits.stride(0),
            float(scale),
            GRADIENT=gradient,
            COLS=cols,
            LANES=32 * warps,
            num_warps=warps,
        )
    return loss
