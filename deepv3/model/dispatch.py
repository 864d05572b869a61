"""Bringing tokens to their experts and the experts' rows back to their tokens.

A dispatcher has `held`, `dispatch` and `combine`, and is handed to the MoE layer from outside: the layer never asks
where experts live. Here all of them are local and a permutation does; `exchange` brings tokens to other ranks and back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import deepv3.kernels as kernels
from deepv3.model.router import Routing
from deepv3.precision.formats import BF16, Columns, Rows, placeholder, rows_of, turned
from deepv3.precision.recipe import COMBINE_GRADIENT, EXPERT_INPUT, Recipe
from deepv3.precision.saved import Operand, Passed, Remade, Stored, used_here


class Dispatched(NamedTuple):
    """Rows sorted by expert, ready for the grouped GEMMs, and what `combine` needs to undo it."""

    rows: Operand  # [R, D]
    gates: Tensor  # [R] FP32, router weight of every row
    offsets: Tensor  # [G] int32, cumulative row ends of the experts held here
    routing: Routing  # tables and offsets of the experts held here; indices, weights, counts and balance as they came
    journey: tuple[Any, ...] = ()  # the exchanges between ranks that brought the rows
    passed: Passed | None = None  # where the gradient of the experts' rows arrives in FP8


@dataclass
class Load:
    """What the dispatches of a step needed at most, all layers and micro-batches; host numbers, free to read.

    rows: of its experts on this rank; received: copies of tokens that came to it, each serving one or several experts;
    crossed: rows this rank sent to other nodes (forward and recomputation, a sum).
    """

    rows: int = 0
    received: int = 0
    crossed: int = 0

    def note(self, rows: int, received: int, crossed: int = 0) -> None:
        """One dispatch."""
        self.rows, self.received = max(self.rows, rows), max(self.received, received)
        self.crossed += crossed


class LocalDispatch:
    """All experts in this process; every (token, choice) pair becomes a row, so R = T K and none is dropped (V3 2.1.2).

    The rows are made again in backward from the tokens, K times smaller; `keep_rows` keeps them, for use under
    activation checkpointing, which holds nothing but the block's input anyway. With a recipe the rows are FP8, copied
    from codes made once per token, and so is the gradient of their sum (V3 3.3.3); the sum itself is not.
    """

    def __init__(self, keep_rows: bool = False, recipe: Recipe | None = None) -> None:
        self.keep_rows, self.recipe = keep_rows, recipe
        self.load = Load()

    @property
    def align(self) -> int:
        """An expert's rows are filled up to a multiple of this."""
        return 1 if self.recipe is None else self.recipe.align

    def take_load(self) -> Load:
        """The load since the last call."""
        load, self.load = self.load, Load()
        return load

    def held(self, n_routed_experts: int) -> range:
        """The experts, by global number, whose matrices are in this process."""
        return range(n_routed_experts)

    def dispatch(self, u: Operand, routing: Routing) -> Dispatched:
        """u: [T, D]."""
        self.load.note(rows=routing.token_of_slot.shape[0], received=routing.indices.shape[0])
        return self._sort(u, routing.weights, routing)

    def _sort(self, u: Operand, weights: Tensor, routing: Routing) -> Dispatched:
        """Rows of u [N, D] and their weights [N, K] in the order of the routing's tables; slot -1 is no row."""
        fp8 = self.recipe is not None
        rows, gates = _Permute.apply(u.value, weights, routing.slot_of_token, routing.token_of_slot, fp8)
        sort = self._sorted if self.recipe is None else self._sorted8
        return Dispatched(sort(rows, u, routing.token_of_slot), gates, routing.offsets, routing, passed=self._passed())

    def _sorted(self, rows: Tensor, u: Operand, token_of_slot: Tensor) -> Operand:
        """The sorted rows, and how backward gets them."""

        def sorted_again(tokens: Tensor) -> Tensor:
            used_here(tokens)  # they may have arrived on another stream, whose next tensors must not lie on them
            return kernels.permute(tokens, token_of_slot)

        return Operand(rows, None if self.keep_rows else Remade(sorted_again, u.source()))

    def _sorted8(self, handle: Tensor, u: Operand, token_of_slot: Tensor) -> Operand:
        """The sorted rows' codes, and how backward gets them by columns. handle: what autograd knows of the rows."""
        assert self.recipe is not None
        codes, format = self._rows8(u), self.recipe[EXPERT_INPUT]
        assert codes is not None
        rows = Rows(*kernels.permute_fp8(*codes, token_of_slot))

        def sorted_again(tokens: Rows) -> Columns:
            used_here(tokens)
            return turned(*tokens, token_of_slot)

        columns = (
            Stored(turned, tuple(rows))
            if self.keep_rows
            else Remade(sorted_again, u._replace(rows=codes).rows_source(format))
        )
        return Operand(handle, rows=rows, columns=columns)

    def _rows8(self, u: Operand) -> Rows | None:
        """u's codes, where tokens travel as such."""
        return None if self.recipe is None else u.rows or rows_of(u.value, self.recipe[EXPERT_INPUT])

    def _passed(self) -> Passed | None:
        """A new way for the gradient of one dispatch's rows, where it is FP8."""
        if self.recipe is None or self.recipe[COMBINE_GRADIENT] == BF16:
            return None
        return Passed(self.recipe[COMBINE_GRADIENT])

    def work(self, dispatched: Dispatched, experts: Callable[[Dispatched], Tensor]) -> Tensor:
        """The experts' part, between the two: rows [R, D] of what `experts` makes of them."""
        return experts(dispatched)

    def combine(self, rows: Tensor, dispatched: Dispatched, base: Tensor) -> Tensor:
        """base [T, D] plus the sum of every token's K rows, unweighted: gates are inside the rows already."""
        return self._sum(rows, dispatched, base)

    def _sum(self, rows: Tensor, dispatched: Dispatched, base: Tensor | None) -> Tensor:
        """The rows of the routing's tables summed per token, onto `base` where there is one."""
        routing = dispatched.routing
        return _Unpermute.apply(rows, base, routing.slot_of_token, routing.token_of_slot, dispatched.passed)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, weights: Tensor, slot_of_token: Tensor, token_of_slot: Tensor, fp8: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(slot_of_token)
        slots, n_rows = slot_of_token.flatten().long(), token_of_slot.shape[0]
        gates = weights.new_zeros(n_rows + 1)  # the last is where choices without a row go
        gates.scatter_(0, torch.where(slots < 0, n_rows, slots), weights.flatten())
        rows = placeholder(u, n_rows, u.shape[1]) if fp8 else kernels.permute(u, token_of_slot)
        return rows, gates[:n_rows]

    @staticmethod
    def backward(ctx: Any, drows: Tensor, dgates: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (slot_of_token,) = ctx.saved_tensors
        dweights = torch.cat([dgates, dgates.new_zeros(1)])[slot_of_token.long()]  # -1 finds the zero
        return kernels.unpermute(drows.contiguous(), slot_of_token), dweights, None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        base: Tensor | None,
        slot_of_token: Tensor,
        token_of_slot: Tensor,
        passed: Passed | None,
    ) -> Tensor:
        ctx.save_for_backward(token_of_slot)
        ctx.passed = passed
        return kernels.unpermute(rows, slot_of_token, base)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (token_of_slot,) = ctx.saved_tensors
        dbase = dy if ctx.needs_input_grad[1] else None
        if ctx.passed is None:
            return kernels.permute(dy.contiguous(), token_of_slot), dbase, None, None, None
        ctx.passed.put(Rows(*kernels.permute_fp8(*ctx.passed.take(dy), token_of_slot)))
        return placeholder(dy, token_of_slot.shape[0], dy.shape[1]), dbase, None, None, None
