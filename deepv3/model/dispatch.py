"""Bringing tokens to their experts and the experts' rows back to their tokens.

A dispatcher has two methods, `dispatch` and `combine`, and is handed to the MoE layer from outside: the layer never
asks where experts live. Here all of them are local and a permutation does.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import deepv3.kernels as kernels
from deepv3.model.router import Routing
from deepv3.precision.saved import Operand, Remade


class Dispatched(NamedTuple):
    """Rows sorted by expert, ready for the grouped GEMMs, and what `combine` needs to undo it."""

    rows: Operand  # [R, D]
    gates: Tensor  # [R] FP32, router weight of every row
    offsets: Tensor  # [G] int32, cumulative row ends of the experts
    routing: Routing


class LocalDispatch:
    """All experts in this process; every (token, choice) pair becomes a row, so R = T K and none is dropped (V3 2.1.2).

    The rows are made again in backward from the tokens, K times smaller; `keep_rows` keeps them, for use under
    activation checkpointing, which holds nothing but the block's input anyway.
    """

    def __init__(self, keep_rows: bool = False) -> None:
        self.keep_rows = keep_rows

    def dispatch(self, u: Operand, routing: Routing) -> Dispatched:
        """u: [T, D]."""
        rows, gates = _Permute.apply(u.value, routing.weights, routing.slot_of_token, routing.token_of_slot)
        again = None
        if not self.keep_rows:
            again = Remade(lambda tokens: kernels.permute(tokens, routing.token_of_slot), u.source())
        return Dispatched(Operand(rows, again), gates, routing.offsets, routing)

    def combine(self, rows: Tensor, dispatched: Dispatched, base: Tensor) -> Tensor:
        """base [T, D] plus the sum of every token's K rows, unweighted: gates are inside the rows already."""
        return _Unpermute.apply(rows, base, dispatched.routing.slot_of_token, dispatched.routing.token_of_slot)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, weights: Tensor, slot_of_token: Tensor, token_of_slot: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(slot_of_token)
        slots = slot_of_token.flatten().long()
        gates = torch.empty_like(weights).flatten().scatter_(0, slots, weights.flatten())
        return kernels.permute(u, token_of_slot), gates

    @staticmethod
    def backward(ctx: Any, drows: Tensor, dgates: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (slot_of_token,) = ctx.saved_tensors
        dweights = dgates.index_select(0, slot_of_token.flatten()).view(slot_of_token.shape)
        return kernels.unpermute(drows.contiguous(), slot_of_token), dweights, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, base: Tensor, slot_of_token: Tensor, token_of_slot: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_slot)
        return kernels.unpermute(rows, slot_of_token, base)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (token_of_slot,) = ctx.saved_tensors
        return kernels.permute(dy.contiguous(), token_of_slot), dy, None, None
