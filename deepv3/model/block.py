"""One transformer block, whole or in pieces (V3 2.1, 3.2.1).

    x = x + MLA(norm(x));  x = x + FFN(norm(x))

The pieces are what a pipeline interleaves with another micro-batch's; `forward` is their composition, nothing else:

    attention(x)           -> x, u, routing     norm, MLA, residual, norm, router
    dispatch(u, routing)   -> dispatched        tokens travel to their experts ...
    shared(u, x)           -> base              ... while the shared expert (or the dense layer) works
    experts(dispatched)    -> rows
    combine(rows, dispatched, base) -> x        rows travel back and are summed

A dense block has the same five, with nothing to dispatch. A pipeline that cuts the graph between pieces replaces the
tensors by detached ones; `u` is an `Operand`, so ``u._replace(value=...)``.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepv3.config.schema import ModelConfig
from deepv3.model.dispatch import Dispatched, LocalDispatch
from deepv3.model.layers import MLP, RMSNorm
from deepv3.model.mla import MLA, Layout
from deepv3.model.moe import MoE
from deepv3.model.router import Routing
from deepv3.precision.linear import DEFAULT, Place
from deepv3.precision.saved import Operand


class Block(nn.Module):
    """Layer `index`: dense below first_k_dense_replace, mixture of experts from there on.

    recompute: what backward computes again. "none": expert rows and SwiGLU outputs only. "selective": norm outputs and
    MLA up-projections too (V3 3.2.3). "full": everything but the block's input. Gradients are the same, bit for bit; in
    FP8 those of "full" differ a little, because it keeps no attention output and so rounds none to 12 bits.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        index: int,
        recompute: str = "none",
        dispatcher: LocalDispatch | None = None,
        place: Place = DEFAULT,
    ) -> None:
        super().__init__()
        self.full = recompute == "full"
        remake = recompute == "selective"
        d, eps = cfg.hidden_size, cfg.rms_norm_eps
        dense = index < cfg.first_k_dense_replace
        query = "q_proj" if cfg.q_lora_rank is None else "q_a_proj"
        self.input_layernorm = RMSNorm(d, eps, remake, place, feeds=(query, "kv_a_proj_with_mqa"))
        self.self_attn = MLA(cfg, remake, place, packs=not self.full)
        feeds = ("gate_up_proj",) if dense else ("gate", "gate_up_proj")
        self.post_attention_layernorm = RMSNorm(d, eps, remake, place, feeds=feeds)
        self.mlp: MoE | MLP
        if dense:
            self.mlp = MLP(d, cfg.intermediate_size, place)
        else:
            self.mlp = MoE(cfg, dispatcher or LocalDispatch(self.full, place.recipe), place)

    def forward(self, x: Tensor, layout: Layout) -> tuple[Tensor, Routing | None]:
        """x: [T, D]. Returns the new x and the layer's routing (None for a dense layer)."""
        if self.full and torch.is_grad_enabled():
            return checkpoint(self._forward, x, layout, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x, layout)

    def _forward(self, x: Tensor, layout: Layout) -> tuple[Tensor, Routing | None]:
        x, u, routing = self.attention(x, layout)
        dispatched = self.dispatch(u, routing)
        base = self.shared(u, x)
        rows = self.experts(dispatched)
        return self.combine(rows, dispatched, base), routing

    def attention(self, x: Tensor, layout: Layout) -> tuple[Tensor, Operand, Routing | None]:
        """Returns the residual stream after attention, the normed input of the feed-forward, and its routing."""
        h, x = self.input_layernorm.with_stream(x)
        u, x = self.post_attention_layernorm.with_stream(self.self_attn(h, layout), residual=x)
        return x, u, self.mlp.gate(u, layout.seq_len) if isinstance(self.mlp, MoE) else None

    @property
    def moe(self) -> MoE:
        assert isinstance(self.mlp, MoE), "a dense block has no experts"
        return self.mlp

    def dispatch(self, u: Operand, routing: Routing | None) -> Dispatched | None:
        return None if routing is None else self.moe.dispatcher.dispatch(u, routing)

    def shared(self, u: Operand, x: Tensor) -> Tensor:
        """x plus everything that needs no other token's rank: shared experts, or the dense feed-forward."""
        local = self.mlp.shared_experts if isinstance(self.mlp, MoE) else self.mlp
        return x if local is None else x + local(u)

    def experts(self, dispatched: Dispatched | None) -> Tensor | None:
        return None if dispatched is None else self.moe.dispatcher.work(dispatched, self.moe.experts)

    def combine(self, rows: Tensor | None, dispatched: Dispatched | None, base: Tensor) -> Tensor:
        return base if rows is None or dispatched is None else self.moe.dispatcher.combine(rows, dispatched, base)
