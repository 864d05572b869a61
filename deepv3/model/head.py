"""Output head and cross-entropy over chunks of rows: the full logits never exist.

Per chunk: logits = h @ W^T; loss and dlogits (in place); dh = dlogits @ W; dW += dlogits^T @ h. Gradients are made in
forward, because the factor of every loss is known before it starts, so logits are neither kept nor computed twice.

Contract: the term returned enters the objective with factor 1 and the objective is what backward starts from, with
gradient 1 (checked on CPU; on a GPU the check would wait for the device). With ``main_grad`` the weight's gradient is
in place once forward is done. Its GEMM never waits in a queue: that would keep dlogits, [T, V].
"""

from typing import Any

import torch
from torch import Tensor, nn

import deepv3.kernels as kernels
from deepv3.precision.linear import DEFAULT, Place, input_gradient, multiply
from deepv3.precision.wgrad import deliver


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, scale: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        dhidden = torch.empty_like(hidden)
        losses = []

        def write(buffer: Tensor, accumulate: bool) -> None:
            for start in range(0, hidden.shape[0], chunk):
                rows = slice(start, start + chunk)
                logits = multiply(hidden[rows], weight)
                losses.append(kernels.cross_entropy_(logits, labels[rows], scale).sum())
                dhidden[rows] = input_gradient(logits, weight)
                kernels.dense_wgrad_(buffer, logits, hidden[rows], accumulate or start > 0)

        dweight = deliver(weight, write)
        ctx.save_for_backward(dhidden, dweight)
        total = torch.stack(losses).sum()
        ctx.mark_non_differentiable(total)
        return total * scale, total

    @staticmethod
    def backward(ctx: Any, dterm: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if not dterm.is_cuda:
            assert dterm.item() == 1.0, f"the loss term must enter the objective with factor 1, not {dterm.item()}"
        dhidden, dweight = ctx.saved_tensors
        return dhidden, dweight, None, None, None


class Head(nn.Module):
    """weight: [V, D]. Main model and every prediction depth use the same one (V3 2.2)."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        chunk: int = 2048,
        place: Place = DEFAULT,
    ) -> None:
        super().__init__()
        self.weight = place.parameter(vocab_size, hidden_size)
        self.chunk = chunk

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of hidden [T, D]: [T, V]."""
        return multiply(hidden, self.weight)

    def loss(self, hidden: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(scale * sum of cross-entropies, differentiable; the plain sum for reports), both 0-dim FP32.

        hidden: [T, D]; labels: [T] int64, -100 counts for nothing; scale: this loss's factor in the objective.
        """
        labels = labels.reshape(-1)
        if torch.is_grad_enabled():
            return _ChunkedLoss.apply(hidden, self.weight, labels, scale, self.chunk)
        pairs = zip(hidden.split(self.chunk), labels.split(self.chunk))
        total = torch.stack([kernels.cross_entropy(self(rows), targets).sum() for rows, targets in pairs]).sum()
        return total * scale, total
