"""Sampling by full forward passes: every new token costs one pass over the whole sequence.

The plainest decoder there is, kept as the oracle of faster ones; O(n^2) work that a cache of latents would save.
Rows of a batch have the same length, so no padding and no mask is needed.
"""

import torch
from torch import Tensor

from deepv3.model.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer, ids: Tensor, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
) -> Tensor:
    """Continue each row of ids [B, S] int64 by max_new_tokens tokens; returns [B, S + max_new_tokens].

    temperature: 0 takes the likeliest token (ties to the smaller id), else logits are divided by it. top_p: keep the
    likeliest tokens whose probability sums to at least this. A context longer than max_position_embeddings is cut from
    the left. The same seed gives the same draws on every device.
    """
    assert ids.dim() == 2 and ids.shape[1] > 0, f"ids must be [batch, length >= 1], not {tuple(ids.shape)}"
    window = model.cfg.max_position_embeddings
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    model.eval()
    for _ in range(max_new_tokens):
        logits = model.logits(ids[:, -window:])[:, -1].float()
        ids = torch.cat([ids, choose(logits, temperature, top_p, generator)[:, None]], dim=1)
    model.train(training)
    return ids


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token per row. logits: [B, V] fp32 -> [B] int64. The generator lives on the CPU.

    1. Likeliest first. 2. Drop what lies beyond the nucleus, the likeliest never. 3. Invert the summed distribution.
    """
    if temperature <= 0:
        return logits.argmax(dim=-1)
    probability, order = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = probability.cumsum(dim=-1) - probability
    probability = probability.masked_fill((before >= top_p) & (before > 0), 0.0)
    cumulative = probability.cumsum(dim=-1)
    draw = torch.rand(logits.shape[0], 1, generator=generator).to(logits.device) * cumulative[:, -1:]
    rank = torch.searchsorted(cumulative, draw, right=True).clamp(max=logits.shape[-1] - 1)
    return order.gather(-1, rank).squeeze(-1)
