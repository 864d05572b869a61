"""What an exchange between experts' ranks takes, all-to-all beside shared memory: ``launch/bench.py what=exchange``.

    torchrun --standalone --nproc_per_node=4 launch/bench.py what=exchange

Every rank of the world holds a share of one layer's experts and T tokens with uniform choices. Measured, medians over
rounds in which all ranks start together, of the slowest rank:
- wire: rows and labels of one dispatch to where they go; all-to-all is told the sizes;
- forward and backward: a layer's dispatch, sort, sum and combine around experts that do nothing, with the host's waits.
GB/s count what a rank sends to others on the wire. What hides all this in training, experts and shared expert, is not
here.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import deepv3.kernels as kernels
from deepv3.config.schema import Config
from deepv3.dist import Grid, init_distributed, shutdown
from deepv3.errors import ConfigError
from deepv3.model.dispatch import Dispatched
from deepv3.model.exchange import AllToAllDispatch
from deepv3.model.router import Routing
from deepv3.model.symmetric import Extent, SymmetricDispatch
from deepv3.model.symmetric_memory import record_of, words_of
from deepv3.precision.formats import Rows, rows_of
from deepv3.precision.recipe import EXPERT_INPUT, V3, Recipe
from deepv3.precision.saved import Operand, Passed

WARM_UP = 2
CALLS = 4  # between two barriers of the hosts, which set the ranks apart by up to 100 us


class Shape(NamedTuple):
    """A layer and the tokens of a rank."""

    name: str
    tokens: int
    hidden: int
    experts: int
    top_k: int


SHAPES = (Shape("mini", 8192, 2048, 64, 8), Shape("V3", 4096, 7168, 256, 8))


class Row(NamedTuple):
    """One line of the table: microseconds, and bytes that a rank sends to others in `wire`, the mean of all."""

    shape: str
    precision: str
    dispatcher: str
    wire: float
    forward: float
    backward: float
    sent: float


class _Experts(torch.autograd.Function):
    """Experts that hand their rows on; in FP8 out of codes, and the gradient out of codes again."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rows: Rows | None, passed: Passed | None) -> Tensor:
        ctx.passed = passed
        return value.clone() if rows is None else kernels.dequantise_rows(*rows, value.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return dy if ctx.passed is None else kernels.dequantise_rows(*ctx.passed.take(dy), dy.dtype), None, None


def _work(dispatched: Dispatched) -> Tensor:
    return _Experts.apply(dispatched.rows.value, dispatched.rows.rows, dispatched.passed)


class Layer:
    """One layer's exchange on this rank."""

    def __init__(self, grid: Grid, shape: Shape, fp8: bool, shared: bool) -> None:
        group, recipe, self.grid = grid.group("world"), Recipe(V3) if fp8 else None, grid
        self.dispatcher = (
            SymmetricDispatch(group, shape.experts, _extent(shape), grid.device, recipe=recipe)
            if shared
            else AllToAllDispatch(group, shape.experts, recipe=recipe)
        )
        random = torch.Generator().manual_seed(grid.rank)
        u, base, self.end = (
            torch.randn(shape.tokens, shape.hidden, generator=random).to(grid.device, torch.bfloat16) for _ in range(3)
        )
        scores, weights = (torch.rand(shape.tokens, n, generator=random) for n in (shape.experts, shape.top_k))
        indices = scores.topk(shape.top_k, dim=1).indices.to(grid.device, torch.int32)
        self.u, self.base = u.requires_grad_(), base.requires_grad_()
        counts = torch.bincount(indices.flatten(), minlength=shape.experts).int()
        none = counts.new_empty(0)
        self.routing = Routing(indices, weights.to(grid.device).requires_grad_(), none, none, none, none, counts)
        self.rows = rows_of(u.detach(), V3[EXPERT_INPUT]) if fp8 else None

    def forward(self) -> Tensor:
        """The layer's output, around experts that do nothing."""
        arrived = self.dispatcher.dispatch(Operand(self.u, rows=self.rows), self.routing)
        return self.dispatcher.combine(self.dispatcher.work(arrived, _work), arrived, self.base)

    def wire(self) -> Callable[[], Any]:
        """What moves one dispatch's rows and labels, tables ready."""
        labels = (self.routing.weights.detach(), self.routing.indices)
        (trip,) = self.dispatcher.dispatch(Operand(self.u.detach(), rows=self.rows), self.routing).journey
        u, rows = self.u.detach(), self.rows
        if isinstance(self.dispatcher, SymmetricDispatch):
            words = words_of(u if rows is None else rows.codes)
            record = record_of(*labels) if rows is None else record_of(rows.scales, *labels)
            return lambda: trip.transit.exchange(words, record, trip.sent, trip.items)

        pairs = torch.cat([words_of(part) for part in labels], dim=1)

        def all_to_all() -> None:
            if rows is None:
                trip.route.forth(kernels.permute(u, trip.item_of_slot))
            else:
                trip.route.forth8(Rows(*kernels.permute_fp8(*rows, trip.item_of_slot)))
            trip.route.forth(pairs.index_select(0, trip.item_of_slot))

        return all_to_all

    def sent(self) -> float:
        """Bytes of the rows and labels of one dispatch that go to other ranks."""
        ranks = self.routing.indices // self.dispatcher.share
        others = (peer for peer in range(self.grid.world_size) if peer != self.grid.rank)
        copies = sum(int((ranks == peer).any(1).sum()) for peer in others)
        width, top_k = self.u.shape[1], self.routing.indices.shape[1]
        row = 2 * width if self.rows is None else width + 4 * self.rows.scales.shape[1]
        return float(copies * (row + 8 * top_k))


def _extent(shape: Shape) -> Extent:
    return Extent(shape.tokens, shape.hidden, shape.top_k, torch.bfloat16)


def measure(grid: Grid, shape: Shape, fp8: bool, shared: bool, rounds: int) -> Row:
    """One line; collective."""
    layer = Layer(grid, shape, fp8, shared)
    wire = _time(grid, layer.wire(), rounds)
    outputs: list[Tensor] = []
    forward = _time(grid, lambda: outputs.append(layer.forward()), rounds, begin=outputs.clear)
    refill = partial(_refill, outputs, layer)
    backward = _time(grid, lambda: outputs.pop(0).backward(layer.end), rounds, begin=refill)
    wire, forward, backward = (max(times) for times in zip(*grid.gather([wire, forward, backward])))
    sent = statistics.mean(grid.gather(layer.sent()))
    return Row(
        shape.name, "fp8" if fp8 else "bf16", "symmetric" if shared else "all_to_all", wire, forward, backward, sent
    )


def _refill(outputs: list[Tensor], layer: Layer) -> None:
    outputs[:] = [layer.forward() for _ in range(CALLS)]


def _time(grid: Grid, call: Callable[[], Any], rounds: int, begin: Callable[[], Any] = lambda: None) -> float:
    """Median microseconds of a call among CALLS in a row, over `rounds` that all ranks start together."""
    times = []
    for _ in range(WARM_UP + rounds):
        begin()
        _settle(grid)
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        _settle(grid, barrier=False)
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(times[WARM_UP:])


def _settle(grid: Grid, barrier: bool = True) -> None:
    if grid.device.type == "cuda":
        torch.cuda.synchronize()
    if barrier:
        grid.barrier()


def table(rows: Sequence[Row], grid: Grid) -> str:
    """Markdown."""
    lines = [
        f"{grid.world_size} ranks, {_device(grid)}, torch {torch.__version__}; us, medians of the slowest rank",
        "",
        "| shape | format | dispatcher | wire us | GB/s | forward us | backward us |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = f"{row.wire:.0f} | {row.sent / row.wire / 1e3:.1f} | {row.forward:.0f} | {row.backward:.0f}"
        lines.append(f"| {row.shape} | {row.precision} | {row.dispatcher} | {figures} |")
    return "\n".join(lines)


def _device(grid: Grid) -> str:
    return torch.cuda.get_device_name() if grid.device.type == "cuda" else "CPU"


def report(rounds: int, tokens: int = 0, shapes: Sequence[Shape] = SHAPES) -> str:
    """The table on rank 0, nothing elsewhere. tokens: per rank, 0 for those of the shapes.

    Raises ConfigError for a world of one, or one that does not divide the experts.
    """
    cfg = Config()
    try:
        grid = init_distributed(cfg)
        if grid.world_size == 1:
            raise ConfigError(
                "what=exchange needs 2 or more ranks: torchrun --standalone --nproc_per_node=4 launch/..."
            )
        rows = [
            measure(grid, shape._replace(tokens=tokens or shape.tokens), fp8, shared, rounds)
            for shape in shapes
            for fp8 in (False, True)
            for shared in (False, True)
        ]
        return table(rows, grid) if grid.rank == 0 else ""
    finally:
        shutdown()
