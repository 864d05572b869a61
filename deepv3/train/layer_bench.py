"""One mixture layer on one device, forward and backward, as a rank of a large expert group runs it.

Everything a rank computes is here: attention, router, tables, copies for the wire, grouped products of the local
experts, sums. What is not here is the wire: the peers of this rank are mirrors of it, each sends it what it sends them,
so rows arrive in the numbers and the order that many ranks with the same load would send, and no byte travels. The
counts are read once, before timing. Weights are quantised once, as within an optimizer step; gradients are added.
"""

import statistics
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from deepv3.config.schema import Config
from deepv3.errors import ConfigError
from deepv3.model.block import Block
from deepv3.model.dispatch import LocalDispatch
from deepv3.model.exchange import AllToAllDispatch, Leg, Plan, Route
from deepv3.model.init import initialise
from deepv3.model.mla import Layout
from deepv3.model.rope import RotaryTables
from deepv3.model.router import Routing
from deepv3.model.transformer import DTYPES
from deepv3.precision.linear import Place
from deepv3.precision.recipe import Recipe, recipe_of
from deepv3.train import garbage
from deepv3.train.kernel_table import kernel_table

REPEATS, WARMUP = 20, 5


class Mirrored(Route):
    """What is sent to a peer comes back as if the peer had sent it."""

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        return rows


class MirrorDispatch(AllToAllDispatch):
    """Rank 0 of `size` ranks that all route alike: it holds experts 0 to share - 1, and whatever it sends to rank p for
    p's experts comes from rank p for its own. So a layer with it equals one whose experts repeat every `share`."""

    def __init__(self, size: int, n_routed_experts: int, recipe: Recipe | None = None) -> None:
        LocalDispatch.__init__(self, recipe=recipe)
        self.group, self.size, self.rank = None, size, 0  # type: ignore[assignment]
        self.n_routed_experts, self.share = n_routed_experts, n_routed_experts // size
        self.legs = (Leg(None, size, 0, self.share),)  # type: ignore[arg-type]
        self._known: Plan | None = None

    def _gather(self, figures: Tensor) -> np.ndarray:
        """All peers' figures are this rank's; read from the device once, for inputs that do not change."""
        if self._known is not None:
            return np.empty((0, 0))
        return np.broadcast_to(figures.cpu().numpy(), (self.size, figures.numel()))

    def _plan(self, figures: np.ndarray) -> Plan:
        if self._known is None:
            copies, experts = np.split(figures[0], [self.size])
            rows = experts.reshape(self.size, self.share).sum(axis=0)
            route = Mirrored(self.group, copies.tolist(), copies.tolist())
            self._known = Plan([route], int((-(-rows // self.align) * self.align).sum()))
            self._peers = torch.arange(self.size).repeat_interleave(torch.from_numpy(copies.copy()))
        return self._known

    def _tables(self, routing: Routing, indices: Tensor, rows: int) -> Routing:
        self._peers = self._peers.to(indices.device)
        first = (self._peers * self.share).to(indices.dtype)[:, None]
        local = indices - first
        return super()._tables(routing, local.masked_fill((local < 0) | (local >= self.share), -1), rows)


def build(cfg: Config, ranks: int, device: torch.device) -> tuple[Block, Layout, Tensor, Tensor]:
    """A mixture layer of cfg on one of `ranks` ranks with FP32 gradient buffers; layout, input and output gradient.

    ConfigError where the ranks do not divide the experts.
    """
    m, batch, seq_len = cfg.model, cfg.train.micro_batch_size, cfg.data.seq_len
    if m.n_routed_experts % ranks:
        raise ConfigError(
            f"model.n_routed_experts = {m.n_routed_experts} cannot be shared by ranks = {ranks}: "
            f"{m.n_routed_experts} % {ranks} = {m.n_routed_experts % ranks}; change ranks"
        )
    dtype, recipe = DTYPES[cfg.precision.name], recipe_of(cfg)
    dispatcher = MirrorDispatch(ranks, m.n_routed_experts, recipe)
    place = Place(device, dtype, recipe=recipe)
    block = Block(m, m.first_k_dense_replace, cfg.train.recompute, dispatcher, place)
    initialise(block, cfg.seed, m.initializer_range)
    for parameter in block.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]
        parameter.grad_ready = True  # type: ignore[attr-defined]
    cos, sin = RotaryTables(m)(batch, seq_len, device)
    x = torch.randn(batch * seq_len, m.hidden_size, device=device, dtype=torch.float32).to(dtype)
    return block, Layout(batch, seq_len, cos, sin, None), x.requires_grad_(), torch.randn_like(x)


def once(block: Block, layout: Layout, x: Tensor, dy: Tensor, mark: Callable[[], None] = lambda: None) -> Tensor:
    """Forward, then `mark`, then backward with dy; returns the output."""
    x.grad = None
    y, _ = block(x, layout)
    mark()
    y.backward(dy)
    return y


def measure(cfg: Config, ranks: int) -> str:
    """Milliseconds of the layer on this CUDA device, forward and backward, and where they go; markdown, then text.

    ConfigError where there is no such device, or the ranks do not divide the experts.
    """
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        raise ConfigError("what=layer measures a CUDA device, and there is none here")
    device = torch.device("cuda")
    torch.manual_seed(cfg.seed)
    block, layout, x, dy = build(cfg, ranks, device)
    for _ in range(WARMUP):
        once(block, layout, x, dy)
    laps = []
    with garbage.steady():
        for _ in range(REPEATS):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            marks[0].record()
            once(block, layout, x, dy, marks[1].record)
            marks[2].record()
            laps.append(marks)
        torch.cuda.synchronize()
    forward, backward, both = (
        [a.elapsed_time(b) for a, b in ((lap[i], lap[j]) for lap in laps)] for i, j in ((0, 1), (1, 2), (0, 2))
    )
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(4):
            once(block, layout, x, dy)
        torch.cuda.synchronize()
    load, experts = block.moe.dispatcher.take_load(), cfg.model.n_routed_experts
    lines = [
        f"{torch.cuda.get_device_name()}, {cfg.precision.name}: {x.shape[0]} tokens, {experts // ranks} experts "
        f"of {experts}, {load.rows} rows, {load.received} copies received",
        "",
        "| ms | median | smallest - largest |",
        "|---|---|---|",
    ]
    for name, times in (("forward", forward), ("backward", backward), ("both", both)):
        lines.append(f"| {name} | {statistics.median(times):.2f} | {min(times):.2f} - {max(times):.2f} |")
    return "\n".join([*lines, "", kernel_table(trace.key_averages(), 4)])
