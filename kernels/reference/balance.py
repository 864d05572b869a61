"""Sequence-wise balance loss of the mixture of experts (V3 Eq. 17-20): plain torch."""

import torch
from torch import Tensor

from deepv3.kernels.reference.norm import wide
from deepv3.kernels.reference.router import largest


def _balance_parts(logits: Tensor, top_k: int, seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """scores [B, S, E], their share of the token's sum [B, S, E], and f [B, E] of V3 Eq. 18, chosen on raw scores."""
    scores = torch.sigmoid(wide(logits)).view(-1, seq_len, logits.shape[-1])
    share = scores / scores.sum(-1, keepdim=True)
    chosen = torch.zeros_like(scores).view(logits.shape).scatter_(1, largest(logits, top_k), 1.0).view_as(scores)
    return scores, share, chosen.sum(1) * (logits.shape[-1] / (top_k * seq_len))


def balance_loss(logits: Tensor, top_k: int, seq_len: int) -> Tensor:
    """sum_i f_i P_i of every sequence (V3 Eq. 17-20 without alpha); at perfect balance 1.

    f_i = E / (K S) * tokens whose raw top-K holds i (no bias, no groups, no gradient); P_i = mean over the sequence of
    the score's share. logits: [B * seq_len, E]. Returns [B] FP32.
    """
    _, share, fraction = _balance_parts(logits, top_k, seq_len)
    return (fraction * share.mean(1)).sum(-1)


def balance_loss_backward(dloss: Tensor, logits: Tensor, top_k: int, seq_len: int) -> Tensor:
    """dlogits[t, j] = dloss[b] / S * (f_j - sum_i f_i share_i) * share_j * (1 - score_j): [B * seq_len, E]."""
    scores, share, fraction = _balance_parts(logits, top_k, seq_len)
    fraction = fraction[:, None]
    inner = (fraction * share).sum(-1, keepdim=True)
    return (dloss[:, None, None] / seq_len * (fraction - inner) * share * (1 - scores)).view(logits.shape)
