"""Tables that sort rows by expert, the copy to that order and the sum back: plain torch.

`permute` and `unpermute` are each other's backward.
"""

import torch
from torch import Tensor

from deepv3.kernels.reference.norm import wide


def row_bound(pairs: int, n_experts: int, align: int) -> int:
    """The most rows `pairs` (token, choice) pairs can take when each expert's rows are filled up to a multiple."""
    return (pairs + min(n_experts, pairs) * (align - 1)) // align * align


def routing_tables(indices: Tensor, n_experts: int, align: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort the (token, choice) pairs by expert, then by token; every expert's rows end at a multiple of `align`.

    indices: [T, K] int32, distinct within a token; -1 is a choice that is not here. FP8 weight gradients need align =
    128. Returns, all int32: slot_of_token [T, K] (row of the sorted order, -1 where the choice is not here),
    token_of_slot [`row_bound`(T K, E, align)] (-1 for rows that fill up), offsets [E] (cumulative ends of the experts'
    rows, filling included), counts [E] (without it).
    Example: indices [[1], [0], [1]] give slots [[1], [0], [2]], tokens [1, 0, 2], offsets [1, 3], counts [1, 2];
    with align = 2: slots [[2], [0], [3]], tokens [1, -1, 0, 2], offsets [2, 4] and the same counts.
    """
    flat = indices.reshape(-1).long()
    key = torch.where(flat < 0, n_experts, flat)
    order = torch.argsort(key, stable=True)
    counts = torch.bincount(key, minlength=n_experts + 1)[:n_experts]
    filled = (counts + align - 1) // align * align
    ends = filled.cumsum(0)
    here = order[: int(counts.sum())]
    moved = (ends - filled) - (counts.cumsum(0) - counts)  # of an expert's first row, by the filling before it
    rows = torch.arange(here.numel(), device=flat.device) + moved[key[here]]
    slots = torch.full_like(flat, -1).scatter_(0, here, rows)
    tokens = torch.full((row_bound(flat.numel(), n_experts, align),), -1, dtype=torch.int32, device=flat.device)
    tokens[rows] = torch.div(here, indices.shape[1], rounding_mode="floor").int()
    return slots.view(indices.shape).int(), tokens, ends.int(), counts.int()


def permute(x: Tensor, token_of_slot: Tensor) -> Tensor:
    """rows[r] = x[token_of_slot[r]], zeros where that is -1. x: [T, D]; token_of_slot: [R] int32. Returns [R, D]."""
    return _taken(x, token_of_slot)


def _taken(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], zeros where it is -1; without a second pass over the rows where there is none."""
    absent = index < 0
    taken = rows.index_select(0, index.clamp(min=0))
    return taken.masked_fill_(absent[:, None], 0.0) if bool(absent.any()) else taken


def unpermute(rows: Tensor, slot_of_token: Tensor, base: Tensor | None = None) -> Tensor:
    """y[t] = base[t] + sum over k, in order, of rows[slot_of_token[t, k]], in FP32, rounded once; -1 adds nothing.

    rows: [R, D]; slot_of_token: [T, K] int32; base: [T, D], the shared expert's output. Returns [T, D].
    """
    tokens, top_k = slot_of_token.shape
    total = torch.zeros(tokens, rows.shape[1], dtype=wide(rows[:0]).dtype, device=rows.device)
    if base is not None:
        total += base
    for k in range(top_k):
        slots = slot_of_token[:, k]
        total += _taken(rows, slots)
    return total.to(rows.dtype)
