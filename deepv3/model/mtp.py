"""Multi-token prediction: module k predicts one token further than module k - 1 (V3 2.2, Eq. 21-23).

    h^k = norm(Block(W_eh [enorm(emb(t_{i+k})) ; hnorm(h^{k-1}_i)]))

The embedding comes first, as in released weights (the report writes the hidden state first); h^0 is the main model's
state after its final norm, and the next depth is fed after this module's own norm: what every reader of the exported
weights computes. Embedding and head are the main model's, passed in or applied by the caller.
"""

import torch
from torch import Tensor, nn

from deepv3.config.schema import ModelConfig
from deepv3.model.block import Block
from deepv3.model.dispatch import LocalDispatch
from deepv3.model.layers import RMSNorm
from deepv3.model.mla import Layout
from deepv3.model.router import Routing
from deepv3.precision.linear import DEFAULT, Linear, Place
from deepv3.precision.saved import Operand, Remade


class MTP(nn.Module):
    """One prediction depth; its block is layer num_hidden_layers + depth - 1, a mixture of experts."""

    def __init__(
        self,
        cfg: ModelConfig,
        index: int,
        recompute: str = "none",
        dispatcher: LocalDispatch | None = None,
        place: Place = DEFAULT,
    ) -> None:
        super().__init__()
        d, eps, self.remake = cfg.hidden_size, cfg.rms_norm_eps, recompute != "none"
        self.enorm = RMSNorm(d, eps, self.remake, place)
        self.hnorm = RMSNorm(d, eps, self.remake, place)
        self.eh_proj = Linear(2 * d, d, place, "eh_proj")
        self.block = Block(cfg, index, recompute, dispatcher, place)
        self.norm = RMSNorm(d, eps, place=place)

    def forward(self, embedded: Tensor, hidden: Tensor, layout: Layout) -> tuple[Tensor, Routing | None]:
        """embedded: [T, D], embeddings of the tokens k places ahead; hidden: [T, D]. Returns h^k and the routing."""
        x, routing = self.block(self.join(embedded, hidden), layout)
        return self.norm(x), routing

    def join(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """The block's input: W_eh [enorm(embedded) ; hnorm(hidden)] (V3 Eq. 21)."""
        e, h = self.enorm.operand(embedded), self.hnorm.operand(hidden)
        again = Remade(_joined, e.source(), h.source()) if self.remake else None
        return self.eh_proj(Operand(_joined(e.value, h.value), again))


def _joined(e: Tensor, h: Tensor) -> Tensor:
    return torch.cat((e, h), dim=-1)
