"""Router of the mixture of experts (V3 Eq. 13-16): choice of experts and their gates.

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
