"""Cross-entropy on a chunk of logits, with the gradient written over the logits: plain torch."""

import torch
from torch import Tensor

from deepv3.kernels.reference.norm import wide

IGNORED = -100  # label of a row that counts for nothing, as in torch


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """loss[n] = logsumexp(logits[n]) - logits[n, labels[n]]; 0 where the label is -100.

    logits: [N, V]; labels: [N] int64. Returns [N] FP32.
    """
    return torch.nn.functional.cross_entropy(wide(logits), labels, ignore_index=IGNORED, reduction="none")


def cross_entropy_(logits: Tensor, labels: Tensor, scale: float) -> Tensor:
    """The loss as above, unscaled; logits become scale * (softmax(logits) - onehot(label)), zero in ignored rows."""
    log_share = torch.log_softmax(wide(logits), dim=-1)
    loss = torch.nn.functional.nll_loss(log_share, labels, ignore_index=IGNORED, reduction="none")
    gradient = log_share.exp_()
    gradient.scatter_add_(1, labels.clamp(min=0)[:, None], torch.full_like(gradient[:, :1], -1.0)).mul_(scale)
    logits.copy_(gradient.masked_fill_((labels == IGNORED)[:, None], 0.0))
    return loss
