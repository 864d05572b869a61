"""One MoE block with its experts spread over gloo ranks, and the same block in one process on all ranks' tokens.

Ranks have 1 or 2 sequences each, so their token counts differ. What ranks return is joined to what one process would
return: outputs and input gradients in rank order, expert gradients along the experts, other gradients summed.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import small_model as small
import torch

from deepv3.config.schema import Config, ModelConfig
from deepv3.dist import Grid, init_distributed
from deepv3.model import exchange
from deepv3.model.dispatch import LocalDispatch
from deepv3.model.mla import Layout
from deepv3.model.node_exchange import make_dispatch
from deepv3.model.transformer import Transformer

SEQ = 12  # with 4 choices a multiple of the 16 experts, so that forced balance is the same for every sequence
SEQUENCES = (1, 2, 2, 1)  # per rank
CFG = small.config(num_nextn_predict_layers=0, num_hidden_layers=2)
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "q_lora_rank": 192,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "initializer_range": 0.06,
}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
# Router biases that send every token to experts 0-3, all on rank 0 of 4, or keep the middle experts without tokens.
BIASES = {"natural": {}, "one rank": dict.fromkeys(range(4), 100.0), "unused": dict.fromkeys(range(5, 11), -100.0)}

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One comparison. per_node: ranks per node; dispatch is plain where a node holds all of them."""

    world: int
    per_node: int = 8
    dtype: str = "fp64"
    recompute: str = "none"
    routing: str = "natural"
    sabotage: str = ""
    device: str = "cpu"

    @property
    def cfg(self) -> ModelConfig:
        """On a GPU: widths its kernels take, and choices that no rounding can change."""
        return dataclasses.replace(CFG, **WIDE, force_balance=True) if self.device == "cuda" else CFG

    @property
    def sequences(self) -> int:
        return sum(SEQUENCES[: self.world])


def build(case: Case, dispatcher: LocalDispatch | None = None) -> Transformer:
    """The model; its second layer is the one under test."""
    model = small.build(case.cfg, dtype=DTYPES[case.dtype], recompute=case.recompute, dispatcher=dispatcher)
    for expert, bias in BIASES[case.routing].items():
        model.routers()[0].e_score_correction_bias[expert] = bias
    return model.to(case.device)


def tokens(case: Case, seed: int) -> torch.Tensor:
    """[all ranks' tokens, D], the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(case.sequences * SEQ, case.cfg.hidden_size, generator=generator, dtype=torch.float64)
    return values.to(case.device)


def share(case: Case, rank: int, values: torch.Tensor) -> torch.Tensor:
    """One rank's part of all tokens."""
    first = sum(SEQUENCES[:rank]) * SEQ
    return values[first : first + SEQUENCES[rank] * SEQ]


def forward_and_backward(model: Transformer, x: torch.Tensor, end: torch.Tensor) -> Tensors:
    """Output, counts and all gradients of the block for the loss sum(out * end) + balance."""
    block, dtype = model.block(1), next(model.parameters()).dtype
    x, end = x.to(dtype).requires_grad_(), end.to(dtype)
    out, routing = block(x, layout_of(model, x))
    ((out * end).sum() + routing.balance.sum()).backward()
    gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
    found = {"out": out.detach(), "counts": routing.counts, "x": x.grad, **gradients}
    return {name: value.cpu() for name, value in found.items()}


def layout_of(model: Transformer, x: torch.Tensor) -> Layout:
    return model.layout(x.shape[0] // SEQ, SEQ, x.device)


def one_process(case: Case) -> Tensors:
    """The oracle."""
    return forward_and_backward(build(case), tokens(case, 0), tokens(case, 1))


def start(case: Case) -> tuple[Grid, LocalDispatch]:
    """Join the other ranks."""
    cfg = Config()
    cfg.parallel = dataclasses.replace(cfg.parallel, ep_size=case.world)
    grid = init_distributed(cfg)
    return grid, make_dispatch(grid, CFG.n_routed_experts, case.per_node, keep_rows=case.recompute == "full")


def on_rank(case: Case, times: int = 1) -> list[Tensors]:
    """A rank's part of the same, one or several times over with fresh models."""
    grid, dispatcher = start(case)
    x, end = (share(case, grid.rank, tokens(case, seed)) for seed in (0, 1))
    with SABOTAGE[case.sabotage]():
        return [forward_and_backward(build(case, dispatcher), x, end) for _ in range(times)]


def join(parts: list[Tensors]) -> Tensors:
    """All ranks' parts as one process would have them."""
    stacked = {name: [part[name] for part in parts] for name in parts[0]}
    along = {name: name in ("out", "x") or ".experts." in name for name in stacked}
    return {name: torch.cat(rows) if along[name] else sum(rows[1:], rows[0]) for name, rows in stacked.items()}


def worst(found: Tensors, expected: Tensors) -> float:
    """Largest relative distance of any tensor; the counts must be equal."""
    assert torch.equal(found["counts"], expected["counts"])
    assert found.keys() == expected.keys()
    return max(small.distance(found[name].double(), expected[name].double()) for name in expected if name != "counts")


# -- faults, each of which a comparison must notice --------------------------------------------------------------------


@contextlib.contextmanager
def _splits_of_two_peers_swapped() -> Iterator[None]:
    """Rows come home cut at the wrong places: the first two peers' parts have each other's sizes."""
    true = exchange.Route.back

    def back(route: exchange.Route, rows: torch.Tensor) -> torch.Tensor:
        came = true(route, rows)
        sizes = [route.sent[1], route.sent[0], *route.sent[2:]]
        first, second, *others = came.split(sizes)
        return torch.cat([second, first, *others])

    with mock.patch.object(exchange.Route, "back", back):
        yield


@contextlib.contextmanager
def _gradients_of_gates_left_behind() -> Iterator[None]:
    true = exchange._Forth.backward

    def backward(ctx, dx, dgates, *others):
        return true(ctx, dx, torch.zeros_like(dgates), *others)

    with mock.patch.object(exchange._Forth, "backward", staticmethod(backward)):
        yield


@contextlib.contextmanager
def _one_copy_of_a_token_lost_in_backward() -> Iterator[None]:
    true = exchange._Forth.forward

    def forward(ctx, x, gates, indices, slot_of_item, *others):
        out = true(ctx, x, gates, indices, slot_of_item, *others)
        ctx.save_for_backward(slot_of_item.where(torch.arange(slot_of_item.shape[1]) == 0, -1))
        return out

    with mock.patch.object(exchange._Forth, "forward", staticmethod(forward)):
        yield


@contextlib.contextmanager
def _experts_of_the_neighbour() -> Iterator[None]:
    true = exchange.AllToAllDispatch.held

    def held(self, n_routed_experts):
        start = true(self, n_routed_experts).start + self.share
        return range(start % n_routed_experts, start % n_routed_experts + self.share)

    with mock.patch.object(exchange.AllToAllDispatch, "held", held):
        yield


SABOTAGE: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "": contextlib.nullcontext,
    "splits of two peers swapped": _splits_of_two_peers_swapped,
    "gradients of gates left behind": _gradients_of_gates_left_behind,
    "one copy of a token lost in backward": _one_copy_of_a_token_lost_in_backward,
    "experts of the neighbour": _experts_of_the_neighbour,
}
