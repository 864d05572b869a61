"""Mixture of experts (V3 2.1.2, Eq. 12): y = base + sum over chosen experts of gate * FFN(u), shared experts in base.

A token's way: `gate` scores and chooses -> `dispatcher.dispatch` sorts rows by expert -> `experts`: grouped gate|up
GEMM, SwiGLU times gate, grouped down GEMM -> `dispatcher.combine` sums a token's rows onto base.
"""

from torch import Tensor, nn

from deepv3.config.schema import ModelConfig
from deepv3.model.dispatch import Dispatched, LocalDispatch
from deepv3.model.layers import MLP, feed_forward
from deepv3.model.router import Router
from deepv3.precision.linear import DEFAULT, GroupedLinear, Place


class Experts(nn.Module):
    """Routed experts of a layer, their matrices stacked: gate_up_proj [E, 2I, D], down_proj [E, D, I] for E `experts`.

    Saved for backward per row: [gate | up] and the gate. Rows and SwiGLU outputs are made again.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        experts: int,
        place: Place = DEFAULT,
    ) -> None:
        super().__init__()
        d, inner = cfg.hidden_size, cfg.moe_intermediate_size
        self.gate_up_proj = GroupedLinear(experts, d, 2 * inner, place, "gate_up_proj")
        self.down_proj = GroupedLinear(experts, inner, d, place, "down_proj")

    def forward(self, dispatched: Dispatched) -> Tensor:
        """Rows [R, D] in, gated rows [R, D] out."""
        rows, gates, offsets = dispatched.rows, dispatched.gates, dispatched.offsets
        return feed_forward(rows, self.gate_up_proj, self.down_proj, gates, offsets, dispatched.passed)


class MoE(nn.Module):
    """Parts of a mixture layer; `Block` runs them as pieces. `dispatcher` is set from outside."""

    def __init__(
        self,
        cfg: ModelConfig,
        dispatcher: LocalDispatch,
        place: Place = DEFAULT,
    ) -> None:
        super().__init__()
        self.dispatcher = dispatcher
        self.gate = Router(cfg, place)
        self.experts = Experts(cfg, len(dispatcher.held(cfg.n_routed_experts)), place)
        self.shared_experts: MLP | None = None
        if cfg.n_shared_experts:
            width = cfg.n_shared_experts * cfg.moe_intermediate_size
            self.shared_experts = MLP(cfg.hidden_size, width, place)
