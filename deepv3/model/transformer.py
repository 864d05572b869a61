"""The whole model: embedding -> blocks -> norm -> head, then the prediction depths, and the objective.

    objective = scale * (CE_main + lambda / D * sum_k CE_k) + scale * S * alpha * sum_{sequence, layer} f . P

with CE summed over tokens, scale = 1 / (tokens of the global batch), V3 Eq. 17 and 25. Every depth has S targets, since
rows hold S + 1 + D tokens, so its mean divides by S as in Eq. 24. The model knows no ranks: parts are its attributes
(`embed_tokens`, `layers`, `norm`, `lm_head`, `mtp`), and what differs between layouts (dispatcher, queue) comes in from
outside. No step waits for the device.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from deepv3.config.schema import Config, ModelConfig
from deepv3.model.block import Block
from deepv3.model.dispatch import LocalDispatch
from deepv3.model.head import Head
from deepv3.model.init import initialise
from deepv3.model.layers import Embedding, RMSNorm
from deepv3.model.mla import Layout
from deepv3.model.moe import MoE
from deepv3.model.mtp import MTP
from deepv3.model.rope import RotaryTables
from deepv3.model.router import Router, Routing, statistics
from deepv3.precision.linear import Place
from deepv3.precision.recipe import Recipe, recipe_of
from deepv3.precision.wgrad import WeightGradQueue

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp64": torch.float64}  # FP64: tests


class Output(NamedTuple):
    """0-dim tensors that add up over micro-batches and data ranks to means per token of the global batch."""

    objective: Tensor  # loss_main + mtp_weight * loss_mtp + loss_balance; backward starts here
    loss_main: Tensor
    loss_mtp: Tensor  # mean over depths, without lambda
    loss_balance: Tensor  # with alpha
    counts: Tensor  # [n_moe, E] int32, tokens per expert; MTP's layers last, here and below
    entropy: Tensor  # [n_moe], sums over tokens, see router.statistics
    fanout: Tensor


class Part(Protocol):
    """A stretch of the model: main layers by number, the embedding, final norm and head, MTP modules (all or none)."""

    @property
    def layers(self) -> range: ...
    @property
    def embedding(self) -> bool: ...
    @property
    def head(self) -> bool: ...
    @property
    def mtp(self) -> int: ...


class Transformer(nn.Module):
    """DeepSeek-V3 (V3 2). recompute: see `Block`; loss_chunk: rows of logits that exist at once; queue: see `wgrad`;
    recipe: which tensors are FP8.

    parts: stretches to build, each with its queue, instead of the whole; modules keep their global names, and what two
    parts share (embedding, used by MTP too) exists once. Such a model is run in pieces (`pipeline.stage`).
    """

    def __init__(
        self,
        cfg: ModelConfig,
        recompute: str = "none",
        loss_chunk: int = 2048,
        queue: WeightGradQueue | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        dispatcher: LocalDispatch | None = None,
        parts: Sequence[tuple[Part, WeightGradQueue | None]] = (),
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.rotary = RotaryTables(cfg)
        self.dispatcher = dispatcher = dispatcher or LocalDispatch(recompute == "full", recipe)
        assert dispatcher.recipe == recipe, "layers and dispatcher must agree in which format rows travel"
        self.first_expert = dispatcher.held(cfg.n_routed_experts).start
        whole = _Whole(range(cfg.num_hidden_layers), True, True, cfg.num_nextn_predict_layers)
        d, plain = cfg.hidden_size, Place(device, dtype)
        self.layers, self.mtp = nn.ModuleList(), nn.ModuleList()
        for part, own in parts or [(whole, queue)]:
            place = Place(device, dtype, own, recipe)
            if part.embedding or part.mtp:
                self.embed_tokens = self.get("embed_tokens") or Embedding(cfg.vocab_size, d, plain)
            for index in part.layers:  # registered by number: the list may have gaps, its names are global
                self.layers.add_module(str(index), Block(cfg, index, recompute, dispatcher, place))
            if part.head:
                self.norm = RMSNorm(d, cfg.rms_norm_eps, place=place)
                self.lm_head = Head(cfg.vocab_size, d, loss_chunk, plain)
            for k in range(part.mtp):
                self.mtp.append(MTP(cfg, cfg.num_hidden_layers + k, recompute, dispatcher, place))

    def get(self, name: str) -> nn.Module | None:
        """A module of this model by name; None where it is in no part of it."""
        return self._modules.get(name)

    @property
    def whole(self) -> bool:
        """Whether all layers and all experts are here, so that it can be called."""
        held = [block.mlp.experts.gate_up_proj.weight.shape[0] for block in self.layers if isinstance(block.mlp, MoE)]
        layers = len(self.layers) == self.cfg.num_hidden_layers and self.get("lm_head") is not None
        return layers and all(count == self.cfg.n_routed_experts for count in held)

    def block(self, index: int) -> Block:
        """Main layer by global number; it must be here."""
        return self.layers.get_submodule(str(index))  # type: ignore[return-value]

    def depths(self) -> list[MTP]:
        """The MTP modules that are here, all or none."""
        return list(self.mtp)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor, loss_scale: float, mtp_weight: float, documents: Tensor | None = None) -> Output:
        """One micro-batch.

        tokens: [B, S + 1 + D] int64. documents: the same shape, number of every token's document; given, no token looks
        at another document (slower: a mask excludes the fast attention kernel). Depth k masks by the document of the
        position itself, not of the token k ahead.
        """
        depths = len(self.mtp)
        seq_len = tokens.shape[1] - 1 - depths
        layout = self.layout(tokens.shape[0], seq_len, tokens.device, documents)
        hidden, routings = self.trunk(tokens[:, :seq_len], layout)
        terms, loss_main = self.lm_head.loss(hidden, tokens[:, 1 : seq_len + 1], loss_scale)
        loss_mtp = torch.zeros_like(loss_main)
        for k, module in enumerate(self.mtp, 1):
            hidden, routing = module(self.embed_tokens(tokens[:, k : k + seq_len]), hidden, layout)
            routings.append(routing)
            labels = tokens[:, k + 1 : k + 1 + seq_len]
            term, total = self.lm_head.loss(hidden, labels, loss_scale * mtp_weight / depths)
            terms, loss_mtp = terms + term, loss_mtp + total / depths
        if routings:
            balance = torch.stack([routing.balance for routing in routings]).sum()
            balance = balance * (loss_scale * seq_len * self.cfg.aux_loss_alpha)
        else:
            balance = torch.zeros_like(loss_main)
        parts = (loss_main * loss_scale, loss_mtp * loss_scale, balance.detach())
        return Output(terms + balance, *parts, *statistics(routings, self.cfg, tokens.device))

    def trunk(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, list[Routing]]:
        """Main model up to its final norm. tokens: [B, S]. Returns hidden [B * S, D] and the MoE layers' routings."""
        x, routings = self.embed_tokens(tokens), []
        for block in self.layers:
            x, routing = block(x, layout)
            if routing is not None:
                routings.append(routing)
        return self.norm(x), routings

    def layout(self, batch: int, seq_len: int, device: torch.device, documents: Tensor | None = None) -> Layout:
        """Rotary tables and mask shared by all blocks. documents: [B, at least seq_len]."""
        mask = None
        if documents is not None:
            documents = documents[:, :seq_len]
            mask = (documents[:, :, None] == documents[:, None, :]).tril_().unsqueeze(1)
        return Layout(batch, seq_len, *self.rotary(batch, seq_len, device), mask)

    @torch.no_grad()
    def logits(self, tokens: Tensor, mtp: bool = False) -> Tensor:
        """tokens: [B, S]. Returns [B, S, V]; with `mtp` [1 + D, B, S - D, V], where row (k, b, i) predicts token
        i + k + 1 and position i sees tokens up to i + k."""
        depths = len(self.mtp) if mtp else 0
        batch, seq_len = tokens.shape[0], tokens.shape[1] - depths
        layout = self.layout(batch, seq_len, tokens.device)
        hidden, _ = self.trunk(tokens[:, :seq_len], layout)
        rows = [self.lm_head(hidden).view(batch, seq_len, -1)]
        if not mtp:
            return rows[0]
        for k, module in enumerate(self.mtp, 1):
            hidden, _ = module(self.embed_tokens(tokens[:, k : k + seq_len]), hidden, layout)
            rows.append(self.lm_head(hidden).view(batch, seq_len, -1))
        return torch.stack(rows)

    def routers(self) -> list[Router]:
        """Gates that are here, in the order of `Output.counts`: main layers, then MTP's."""
        blocks = [*self.layers, *(module.block for module in self.mtp)]
        return [block.mlp.gate for block in blocks if isinstance(block.mlp, MoE)]

    def rows(self) -> list[int]:
        """Each of `routers`' row among all MoE layers of the whole model; 0, 1, 2, ... where this is the whole."""
        main = [int(index) for index, block in self.layers.named_children() if isinstance(block.mlp, MoE)]
        return [moe_row(self.cfg, index) for index in (*main, *range(self.cfg.num_hidden_layers, self._end()))]

    def _end(self) -> int:
        return self.cfg.num_hidden_layers + len(self.mtp)

    def update_biases(self, counts: Tensor, speed: float | Tensor) -> None:
        """Router biases after an optimizer step (V3 2.1.2). counts: [n_moe, E] of the whole model and global batch."""
        for router, row in zip(self.routers(), self.rows(), strict=True):
            router.update_bias(counts[row], speed)

    def init_weights(self, seed: int) -> None:
        """See `init`."""
        initialise(self, seed, self.cfg.initializer_range, self.first_expert)


class _Whole(NamedTuple):
    layers: range
    embedding: bool
    head: bool
    mtp: int


def moe_row(cfg: ModelConfig, index: int) -> int:
    """Row of layer `index` (MTP's follow the main layers) in figures per MoE layer, such as `Output.counts`."""
    return index - cfg.first_k_dense_replace


def moe_layers(cfg: ModelConfig) -> int:
    """MoE layers of the whole model, MTP's included: the number of rows."""
    return moe_row(cfg, cfg.num_hidden_layers + cfg.num_nextn_predict_layers)


def build_model(cfg: Config, device: torch.device | str) -> Transformer:
    """The model of a run with its initial weights; router biases are FP32 in every precision."""
    model = Transformer(
        cfg.model,
        cfg.train.recompute,
        cfg.train.loss_chunk,
        device=device,
        dtype=DTYPES[cfg.precision.name],
        recipe=recipe_of(cfg),
    )
    model.init_weights(cfg.seed)
    return model
