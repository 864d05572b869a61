"""Router of the mixture of experts (V3 Eq. 13-20): choice, gates and balance loss.

Plain torch. Every choice breaks ties to the smaller index, by stable sorting.
"""

import torch
from torch import Tensor

from deepv3.kernels.reference.norm import wide

TINY = 1e-20  # keeps a token whose chosen scores all underflow finite; far below any normal sum


def largest(scores: Tensor, count: int) -> Tensor:
    """Indices [.., count] of the largest scores of the last dimension, descending; equal scores by smaller index."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]


def router_topk(
    logits: Tensor, bias: Tensor, top_k: int, n_group: int, topk_group: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Choose experts and weigh them (V3 2.1.2).

    1. scores = sigmoid(logits); choice = scores + bias.
    2. A group's score is the sum of its two best choices; the best `topk_group` groups stay, the others become -inf.
    3. indices = the `top_k` largest choices, descending.
    4. weights = scale * scores[indices] / (sum + 1e-20), from the scores without bias.
    logits: [T, E] FP32; bias: [E] FP32. Returns indices [T, K] int32 and weights [T, K] FP32.
    """
    scores = torch.sigmoid(wide(logits))
    choice = scores + bias
    tokens, experts = choice.shape
    if topk_group < n_group:
        groups = choice.view(tokens, n_group, experts // n_group)
        group_scores = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
        keep = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, largest(group_scores, topk_group), True)
        choice = groups.masked_fill(~keep[..., None], float("-inf")).view(tokens, experts)
    indices = largest(choice, top_k)
    chosen = scores.gather(1, indices)
    return indices.int(), scale * chosen / (chosen.sum(-1, keepdim=True) + TINY)


def router_topk_backward(dweights: Tensor, logits: Tensor, indices: Tensor, scale: float) -> Tensor:
    """Gradient through the weights only; the choice has none. Returns dlogits [T, E], zero where not chosen."""
    indices = indices.long()
    chosen = torch.sigmoid(wide(logits)).gather(1, indices)
    total = chosen.sum(-1, keepdim=True) + TINY
    inner = (dweights * chosen).sum(-1, keepdim=True) / total
    dchosen = scale * (dweights - inner) / total
    return torch.zeros_like(wide(logits)).scatter_(1, indices, dchosen * chosen * (1 - chosen))


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
