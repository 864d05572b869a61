"""Tables that sort rows by expert, the copy to that order and the sum back: plain torch.

`permute` and `unpermute` are each other's backward.
"""

import torch
from torch import Tensor

from deepv3.kernels.reference.norm import wide


def routing_tables(indices: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort the (token, choice) pairs by expert, then by token.

    indices: [T, K] int32, distinct within a token. Returns, all int32: slot_of_token [T, K] (row of the sorted order),
    token_of_slot [T * K], offsets [E] (cumulative ends of the experts' rows), counts [E].
    Example: indices [[1], [0], [1]] give slots [[1], [0], [2]], tokens [1, 0, 2], offsets [1, 3], counts [1, 2].
    """
    flat = indices.reshape(-1).long()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=n_experts)
    slots = torch.empty_like(flat).scatter_(0, order, torch.arange(flat.numel(), device=flat.device))
    tokens = torch.div(order, indices.shape[1], rounding_mode="floor")
    return slots.view(indices.shape).int(), tokens.int(), counts.cumsum(0).int(), counts.int()


def permute(x: Tensor, token_of_slot: Tensor) -> Tensor:
    """rows[r] = x[token_of_slot[r]]. x: [T, D]; token_of_slot: [R] int32. Returns [R, D]."""
    return x.index_select(0, token_of_slot)


def unpermute(rows: Tensor, slot_of_token: Tensor, base: Tensor | None = None) -> Tensor:
    """y[t] = base[t] + sum over k, in order, of rows[slot_of_token[t, k]], in FP32, rounded once.

    rows: [R, D]; slot_of_token: [T, K] int32; base: [T, D], the shared expert's output. Returns [T, D].
    """
    tokens, top_k = slot_of_token.shape
    total = torch.zeros(tokens, rows.shape[1], dtype=wide(rows[:0]).dtype, device=rows.device)
    if base is not None:
        total += base
    for k in range(top_k):
        total += rows.index_select(0, slot_of_token[:, k])
    return total.to(rows.dtype)
