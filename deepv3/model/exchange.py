"""Expert parallelism by all-to-all: tokens travel to the ranks that hold their experts, the experts' sums travel home.

Method, for P ranks that hold E / P experts each:
1. A token is copied once for every rank that holds at least one of its experts, however many it holds there. Copies are
   sorted by (rank, token).
2. Every rank tells every other how many copies and how many rows per expert it will send. Reading these counts is the
   one time the host waits.
3. Copies, gates and choices travel. Each rank sorts what came into rows, by (expert, source rank, token); its experts
   work as in one process.
4. The rows of one copy are summed where they were made, and the sums travel back; at home a token's sums are added to
   its base in ascending order of ranks.

Nothing is dropped and nothing has a capacity (V3 2.1.2): buffers are as large as the counts say, at worst the tokens of
all ranks on one (`arithmetic.buffer_bytes`). Gradients take the same ways in the other direction. With an FP8 recipe
tokens travel as codes with power-of-two scales, and so does in backward the gradient of the experts' sums; sums and the
tokens' gradients travel in the model's format (V3 3.3.3). Given up: the host's wait, and one rounding to the model's
format per (token, rank) on the way home that one process does not have.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import deepv3.kernels as kernels
from deepv3.errors import ConfigError
from deepv3.kernels.reference.quantise import row_scales
from deepv3.model.dispatch import Dispatched, LocalDispatch
from deepv3.model.router import Routing
from deepv3.precision.formats import Rows, placeholder
from deepv3.precision.recipe import Recipe
from deepv3.precision.saved import Operand, Passed


class Route(NamedTuple):
    """Who sends how many rows to whom in one exchange of a group. Lists are by rank of the group, on the host."""

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]

    def forth(self, rows: Tensor) -> Tensor:
        """[sum(sent), D] -> [sum(received), D], ordered by source."""
        return self._exchange(rows, self.sent, self.received)

    def forth8(self, rows: Rows) -> Rows:
        """The same for codes and their scales; a message each, the codes as bytes."""
        codes = self.forth(rows.codes.view(torch.uint8)).view(rows.codes.dtype)
        scales = row_scales(*codes.shape, codes.device)
        return Rows(codes, scales.copy_(self.forth(rows.scales.contiguous())))

    def back(self, rows: Tensor) -> Tensor:
        """[sum(received), D] -> [sum(sent), D]: every row returns to the place it left from."""
        return self._exchange(rows, self.received, self.sent)

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows, received, sent, group=self.group)
        return out


class Trip(NamedTuple):
    """One exchange that N items went on, in several copies each."""

    slot_of_item: Tensor  # [N, K] int32, places of the item's copies in the send buffer, -1 past the last
    item_of_slot: Tensor  # [sum(sent)] int32
    route: Route


class Leg(NamedTuple):
    """An exchange that every dispatch makes: peer p of the group stands for experts first + p * share and following."""

    group: dist.ProcessGroup
    peers: int
    first: int
    share: int

    def destinations(self, indices: Tensor) -> Tensor:
        """Peers that stand for one or more of an item's experts, each once, ascending.

        indices: [N, K] int32 global experts. Returns [N, K] int32, -1 in place of repeats and of experts elsewhere.
        Example: first 4, 2 peers, share 2: choices [7, 1, 6, 4] are behind peers 1, none, 1 and 0: [0, 1, -1, -1].
        """
        peer = torch.div(indices - self.first, self.share, rounding_mode="floor")
        peer = peer.masked_fill((peer < 0) | (peer >= self.peers), self.peers).sort(dim=1).values
        none = peer == self.peers
        none[:, 1:] |= peer[:, 1:] == peer[:, :-1]
        return peer.masked_fill(none, -1)

    def tables(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """slot_of_item [N, K], item_of_slot [N K] (its first sum(copies) entries count) and copies per peer [peers]."""
        slot_of_item, item_of_slot, _, copies = kernels.routing_tables(self.destinations(indices), self.peers)
        return slot_of_item, item_of_slot, copies


class Plan(NamedTuple):
    """What the counts of all ranks say about one dispatch."""

    routes: list[Route]
    rows: int  # of the experts here
    crossed: int = 0  # copies that leave for another node


class AllToAllDispatch(LocalDispatch):
    """Experts in equal consecutive shares over the ranks of `group`; a local dispatch between two exchanges.

    The host waits once per `dispatch`, for the counts; never in `combine` nor in any backward (a block that recomputes
    everything dispatches again there, and waits again). All ranks of the group must call in the same order, forward and
    backward alike. What came is kept for the weight gradients of gate and up projection: making it again would be
    another exchange. Rows are made again from it, unless `keep_rows` (see `LocalDispatch`).
    Raises ConfigError where the ranks do not divide the experts.
    """

    def __init__(
        self, group: dist.ProcessGroup, n_routed_experts: int, keep_rows: bool = False, recipe: Recipe | None = None
    ) -> None:
        super().__init__(keep_rows, recipe)
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        if n_routed_experts % self.size:
            raise ConfigError(
                f"model.n_routed_experts = {n_routed_experts} cannot be shared by parallel.ep_size = {self.size}: "
                f"{n_routed_experts} % {self.size} = {n_routed_experts % self.size}; change ep_size"
            )
        self.n_routed_experts, self.share = n_routed_experts, n_routed_experts // self.size
        self.legs: tuple[Leg, ...] = (Leg(group, self.size, 0, self.share),)

    def held(self, n_routed_experts: int) -> range:
        assert n_routed_experts == self.n_routed_experts, (n_routed_experts, self.n_routed_experts)
        return range(self.rank * self.share, (self.rank + 1) * self.share)

    def dispatch(self, u: Operand, routing: Routing) -> Dispatched:
        """u: [T, D]; T may differ between ranks."""
        value, weights, indices, rows = u.value, routing.weights, routing.indices, self._rows8(u)
        tables = self.legs[0].tables(indices)
        plan = self._plan(self._gather(self._figures(routing, tables[2])))
        journey: list[Trip] = []
        for leg, route in zip(self.legs, plan.routes):
            slot_of_item, item_of_slot, _ = leg.tables(indices) if journey else tables
            journey.append(Trip(slot_of_item, item_of_slot[: sum(route.sent)], route))
            value, weights, indices, rows = _Forth.apply(value, weights, indices, *journey[-1], rows)
        self.load.note(plan.rows, value.shape[0], plan.crossed)
        tables_here = self._tables(routing, indices, plan.rows)
        return self._sort(Operand(value, rows=rows), weights, tables_here)._replace(journey=tuple(journey))

    def combine(self, rows: Tensor, dispatched: Dispatched, base: Tensor) -> Tensor:
        total = self._sum(rows, dispatched, None)
        first, *others = dispatched.journey
        for trip in reversed(others):
            total = _Back.apply(total, None, *trip, dispatched.passed)
        return _Back.apply(total, base, *first, dispatched.passed)

    def _tables(self, routing: Routing, indices: Tensor, rows: int) -> Routing:
        """The routing with tables of the experts held here, for items with choices `indices`."""
        held = self.held(self.n_routed_experts)
        elsewhere = (indices < held.start) | (indices >= held.stop)
        here = (indices - held.start).masked_fill(elsewhere, -1)
        slot_of_item, item_of_slot, offsets, _ = kernels.routing_tables(here, self.share, self.align)
        return routing._replace(slot_of_token=slot_of_item, token_of_slot=item_of_slot[:rows], offsets=offsets)

    # -- counts: device -> host ----------------------------------------------------------------------------------------

    def _figures(self, routing: Routing, copies: Tensor) -> Tensor:
        """What this rank tells all others: copies per peer of the first leg [size], rows per expert [E]."""
        return torch.cat([copies, routing.counts])

    def _gather(self, figures: Tensor) -> np.ndarray:
        """Every rank's figures, [size, F], on the host, which waits for them."""
        table = figures.new_empty(self.size, figures.numel())
        dist.all_gather(list(table.unbind()), figures, group=self.group)
        return table.cpu().numpy()

    def _plan(self, figures: np.ndarray) -> Plan:
        copies, experts = np.split(figures, [self.size], axis=1)
        route = Route(self.group, copies[self.rank].tolist(), copies[:, self.rank].tolist())
        return Plan([route], self._rows(experts))

    def _rows(self, experts: np.ndarray) -> int:
        """Rows of the experts held here, each expert's filled up to `align`; experts: [size, E], of every rank's
        tokens."""
        held = self.held(self.n_routed_experts)
        rows = experts[:, held.start : held.stop].sum(axis=0)
        return int((-(-rows // self.align) * self.align).sum())


class _Forth(torch.autograd.Function):
    """Copies of items travel with their gates and choices; in backward the gradients of an item's copies are summed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gates: Tensor,
        indices: Tensor,
        slot_of_item: Tensor,
        item_of_slot: Tensor,
        route: Route,
        rows: Rows | None,
    ) -> tuple[Tensor, Tensor, Tensor, Rows | None]:
        """rows: x in FP8, which travels instead of it; x is autograd's handle then."""
        ctx.save_for_backward(slot_of_item)
        ctx.route = route
        if rows is None:
            came = route.forth(kernels.permute(x, item_of_slot))
        else:
            rows = route.forth8(Rows(*kernels.permute_fp8(*rows, item_of_slot)))
            came = placeholder(x, *rows.codes.shape)
        # Gates and choices share a message: FP32 is one int32 wide, FP64 two.
        labels = torch.cat([gates.view(torch.int32), indices], dim=1)
        labels = route.forth(labels.index_select(0, item_of_slot))
        top_k = indices.shape[1]
        indices = labels[:, -top_k:].contiguous()
        ctx.mark_non_differentiable(indices)
        return came, labels[:, :-top_k].contiguous().view(gates.dtype), indices, rows

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dgates: Tensor, *_: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (slot_of_item,) = ctx.saved_tensors
        dx, dgates = (ctx.route.back(gradient.contiguous()) for gradient in (dx, dgates))
        dx, dgates = (kernels.unpermute(gradient, slot_of_item) for gradient in (dx, dgates))
        return dx, dgates, None, None, None, None, None


class _Back(torch.autograd.Function):
    """The sums of an item's copies return and are added, onto `base` where there is one; the adjoint of `_Forth`."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        base: Tensor | None,
        slot_of_item: Tensor,
        item_of_slot: Tensor,
        route: Route,
        passed: Passed | None,
    ) -> Tensor:
        ctx.save_for_backward(item_of_slot)
        ctx.route, ctx.passed = route, passed
        return kernels.unpermute(route.back(rows.contiguous()), slot_of_item, base)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (item_of_slot,) = ctx.saved_tensors
        dbase = dy if ctx.needs_input_grad[1] else None
        if ctx.passed is None:
            return ctx.route.forth(kernels.permute(dy.contiguous(), item_of_slot)), dbase, None, None, None, None
        rows = ctx.route.forth8(Rows(*kernels.permute_fp8(*ctx.passed.take(dy), item_of_slot)))
        ctx.passed.put(rows)
        return placeholder(dy, *rows.codes.shape), dbase, None, None, None, None
