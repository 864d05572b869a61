"""Where a router's choice is no choice: positions that two correct programs may compute differently.

Routing is discontinuous. Where a token's choice of experts hangs on the last bits of a score, programs that sum in
another order differ by a whole expert, and with it every later position of the sequence. A comparison of logits leaves
these positions out; everywhere else it can be strict.
"""

import torch
from torch import Tensor

from deepv3.config.schema import ModelConfig
from deepv3.model.transformer import Transformer

NEAR_TIE = 2e-6  # FP32 scores closer than this may be ordered either way


def logits_and_sure(model: Transformer, tokens: Tensor, mtp: bool) -> tuple[Tensor, Tensor]:
    """Our logits of tokens [B, S], and where they are sure: bool [B, S or S - D], False from a near tie on."""
    length = tokens.shape[1] - (model.cfg.num_nextn_predict_layers if mtp else 0)
    undecided = torch.zeros(tokens.shape[0], length, dtype=torch.bool)

    def watch(router, inputs) -> None:
        scores = (inputs[0].value @ router.weight.T).sigmoid()
        margin = choice_margin(scores + router.e_score_correction_bias, model.cfg)
        undecided.logical_or_(margin.view(undecided.shape) < NEAR_TIE)

    handles = [router.register_forward_pre_hook(watch) for router in model.routers()]
    logits = model.logits(tokens, mtp)
    for handle in handles:
        handle.remove()
    return logits, ~undecided.cummax(dim=1).values


def choice_margin(choice: Tensor, cfg: ModelConfig) -> Tensor:
    """How far each token's routing is from another one: the smaller of the gaps at the cut between groups and between
    experts. choice: [T, E], scores with bias -> [T].
    """
    grouped = choice.view(len(choice), cfg.n_group, -1)
    best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1).sort(dim=-1, descending=True)
    closed = torch.ones_like(best.values, dtype=torch.bool).scatter(1, best.indices[:, : cfg.topk_group], False)
    experts = grouped.masked_fill(closed[..., None], -torch.inf).flatten(1).sort(dim=-1, descending=True).values
    margins = [
        row[:, cut - 1] - row[:, cut]
        for row, cut in ((best.values, cfg.topk_group), (experts, cfg.num_experts_per_tok))
        if cut < row.shape[1]
    ]
    return torch.stack(margins).amin(0) if margins else torch.full((len(choice),), torch.inf)
