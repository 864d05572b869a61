"""Router: which experts a token visits, with what weight, and how unbalanced that is (V3 2.1.2, Eq. 13-20).

Logits and everything after them are FP32 (FP64 in FP64 models). The bias steers the choice only; weights and gradients
come from the unbiased scores. No token is dropped: the tables cover every (token, choice) pair. Nothing here
synchronises with the host.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import deepv3.kernels as kernels
from deepv3.config.schema import ModelConfig
from deepv3.precision.linear import DEFAULT, Place, linear
from deepv3.precision.saved import Operand

TINY = 1e-20  # as in the kernels: keeps a token whose chosen scores all underflow finite


class Routing(NamedTuple):
    """Choice of one layer for T tokens, K experts each, and the tables that sort them by expert."""

    indices: Tensor  # [T, K] int32
    weights: Tensor  # [T, K] FP32, differentiable
    balance: Tensor  # [B] FP32, sum_i f_i P_i per sequence without alpha, differentiable
    slot_of_token: Tensor  # [T, K] int32, see kernels.routing_tables
    token_of_slot: Tensor  # [R] int32; R = T * K, more where experts' rows are filled up (FP8)
    offsets: Tensor  # [E] int32
    counts: Tensor  # [E] int32


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bias: Tensor, cfg: ModelConfig, seq_len: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale = cfg.routed_scaling_factor
        if cfg.force_balance:
            indices, weights = _round_robin(logits, cfg.num_experts_per_tok, scale)
        else:
            indices, weights = kernels.router_topk(
                logits, bias, cfg.num_experts_per_tok, cfg.n_group, cfg.topk_group, scale
            )
        if cfg.aux_loss_alpha > 0:
            balance = kernels.balance_loss(logits, cfg.num_experts_per_tok, seq_len)
        else:  # it would be multiplied by zero
            balance = logits.new_zeros(logits.shape[0] // seq_len)
        ctx.save_for_backward(logits, indices)
        ctx.cfg, ctx.seq_len = cfg, seq_len
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return indices, weights, balance

    @staticmethod
    def backward(ctx: Any, _: None, dweights: Tensor | None, dbalance: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, indices = ctx.saved_tensors
        cfg, dlogits = ctx.cfg, None
        if dweights is not None:
            dlogits = kernels.router_topk_backward(dweights.contiguous(), logits, indices, cfg.routed_scaling_factor)
        if dbalance is not None and cfg.aux_loss_alpha > 0:
            aux = kernels.balance_loss_backward(dbalance.contiguous(), logits, cfg.num_experts_per_tok, ctx.seq_len)
            dlogits = aux if dlogits is None else dlogits.add_(aux)
        return dlogits, None, None, None


def _round_robin(logits: Tensor, top_k: int, scale: float) -> tuple[Tensor, Tensor]:
    """Token t's choice k is expert (t K + k) mod E; weights are the scores found there, normalised as usual."""
    tokens, experts = logits.shape
    indices = torch.arange(tokens * top_k, device=logits.device).remainder_(experts).view(tokens, top_k)
    chosen = torch.sigmoid(logits.gather(1, indices))
    return indices.int(), scale * chosen / (chosen.sum(-1, keepdim=True) + TINY)


class Router(nn.Module):
    """Gate of one MoE layer. The bias is state, not a parameter: no gradient, no decay; see `update_bias`."""

    e_score_correction_bias: Tensor

    def __init__(
        self,
        cfg: ModelConfig,
        place: Place = DEFAULT,
    ) -> None:
        super().__init__()
        self.cfg, self.queue = cfg, place.queue
        self.align = 1 if place.recipe is None else place.recipe.align
        self.weight = place.parameter(cfg.n_routed_experts, cfg.hidden_size)
        bias = torch.zeros(cfg.n_routed_experts, device=place.device, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, u: Operand, seq_len: int) -> Routing:
        """u: [T, D], whole sequences of seq_len tokens."""
        logits = linear(u, self.weight, queue=self.queue, full=True)
        indices, weights, balance = _Choose.apply(logits, self.e_score_correction_bias, self.cfg, seq_len)
        return Routing(
            indices, weights, balance, *kernels.routing_tables(indices, self.cfg.n_routed_experts, self.align)
        )

    @torch.no_grad()
    def update_bias(self, counts: Tensor, speed: float | Tensor) -> None:
        """b_i += speed * sign(mean(c) - c_i) (V3 2.1.2), once per optimizer step.

        counts: [E], of the global batch. speed: a number, or a 0-dim tensor on the same device (no synchronisation).
        """
        counts = counts.to(torch.float64)
        self.e_score_correction_bias.add_(torch.sign(counts.mean() - counts) * speed)


@torch.no_grad()
def statistics(routings: Sequence[Routing], cfg: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Figures of all layers at once, as sums over tokens: counts [n, E] int32, entropy [n] and fanout [n] FP32.

    entropy: of a token's K gates, nats, ln K when they are equal. fanout: distinct expert groups (nodes) of a token.
    """
    if not routings:
        counts = torch.zeros(0, cfg.n_routed_experts, dtype=torch.int32, device=device)
        return counts, counts.sum(1, dtype=torch.float32), counts.sum(1, dtype=torch.float32)
    gates = torch.stack([routing.weights for routing in routings]).float() / cfg.routed_scaling_factor
    groups = torch.stack([routing.indices for routing in routings]) // (cfg.n_routed_experts // cfg.n_group)
    reached = gates.new_zeros(*gates.shape[:2], cfg.n_group).scatter_(2, groups.long(), 1.0)
    counts = torch.stack([routing.counts for routing in routings])
    return counts, torch.special.entr(gates).sum((1, 2)), reached.sum((1, 2))
