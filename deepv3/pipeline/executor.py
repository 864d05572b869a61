"""Runs the forward and backward passes of one optimizer step and hands back sums; it knows no optimizer.

One stage, micro-batches in ascending order, weight gradients as soon as they are known: the plain order that every
pipeline schedule must reproduce. Gradients end in each parameter's FP32 ``main_grad``; nothing here synchronises with
the device.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from deepv3.data.loader import Batch
from deepv3.model.transformer import Output, Transformer


@dataclass
class StepOut:
    """Sums over this rank's micro-batches; added over data ranks they are the figures of the global batch.

    loss_main, loss_mtp, loss_balance: 0-dim, FP64, mean over the global batch's tokens once summed (MTP a mean over
    depths without lambda, balance with alpha). counts: [n_moe, E] tokens routed to each expert. entropy, fanout:
    [n_moe], sums over tokens of the entropy of their gates (nats) and of the expert groups reached.
    """

    loss_main: Tensor
    loss_mtp: Tensor
    loss_balance: Tensor
    counts: Tensor
    entropy: Tensor
    fanout: Tensor

    def pack(self) -> Tensor:
        """All figures as one FP64 vector, so that one all-reduce serves them all."""
        losses = torch.stack([self.loss_main, self.loss_mtp, self.loss_balance])
        return torch.cat([losses, self.entropy, self.fanout, self.counts.flatten()])

    @staticmethod
    def unpack(vector: Tensor, n_moe: int) -> "StepOut":
        """The inverse of pack for a model with n_moe mixture layers."""
        losses, entropy, fanout, counts = vector.split([3, n_moe, n_moe, vector.numel() - 3 - 2 * n_moe])
        return StepOut(losses[0], losses[1], losses[2], counts.view(n_moe, -1) if n_moe else counts, entropy, fanout)


def _add(total: StepOut | None, out: Output) -> StepOut:
    new = StepOut(*(getattr(out, name).detach().double() for name in StepOut.__dataclass_fields__))
    if total is None:
        return new
    return StepOut(*(getattr(total, name) + getattr(new, name) for name in StepOut.__dataclass_fields__))


class Executor:
    """Forward and backward of micro-batches through one whole model on one device."""

    def __init__(self, model: Transformer, device: torch.device):
        self.model = model
        self.device = device

    def _forward(self, batch: Batch, loss_scale: float, mtp_weight: float) -> Output:
        tokens = batch.tokens.to(self.device, non_blocking=True)
        documents = None if batch.documents is None else batch.documents.to(self.device, non_blocking=True)
        return self.model(tokens, loss_scale=loss_scale, mtp_weight=mtp_weight, documents=documents)

    def run(self, batches: Iterable[Batch], loss_scale: float, mtp_weight: float) -> StepOut:
        """One step's micro-batches. loss_scale: 1 / (trained tokens of the global batch) (V3 Eq. 24-25)."""
        total: StepOut | None = None
        for batch in batches:
            out = self._forward(batch, loss_scale, mtp_weight)
            out.objective.backward()
            total = _add(total, out)
        assert total is not None, "a step has at least one micro-batch on every rank"
        return total

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], loss_scale: float) -> StepOut:
        """The same sums without gradients."""
        self.model.eval()
        total: StepOut | None = None
        for batch in batches:
            total = _add(total, self._forward(batch, loss_scale, 0.0))
        self.model.train()
        assert total is not None, "validation has at least one micro-batch on every rank"
        return total
