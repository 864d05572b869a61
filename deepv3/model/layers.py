"""RMSNorm, embedding and the SwiGLU feed-forward as modules with hand-written backwards around `deepv3.kernels`.

Activations are flat over tokens, [T, D] with T = batch x sequence. Saved for backward: a norm keeps its input and one
statistic per token; a feed-forward keeps [gate | up] and makes the SwiGLU output again (V3 3.2.3, 3.4).
"""

from typing import Any

import torch
from torch import Tensor, nn

import deepv3.kernels as kernels
from deepv3.precision.linear import DEFAULT, Linear, Place, input_gradient, multiply, weight_gradient
from deepv3.precision.saved import Kept, Operand, Remade
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

    `remake` drops the output after forward and computes it again in backward (V3 3.2.3).
    """

    def __init__(
        self,
        width: int,
        eps: float,
        remake: bool = False,
        place: Place = DEFAULT,
    ) -> None:
        super().__init__()
        self.weight = place.parameter(width)
        self.eps, self.remake = eps, remake

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, D]. Returns [T, D]."""
        return _RMSNorm.apply(x, None, self.weight, self.eps, False)

    def operand(self, x: Tensor, scale: float = 1.0) -> Operand:
        """norm(x) * scale as input of GEMMs."""
        y = self(x)
        return self._operand(y if scale == 1.0 else y * scale, x, scale)

    def with_stream(self, x: Tensor, residual: Tensor | None = None) -> tuple[Operand, Tensor]:
        """(norm(x + residual), x + residual): the sum is the residual stream that goes on."""
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


class MLP(nn.Module):
    """down(silu(gate(u)) * up(u)): dense feed-forward and shared expert. gate_up_proj holds the gate's rows first."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        place: Place = DEFAULT,
    ) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, place)
        self.down_proj = Linear(intermediate_size, hidden_size, place)

    def forward(self, u: Tensor | Operand) -> Tensor:
        """u: [T, D]. Returns [T, D]."""
        return gated_down(self.gate_up_proj(u), self.down_proj.weight, queue=self.down_proj.queue)
