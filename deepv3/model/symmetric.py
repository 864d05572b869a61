"""Expert parallelism inside one node through memory that its ranks share: the host is never asked where tokens go.

`AllToAllDispatch` with the same order of copies, rows and sums, hence the same bits, but nothing on the way out or home
has a size that depends on counts (`symmetric_memory`):
1. Copies, gates and choices are pushed into the slots of their ranks. What came lies in P slots of C tokens, and is
   taken out of them as it lies, since backward needs it: [P C, D], with gaps that carry the choice -1.
2. Rows are sorted from there by the tables of `kernels.routing_tables`, which skip the gaps; the rows of a copy are
   summed back into its place in the slots.
3. The sums are pushed home, where each token finds them by rank and place.

Only the rows between 2's two halves need a size on the host. They get a bound: `HEADROOM` times the mean, or times what
came in earlier dispatches. The experts are issued with it, and only then the host looks at the count, which left for
the host when the copies arrived: it has launched ahead of the device by the experts' work, and the device never waits
for it. Where there were more rows than the bound, the bound grows and the experts' work is issued once more. Nothing is
dropped; no rank needs to know of another's bound.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import deepv3.kernels as kernels
from deepv3.errors import PeerLost
from deepv3.kernels.reference.quantise import BLOCK, round_up, row_scales
from deepv3.model.dispatch import Dispatched
from deepv3.model.exchange import AllToAllDispatch
from deepv3.model.router import Routing
from deepv3.model.symmetric_memory import PATIENCE, Slots, Transit, record_of, record_words, words_of
from deepv3.precision.formats import Rows, placeholder
from deepv3.precision.recipe import Recipe
from deepv3.precision.saved import Operand, Passed

HEADROOM = 1.25  # of the bound over the mean, and over the largest count seen


class Extent(NamedTuple):
    """What one dispatch may hold at most: tokens of a micro-batch, width D and format of a row, choices K of a token
    and bytes of a gate."""

    tokens: int
    width: int
    top_k: int
    dtype: torch.dtype

    @property
    def slots(self) -> Slots:
        """Rows in the model's format; records with scales, gates and choices on the way out."""
        gate = 2 if self.dtype == torch.float64 else 1
        record = record_words(-(-self.width // BLOCK), (gate + 1) * self.top_k)
        return Slots(self.tokens, self.width * self.dtype.itemsize // 4, record)


class Look:
    """Figures of one dispatch on their way to the host."""

    def __init__(self, figures: Tensor) -> None:
        self._figures = figures.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.current_stream().record_event() if figures.is_cuda else None

    def read(self) -> list[int]:
        """The figures; the host waits until the device has come so far."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._figures.tolist()


class Trip(NamedTuple):
    """The way of one dispatch's copies, out and home."""

    transit: Transit
    place: Tensor  # [T, K] int32, where in the slots the sums of a token's copies come home; -1 past the last
    items: Tensor  # [T K] int32, tokens in the order of (rank, token); the first sum(sent) count
    sent: Tensor  # [P] int32
    came: Tensor  # [P] int32
    look: Look  # rows of the experts here, then came, then the sources that were lost


class SymmetricDispatch(AllToAllDispatch):
    """Experts in equal consecutive shares over the ranks of `group`, all of one node. See `AllToAllDispatch`.

    Collective when made. Raises ConfigError where the ranks do not divide the experts or cannot map each other's
    memory, PeerLost in the dispatch after a source has not come for `patience` seconds.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        n_routed_experts: int,
        extent: Extent,
        device: torch.device,
        keep_rows: bool = False,
        recipe: Recipe | None = None,
        patience: float = PATIENCE,
    ) -> None:
        super().__init__(group, n_routed_experts, keep_rows, recipe)
        self.transit = Transit(group, extent.slots, device, patience)
        self.tokens = extent.tokens
        self.bound = self._bound(extent.tokens * extent.top_k)

    def _bound(self, rows: int) -> int:
        """Rows to make room for where `rows` are expected; each expert's are filled up."""
        return round_up(int(HEADROOM * rows) + self.share * (self.align - 1), BLOCK)

    def dispatch(self, u: Operand, routing: Routing) -> Dispatched:
        """u: [T, D], T at most what the buffers are for."""
        tokens = u.value.shape[0]
        assert tokens <= self.tokens, f"{tokens} tokens in a dispatch; the buffers are for {self.tokens}"
        ranks = self.legs[0].destinations(routing.indices)
        slots, items, _, sent = kernels.routing_tables(ranks, self.size)
        place = kernels.places(ranks, slots, sent, self.tokens)
        labels, held = (routing.weights, routing.indices), self.held(self.n_routed_experts)
        value, gates, here, came, rows = _Out.apply(
            u.value, *labels, place, items, sent, self.transit, held, self._rows8(u)
        )
        slot_of_token, token_of_slot, offsets, _ = kernels.routing_tables(here, self.share, self.align)
        routing = routing._replace(slot_of_token=slot_of_token, token_of_slot=token_of_slot, offsets=offsets)
        look = Look(torch.cat([offsets[-1:], came, self.transit.failed]))
        trip = Trip(self.transit, place, items, sent, came, look)
        return Dispatched(Operand(value, rows=rows), gates, offsets, routing, (trip,), self._passed())

    def work(self, arrived: Dispatched, experts: Callable[[Dispatched], Tensor]) -> Tensor:
        """Sums [P C, D] of the copies' rows, in the places of the copies."""
        (trip,) = arrived.journey
        if self.keep_rows:  # activation checkpointing does not bear work that is thrown away: the host waits first
            return self._with_rows(arrived, experts, self._look(trip))
        bound = self.bound
        sums = self._with_rows(arrived, experts, bound)
        if (rows := self._look(trip)) <= bound:
            return sums
        self.bound = self._bound(rows)
        return self._with_rows(arrived, experts, self.bound)

    def _look(self, trip: Trip) -> int:
        """Rows of the experts here, or one unit of them; PeerLost where a source is missing."""
        rows, *figures = trip.look.read()
        came, lost = figures[: self.size], [rank for rank, failed in enumerate(figures[self.size :]) if failed]
        if lost:
            raise PeerLost(f"ranks {lost} of the expert group were not heard of for {self.transit.patience:g} s")
        self.load.note(rows, sum(came))
        return max(rows, self.align)

    def _with_rows(self, arrived: Dispatched, experts: Callable[[Dispatched], Tensor], bound: int) -> Tensor:
        """The experts' work on the first `bound` rows."""
        whole = arrived.routing
        routing = whole._replace(
            slot_of_token=whole.slot_of_token.masked_fill(whole.slot_of_token >= bound, -1),
            token_of_slot=whole.token_of_slot[:bound],
            offsets=whole.offsets.clamp(max=bound),
        )
        rows = self._sort(arrived.rows, arrived.gates, routing)._replace(passed=arrived.passed)
        return self._sum(experts(rows), rows, None)

    def combine(self, rows: Tensor, dispatched: Dispatched, base: Tensor) -> Tensor:
        (trip,) = dispatched.journey
        return _Home.apply(rows, base, trip, dispatched.passed)


def _taken8(rows: Tensor, record: Tensor, came: Tensor) -> Rows:
    """Codes out of their area, and their scales, which begin the records."""
    codes = kernels.take(rows, came).view(torch.float8_e4m3fn)
    scales = row_scales(*codes.shape, codes.device)
    return Rows(codes, scales.copy_(record.flatten(0, 1)[:, : scales.shape[1]].view(torch.float32)))


class _Out(torch.autograd.Function):
    """Copies travel with their gates and choices; in backward the gradients of a token's copies come home."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gates: Tensor,
        indices: Tensor,
        place: Tensor,
        items: Tensor,
        sent: Tensor,
        transit: Transit,
        held: range,
        rows: Rows | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Rows | None]:
        """rows: x in FP8, which travels instead of it; x is autograd's handle then. held: the experts here.

        Returns copies [P C, D], their gates and choices [P C, K], how many came from each rank, and the copies in FP8.
        """
        scales = () if rows is None else (rows.scales,)
        words = words_of(x if rows is None else rows.codes)
        area, record, came = transit.exchange(words, record_of(*scales, gates, indices), sent, items)
        if rows is None:
            value = kernels.take(area, came).view(x.dtype)
        else:
            rows = _taken8(area, record, came)
            value = placeholder(x, *rows.codes.shape)
        at, top_k = sum(part.shape[1] for part in scales), indices.shape[1]
        gates, here = kernels.unpack(record, came, at, gates.dtype, top_k, held.start, len(held))
        ctx.save_for_backward(place, came)
        ctx.transit, ctx.top_k = transit, top_k
        ctx.mark_non_differentiable(here, came)
        return value, gates, here, came, rows

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dgates: Tensor, *_: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        place, came = ctx.saved_tensors
        rows, record, _came = ctx.transit.exchange(words_of(dx), record_of(dgates), came)
        dx = kernels.unpermute(rows.flatten(0, 1).view(dx.dtype), place)
        dgates = kernels.unpermute(record.flatten(0, 1).view(dgates.dtype), place)[:, : ctx.top_k]
        return dx, dgates, *[None] * 7


class _Home(torch.autograd.Function):
    """The sums of a token's copies come home and are added to base; the adjoint of `_Out`."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, base: Tensor, trip: Trip, passed: Passed | None) -> Tensor:
        ctx.save_for_backward(trip.items, trip.sent)
        ctx.transit, ctx.passed = trip.transit, passed
        rows, _, _ = trip.transit.exchange(words_of(sums), None, trip.came)
        return kernels.unpermute(rows.flatten(0, 1).view(sums.dtype), trip.place, base)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        items, sent = ctx.saved_tensors
        if ctx.passed is None:
            rows, _, came = ctx.transit.exchange(words_of(dy), None, sent, items)
            return kernels.take(rows, came).view(dy.dtype), dy, None, None
        codes = ctx.passed.take(dy)
        areas = ctx.transit.exchange(words_of(codes.codes), record_of(codes.scales), sent, items)
        arrived = _taken8(*areas)
        ctx.passed.put(arrived)
        return placeholder(dy, *arrived.codes.shape), dy, None, None
