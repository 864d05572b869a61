"""From logits to tokens, and the plainest decoder there is: a forward pass over the whole sequence for every token.

O(n^2) work that a cache of latents saves (decode.py); kept as its oracle. Rows of a batch have the same length here, so
no padding and no mask is needed.
"""

import torch
from torch import Tensor

from deepv3.model.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer, ids: Tensor, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
) -> Tensor:
    """Continue each row of ids [B, S] int64 by max_new_tokens tokens; returns [B, S + max_new_tokens].

    temperature, top_p: see `distribution`. A context longer than max_position_embeddings is cut from the left. The same
    seed gives the same draws on every device.
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
    """One token per row. logits: [B, V] fp32 -> [B] int64. The generator lives on the CPU."""
    return draw(distribution(logits, temperature, top_p), generator)


def distribution(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """What a token is drawn from. logits: [..., V] fp32. Returns [..., V], sums to 1.

    temperature: 0 takes the likeliest token (ties to the smaller id), else logits are divided by it. top_p: keep the
    likeliest tokens whose probability sums to at least this (the nucleus), the very likeliest always.
    """
    if temperature <= 0:
        return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits.dtype)
    probability = (logits / temperature).softmax(dim=-1)
    if top_p >= 1:
        return probability
    ranked, order = probability.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(dim=-1) - ranked
    ranked = ranked.masked_fill((before >= top_p) & (before > 0), 0.0)
    kept = torch.zeros_like(probability).scatter_(-1, order, ranked)
    return kept / kept.sum(dim=-1, keepdim=True)


def draw(probability: Tensor, generator: torch.Generator) -> Tensor:
    """One id per row by inverting the summed distribution. probability: [R, V], up to a factor per row -> [R] int64."""
    summed = probability.double().cumsum(dim=-1)
    places = torch.rand(probability.shape[0], 1, generator=generator, dtype=torch.float64).to(probability.device)
    ids = torch.searchsorted(summed, places * summed[:, -1:], right=True)
    return ids.clamp(max=probability.shape[-1] - 1).squeeze(-1)
