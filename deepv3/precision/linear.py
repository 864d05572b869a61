"""Linear maps of tokens and of tokens sorted by expert: one autograd function around three GEMMs.

    forward   y [R, N]   = x [R, K] @ w [N, K]^T
    backward  dx [R, K]  = dy [R, N] @ w [N, K]
              dw [N, K] += dy [R, N]^T @ x [R, K]      in FP32, see `wgrad.deliver`

With `offsets` (cumulative row ends per group) w is [G, N, K] and every row meets its group's matrix. The operands have
the model's format; where the run's recipe says FP8 for a module's weight, the module multiplies by `linear8` instead.
No biases: the architecture has none (V3 2.1).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import deepv3.kernels as kernels
from deepv3.precision.linear8 import Weight8, linear8
from deepv3.precision.recipe import Recipe
from deepv3.precision.saved import Kept, Operand, Remade, operand
from deepv3.precision.weights8 import WeightCodes
from deepv3.precision.wgrad import WeightGradQueue, deliver


def multiply(x: Tensor, weight: Tensor, offsets: Tensor | None = None, full: bool = False) -> Tensor:
    """x @ w^T in x's format; `full` keeps the FP32 sum of the product instead of rounding it (FP64 stays FP64)."""
    if offsets is not None:
        return kernels.grouped_mm(x, weight, offsets)
    if not full or x.dtype in (torch.float32, torch.float64):
        return torch.mm(x, weight.t())
    if x.is_cuda:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return torch.mm(x.float(), weight.float().t())


def input_gradient(dy: Tensor, weight: Tensor, offsets: Tensor | None = None) -> Tensor:
    """dx = dy @ w."""
    return torch.mm(dy, weight) if offsets is None else kernels.grouped_mm_t(dy, weight, offsets)


def weight_gradient(
    weight: Tensor, dy: Tensor, x: Kept | Remade, offsets: Tensor | None, queue: WeightGradQueue | None
) -> Tensor | None:
    """dw = dy^T @ x, now or when the queue is flushed; x is fetched only then."""

    def write(buffer: Tensor, accumulate: bool) -> None:
        if offsets is None:
            kernels.dense_wgrad_(buffer, dy, x(), accumulate)
        else:
            kernels.grouped_wgrad_(buffer, dy, x(), offsets, accumulate)

    return deliver(weight, write, queue)


class _Linear(torch.autograd.Function):
    """The weight travels as an attribute: ``main_grad`` must be found on the parameter object itself, and saved
    tensors may come back as aliases (activation checkpointing)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        offsets: Tensor | None,
        again: Remade | None,
        queue: WeightGradQueue | None,
        full: bool,
    ) -> Tensor:
        ctx.weight, ctx.queue, ctx.dtype, ctx.again = weight, queue, x.dtype, None
        if ctx.needs_input_grad[1] and again is not None:
            ctx.again = again.reserve()
        ctx.save_for_backward(x if ctx.needs_input_grad[1] and again is None else None, offsets)
        return multiply(x, weight, offsets, full)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, offsets = ctx.saved_tensors
        dy = dy.to(ctx.dtype).contiguous()
        dx = input_gradient(dy, ctx.weight, offsets) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = weight_gradient(ctx.weight, dy, ctx.again or Kept(x), offsets, ctx.queue)
            ctx.again = None
        return dx, dw, None, None, None, None


def linear(
    x: Tensor | Operand,
    weight: Tensor,
    offsets: Tensor | None = None,
    queue: WeightGradQueue | None = None,
    full: bool = False,
) -> Tensor:
    """Differentiable `multiply`. x: [R, K]; weight: [N, K], or [G, N, K] with offsets [G] int32. Returns [R, N]."""
    value, again, *_ = operand(x)
    return _Linear.apply(value, weight, offsets, again, queue, full)


class Place(NamedTuple):
    """Where a module's parameters live, in which format, where its matrix gradients wait (None: nowhere), and which
    products are FP8 (None: none)."""

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    queue: WeightGradQueue | None = None
    recipe: Recipe | None = None

    def parameter(self, *shape: int) -> nn.Parameter:
        """Uninitialised; `model.init` fills it."""
        return nn.Parameter(torch.empty(shape, device=self.device, dtype=self.dtype))

    def weight8(self, weight: Tensor, role: str) -> Weight8 | None:
        """The weight of this role with its FP8 codes; None where its products are not FP8."""
        if self.recipe is None or not self.recipe.fp8(role):
            return None
        return Weight8(weight, WeightCodes(weight, self.recipe[role]), self.recipe, self.queue)


DEFAULT = Place()


class Linear(nn.Module):
    """y = x @ weight^T for x [T, in]; weight: [out, in]; role: its row in the recipe."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        place: Place = DEFAULT,
        role: str = "",
    ) -> None:
        super().__init__()
        self.weight = place.parameter(out_features, in_features)
        self.queue, self.fp8 = place.queue, place.weight8(self.weight, role)

    def forward(self, x: Tensor | Operand) -> Tensor:
        if self.fp8 is not None:
            return linear8(operand(x), self.fp8)
        return linear(x, self.weight, queue=self.queue)


class GroupedLinear(nn.Module):
    """y[r] = x[r] @ weight[g]^T for the rows r of group g; weight: [groups, out, in]; role: its row in the recipe."""

    def __init__(
        self,
        groups: int,
        in_features: int,
        out_features: int,
        place: Place = DEFAULT,
        role: str = "",
    ) -> None:
        super().__init__()
        self.weight = place.parameter(groups, out_features, in_features)
        self.queue, self.fp8 = place.queue, place.weight8(self.weight, role)

    def forward(self, x: Tensor | Operand, offsets: Tensor) -> Tensor:
        """x: [R, in] sorted by group; offsets: [groups] int32, cumulative ends, in FP8 multiples of 128. Returns
        [R, out]."""
        if self.fp8 is not None:
            return linear8(operand(x), self.fp8, offsets)
        return linear(x, self.weight, offsets, self.queue)
