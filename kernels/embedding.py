"""Weight gradient of the embedding, in a fixed order and without atomics: Triton kernel.

1. Sort the ids, stably, on the device.
2. A program stands at every place of the sorted order, for every 128 columns. Where a run of equal ids starts it adds
   up the run's rows, 32 at a time, and adds the sum to the gradient's row; elsewhere it leaves at once.
Given up: a run is not split over programs. One of 2048 rows is 64 rounds of loads, tens of microseconds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepv3.kernels.checks import ACTIVATIONS, FP32, cdiv, check

ROWS = 32
COLS = 128


@triton.jit
def _embedding_wgrad_kernel(
    grad_ptr,
    sorted_ptr,
    order_ptr,
    dy_ptr,
    n_tokens,
    n_cols,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    col_blocks = tl.cdiv(n_cols, COLS)
    place = tl.program_id(0) // col_blocks
    this = tl.load(sorted_ptr + place)
    previous = tl.load(sorted_ptr + place - 1, mask=place > 0, other=-1)
    if this != previous:
        cols = tl.program_id(0) % col_blocks * COLS + tl.arange(0, COLS)
        col_mask = cols < n_cols
        total = tl.zeros((COLS,), dtype=tl.float32)
        found = tl.full((), ROWS, dtype=tl.int32)
        while found == ROWS:
            places = place + tl.arange(0, ROWS)
            ours = tl.load(sorted_ptr + places, mask=places < n_tokens, other=-1) == this
            tokens = tl.load(order_ptr + places, mask=ours, other=0)
            mask = ours[:, None] & col_mask[None, :]
            dy = tl.load(dy_ptr + tokens[:, None] * n_cols + cols[None, :], mask=mask, other=0.0)
            total += tl.sum(dy.to(tl.float32), axis=0)
            found = tl.sum(ours.to(tl.int32), axis=0)
            place += ROWS
        address = grad_ptr + this * n_cols + cols
        tl.store(address, tl.load(address, mask=col_mask) + total, mask=col_mask)


def embedding_wgrad_(grad: Tensor, ids: Tensor, dy: Tensor) -> None:
    """See `reference.embedding.embedding_wgrad_`. Ids must lie in 0 to V - 1: others corrupt memory."""
    check("grad", grad, (None, None), FP32, grad.device)
    check("ids", ids, (None,), (torch.int64,), grad.device)
    n_tokens, n_cols = ids.shape[0], grad.shape[1]
    check("dy", dy, (n_tokens, n_cols), ACTIVATIONS, grad.device)
    if dy.numel() == 0:
        return
    ids, order = torch.sort(ids, stable=True)
    _embedding_wgrad_kernel[(n_tokens * cdiv(n_cols, COLS),)](
        grad, ids, order, dy, n_tokens, n_cols, ROWS=ROWS, COLS=COLS
    )
