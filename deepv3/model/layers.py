"""RMSNorm, embedding and the SwiGLU feed-forward as modules with hand-written backwards around `deepv3.kernels`.

Activations are flat over tokens, [T, D] with T = batch x sequence. Saved for backward: a norm keeps its input and one
statistic per token; a feed-forward keeps [gate | up] and makes the SwiGLU output again (V3 3.2.3, 3.4). In FP8 both are
`precision`'s, by the names norm8 and feedforward8.
"""

from typing import Any

import torch
from torch import Tensor, nn

import deepv3.kernels as kernels
from deepv3.precision.feedforward8 import feed_forward8
from deepv3.precision.linear import (
    DEFAULT,
    GroupedLinear,
    Linear,
    Place,
    input_gradient,
    linear,
    multiply,
    weight_gradient,
)
from deepv3.precision.norm8 import rmsnorm8
from deepv3.precision.saved import Kept, Operand, Passed, Remade, operand
from deepv3.precision.wgrad import WeightGradQueue, deliver, deliver_value


class _RMSNorm(torch.autograd.Function):
    """y = norm(x [+ residual]); with `stream` also hands the sum on, so one backward kernel adds both gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, stream: bool) -> Any:
        y, rstd, summed = kernels.rmsnorm(x, weight, eps, residual)
        ctx.save_for_backward(summed, rstd)
        ctx.weight, ctx.has_residual = weight, residual is not None
        ctx.set_materialize_grads(False)
        return (y, summed) if stream else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dstream: Tensor | None = None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        summed, rstd = ctx.saved_tensors
        dstream = None if dstream is None else dstream.contiguous()
        dx, dweight = kernels.rmsnorm_backward(dy.contiguous(), summed, ctx.weight, rstd, dstream)
        dweight = deliver_value(ctx.weight, dweight) if ctx.needs_input_grad[2] else None
        return dx, dx if ctx.has_residual else None, dweight, None, None


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (Zhang 2019), statistics in FP32.

    `remake` drops the output after forward and computes it again in backward (V3 3.2.3). `feeds` are the linear maps
    that read the output, by their rows in the recipe: it is made in FP8 for those that want it.
    """

    def __init__(
        self,
        width: int,
        eps: float,
        remake: bool = False,
        place: Place = DEFAULT,
        feeds: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.weight = place.parameter(width)
        self.eps, self.remake = eps, remake
        self.fp8 = None if place.recipe is None else place.recipe.norm_result(feeds)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, D]. Returns [T, D]."""
        return _RMSNorm.apply(x, None, self.weight, self.eps, False)

    def operand(self, x: Tensor, scale: float = 1.0) -> Operand:
        """norm(x) * scale as input of GEMMs."""
        if self.fp8 is not None and scale == 1.0:
            return rmsnorm8(x, None, self.weight, self.eps, self.fp8, self.remake)[0]
        y = self(x)
        return self._operand(y if scale == 1.0 else y * scale, x, scale)

    def with_stream(self, x: Tensor, residual: Tensor | None = None) -> tuple[Operand, Tensor]:
        """(norm(x + residual), x + residual): the sum is the residual stream that goes on."""
        if self.fp8 is not None:
            return rmsnorm8(x, residual, self.weight, self.eps, self.fp8, self.remake)
        y, stream = _RMSNorm.apply(x, residual, self.weight, self.eps, True)
        return self._operand(y, stream, 1.0), stream

    def _operand(self, y: Tensor, x: Tensor, scale: float) -> Operand:
        if not self.remake:
            return Operand(y)
        x = x.detach()
        return Operand(y, Remade(lambda: self._value(x, scale)))

    def _value(self, x: Tensor, scale: float) -> Tensor:
        y = kernels.rmsnorm(x, self.weight, self.eps)[0]
        return y if scale == 1.0 else y * scale


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return weight.index_select(0, ids)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None]:  # type: ignore[override]
        (ids,) = ctx.saved_tensors

        def write(buffer: Tensor, accumulate: bool) -> None:
            if not accumulate:
                buffer.zero_()  # the kernel touches the rows of these ids only
            kernels.embedding_wgrad_(buffer, ids, dy.contiguous())

        return None, deliver(ctx.weight, write)


class Embedding(nn.Module):
    """Rows of a [V, D] table; main model and every prediction depth read the same one (V3 2.2)."""

    def __init__(self, rows: int, width: int, place: Place = DEFAULT) -> None:
        super().__init__()
        self.weight = place.parameter(rows, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [B, S] int64. Returns [B * S, D]."""
        return _Embedding.apply(tokens.reshape(-1), self.weight)


class _GatedDown(torch.autograd.Function):
    """out = (silu(gate) * up * gates) @ w_down^T with h = [gate | up].

    The router's gate enters before the down projection, so that summing the experts' rows needs no weight (V3 3.4);
    its gradient is the dot product of the projection's input gradient with the ungated output.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        gates: Tensor | None,
        weight: Tensor,
        offsets: Tensor | None,
        queue: WeightGradQueue | None,
    ) -> Tensor:
        ctx.save_for_backward(h, gates, offsets)
        ctx.weight, ctx.queue = weight, queue
        return multiply(kernels.swiglu(h, gates), weight, offsets)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h, gates, offsets = ctx.saved_tensors
        dout = dout.contiguous()
        dy = input_gradient(dout, ctx.weight, offsets)
        dh, dgates, y = kernels.swiglu_backward(dy, h, gates, want_output=True)
        dweight = None
        if ctx.needs_input_grad[2]:
            dweight = weight_gradient(ctx.weight, dout, Kept(y), offsets, ctx.queue)
        return dh, dgates, dweight, None, None


def gated_down(
    h: Tensor,
    weight: Tensor,
    gates: Tensor | None = None,
    offsets: Tensor | None = None,
    queue: WeightGradQueue | None = None,
) -> Tensor:
    """SwiGLU, gates and down projection. h: [R, 2I]; weight: [D, I], or [G, D, I] with offsets [G]; gates: [R] FP32."""
    return _GatedDown.apply(h, gates, weight, offsets, queue)


def feed_forward(
    x: Tensor | Operand,
    gate_up: Linear | GroupedLinear,
    down: Linear | GroupedLinear,
    gates: Tensor | None = None,
    offsets: Tensor | None = None,
    passed: Passed | None = None,
) -> Tensor:
    """down(silu(gate(x)) * up(x) * gates), by groups where there are offsets. x: [R, D]. Returns [R, D].

    passed: where the gradient of the result arrives, if it comes in FP8.
    """
    if gate_up.fp8 is not None and down.fp8 is not None:
        return feed_forward8(operand(x), gate_up.fp8, down.fp8, gates, offsets, passed)
    h = linear(x, gate_up.weight, offsets, gate_up.queue)
    return gated_down(h, down.weight, gates, offsets, down.queue)


class MLP(nn.Module):
    """down(silu(gate(u)) * up(u)): dense feed-forward and shared expert. gate_up_proj holds the gate's rows first."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        place: Place = DEFAULT,
    ) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, place, "gate_up_proj")
        self.down_proj = Linear(intermediate_size, hidden_size, place, "down_proj")

    def forward(self, u: Tensor | Operand) -> Tensor:
        """u: [T, D]. Returns [T, D]."""
        return feed_forward(u, self.gate_up_proj, self.down_proj)
