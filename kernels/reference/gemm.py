"""GEMMs over rows sorted by expert, and weight gradients into FP32 buffers: plain torch.

offsets [G] int32 are cumulative ends: group g owns rows offsets[g-1] .. offsets[g]. Each function states its
shape equation.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def _groups(offsets: Tensor) -> Iterator[tuple[int, int, int]]:
    """(group, first row, end row) of every group; reads the offsets on the host, so for CPU only."""
    start = 0
    for group, end in enumerate(offsets.tolist()):
        yield group, start, end
        start = end


def grouped_mm(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """[R, N] = [R, Kin] @ weight[g][N, Kin]^T, the group by row."""
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    for group, start, end in _groups(offsets):
        torch.mm(rows[start:end], weight[group].t(), out=out[start:end])
    return out


def grouped_mm_t(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """[R, Kin] = [R, N] @ weight[g][N, Kin]: the input gradient of `grouped_mm`."""
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    for group, start, end in _groups(offsets):
        torch.mm(rows[start:end], weight[group], out=out[start:end])
    return out


def dense_wgrad_(grad: Tensor, dy: Tensor, x: Tensor, accumulate: bool) -> None:
    """grad[N, Kin] (+)= dy[T, N]^T @ x[T, Kin], in grad's format (FP32): added where `accumulate`, else stored."""
    if accumulate:
        grad.addmm_(dy.t().to(grad.dtype), x.to(grad.dtype))
    else:
        torch.mm(dy.t().to(grad.dtype), x.to(grad.dtype), out=grad)


def grouped_wgrad_(grad: Tensor, dy: Tensor, x: Tensor, offsets: Tensor, accumulate: bool) -> None:
    """grad[g][N, Kin] (+)= dy[rows of g][., N]^T @ x[rows of g][., Kin]; an empty group stores 0 or adds nothing."""
    for group, start, end in _groups(offsets):
        dense_wgrad_(grad[group], dy[start:end], x[start:end], accumulate)
