"""Expert parallelism over several nodes: a token crosses to a node once, then fans out inside (V3 3.2.2).

For nodes of L ranks; rank (n, i) is number i of node n:
1. A token is copied once for every node that holds at least one of its experts. The copy for node n goes from (m, i) to
   (n, i), the rank of the same number, so every rank uses its own network card.
2. There it is copied once for every rank of the node that holds at least one of its experts, and goes on inside the
   node. The experts see rows in the order (expert, landing rank, source node, token).
3. Home: rows of one copy are summed by the rank that made them; the landing rank adds these sums in ascending order of
   ranks; home adds the nodes' sums to the base in ascending order of nodes. Each sum is in FP32 and rounded once.

Routing that is limited to M of the nodes (V3 2.1.2) sends at most M copies over the network, however many experts a
token has. All counts of both exchanges come in one message, so the host still waits once per dispatch.
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import deepv3.kernels as kernels
from deepv3.dist import DEVICE_TIMEOUT, Grid
from deepv3.errors import ConfigError
from deepv3.model.dispatch import LocalDispatch
from deepv3.model.exchange import AllToAllDispatch, Leg, Plan, Route
from deepv3.model.router import Routing
from deepv3.model.symmetric import Extent, SymmetricDispatch
from deepv3.precision.recipe import Recipe


class NodeDispatch(AllToAllDispatch):
    """group: all ranks that share the experts, node after node; inner: those of this node; cross: one rank of every
    node, of this rank's number. Otherwise as `AllToAllDispatch`."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        cross: dist.ProcessGroup,
        inner: dist.ProcessGroup,
        n_routed_experts: int,
        keep_rows: bool = False,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__(group, n_routed_experts, keep_rows, recipe)
        self.nodes, self.per_node = dist.get_world_size(cross), dist.get_world_size(inner)
        assert self.nodes * self.per_node == self.size, (self.nodes, self.per_node, self.size)
        self.node, self.number = divmod(self.rank, self.per_node)
        self.ranks = self.legs[0]  # as if there were no nodes
        share = self.share * self.per_node
        self.legs = (Leg(cross, self.nodes, 0, share), Leg(inner, self.per_node, self.node * share, self.share))

    def _figures(self, routing: Routing, copies: Tensor) -> Tensor:
        """Copies per node [nodes], tokens per rank that they are for [size], rows per expert [E]."""
        fanned = kernels.routing_tables(self.ranks.destinations(routing.indices), self.size)[3]
        return torch.cat([copies, fanned, routing.counts])

    def _plan(self, figures: np.ndarray) -> Plan:
        figures = figures.reshape(self.nodes, self.per_node, -1)  # by source
        copies, fanned, experts = np.split(figures, [self.nodes, self.nodes + self.size], axis=2)
        fanned = fanned.reshape(*fanned.shape[:2], self.nodes, self.per_node)
        mine = copies[self.node, self.number]
        cross = Route(self.legs[0].group, mine.tolist(), copies[:, self.number, self.node].tolist())
        # What lands on (n, i) came from (m, i) of all nodes m.
        sent = fanned[:, self.number, self.node, :].sum(axis=0)
        received = fanned[:, :, self.node, self.number].sum(axis=0)
        inner = Route(self.legs[1].group, sent.tolist(), received.tolist())
        crossed = int(mine.sum() - mine[self.node])
        return Plan([cross, inner], self._rows(experts.reshape(self.size, -1)), crossed)


def make_dispatch(
    grid: Grid,
    n_routed_experts: int,
    ranks_per_node: int,
    keep_rows: bool = False,
    recipe: Recipe | None = None,
    extent: Extent | None = None,
) -> LocalDispatch:
    """The dispatcher of this rank: local without expert parallelism, by node where expert groups span nodes of several
    ranks, else plain all-to-all. Collective over the world (it makes groups): once per run, for all layers.

    ranks_per_node: consecutive ranks that share a fast network. keep_rows: for layers that recompute everything.
    recipe: the model's, with which tokens travel in FP8. extent: of a dispatch at most; given where the exchange is to
    go through memory that the ranks of a node share.
    Raises ConfigError where an expert group covers a node in part, or more than one and is to share memory, or ep_size
    does not divide the experts.
    """
    if grid.ep_size == 1:
        return LocalDispatch(keep_rows, recipe)
    if extent is not None:
        if ranks_per_node < grid.ep_size:
            raise ConfigError(
                f"parallel.dispatcher = symmetric shares memory inside a node, and parallel.ep_size = {grid.ep_size} "
                f"exceeds the {ranks_per_node} ranks of one; set parallel.ep_size={ranks_per_node} or less, or "
                f"parallel.dispatcher=all_to_all"
            )
        return SymmetricDispatch(grid.group("ep"), n_routed_experts, extent, grid.device, keep_rows, recipe)
    if ranks_per_node == 1 or ranks_per_node >= grid.ep_size:
        return AllToAllDispatch(grid.group("ep"), n_routed_experts, keep_rows, recipe)
    if grid.ep_size % ranks_per_node:
        raise ConfigError(
            f"parallel.ep_size = {grid.ep_size} covers a node of {ranks_per_node} ranks in part: {grid.ep_size} % "
            f"{ranks_per_node} = {grid.ep_size % ranks_per_node}; set ep_size to a multiple of {ranks_per_node}, or to "
            f"at most {ranks_per_node}"
        )
    inner: list[list[int]] = []
    cross: list[list[int]] = []
    for row in grid.slices("ep"):
        nodes = np.asarray(row).reshape(-1, ranks_per_node)
        inner += nodes.tolist()
        cross += nodes.T.tolist()
    own_cross, own_inner = _own_group(cross, grid.rank), _own_group(inner, grid.rank)
    return NodeDispatch(grid.group("ep"), own_cross, own_inner, n_routed_experts, keep_rows, recipe)


def _own_group(rows: list[list[int]], rank: int) -> dist.ProcessGroup:
    """All groups are made by all ranks, in the same order; this rank keeps its own."""
    made = {tuple(row): dist.new_group(row, timeout=DEVICE_TIMEOUT) for row in rows}
    return next(group for row, group in made.items() if rank in row)
