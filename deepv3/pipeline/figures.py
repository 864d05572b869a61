"""What a step reports: sums that add up over micro-batches, stages and data ranks."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class StepOut:
    """Sums over this rank's micro-batches; added over all ranks they are the figures of the global batch.

    loss_main, loss_mtp, loss_balance: 0-dim, FP64, mean over the global batch's tokens once summed (MTP a mean over
    depths without lambda, balance with alpha). counts: [n_moe, E] tokens routed to each expert. entropy, fanout:
    [n_moe], sums over tokens of the entropy of their gates (nats) and of the expert groups reached. Layers of other
    ranks have zeros.
    """

    loss_main: Tensor
    loss_mtp: Tensor
    loss_balance: Tensor
    counts: Tensor
    entropy: Tensor
    fanout: Tensor

    def add_(self, other: "StepOut") -> None:
        """Add another micro-batch's or stage's sums."""
        for field in fields(self):
            getattr(self, field.name).add_(getattr(other, field.name))

    def pack(self) -> Tensor:
        """All figures as one FP64 vector, so that one all-reduce serves them all."""
        losses = torch.stack([self.loss_main, self.loss_mtp, self.loss_balance])
        return torch.cat([losses, self.entropy, self.fanout, self.counts.flatten()])

    @staticmethod
    def unpack(vector: Tensor, n_moe: int) -> "StepOut":
        """The inverse of pack for a model with n_moe mixture layers."""
        losses, entropy, fanout, counts = vector.split([3, n_moe, n_moe, vector.numel() - 3 - 2 * n_moe])
        return StepOut(losses[0], losses[1], losses[2], counts.view(n_moe, -1) if n_moe else counts, entropy, fanout)

    @staticmethod
    def zeros(n_moe: int, experts: int, device: torch.device) -> "StepOut":
        """Nothing yet."""
        sizes = ((), (), (), (n_moe, experts), (n_moe,), (n_moe,))
        return StepOut(*(torch.zeros(size, dtype=torch.float64, device=device) for size in sizes))
