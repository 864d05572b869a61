"""Times on the network: expert all-to-all with node-limited routing, pipeline messages, gradient collectives.

All-to-all (V3 3.2.2): a token crosses the network once per node that has experts of its choice, to the rank with the
same local number, and goes on by NVLink at once; so the time is the larger of both parts, plus a fixed wait. How many
nodes and ranks a token reaches is the expectation over uniform choices under the group limit:

    nodes N <= groups G   N (1 - C(G - G/N, M) / C(G, M))        M groups of G chosen; V3: N = G = 8, M = 4 -> 4
    N > G                 M r (1 - (1 - 1/r)^(K/M)), r = N/G     K experts spread over M groups of r nodes each
    ranks                 as nodes, with the node's ranks and experts drawn without replacement; V3 at EP64: 7.36

The copies a rank keeps for itself and its own node's share cost nothing on the network. Collectives are rings over all
cards of a node at once (as NCCL's): the slower of NVLink and the node's cards together.
"""

import math
from dataclasses import dataclass
from functools import cache, cached_property

from deepv3.arithmetic import wire_bytes
from deepv3.config.schema import ModelConfig
from deepv3.planner.calibration import Calibration
from deepv3.planner.hardware import Cluster

SAME_LEAF, CROSS_LEAF, NVLINK_LATENCY = 2.8e-6, 3.7e-6, 3.33e-6
"""Seconds for 64 bytes: InfiniBand under one leaf switch and across, NVLink (HW Table 5)."""
EXTRA_LAYER = CROSS_LEAF - SAME_LEAF
"""What a third layer of switches adds again: taken to be what the second adds."""


@cache
def reached(holders: int, groups: int, chosen_groups: int, experts: int, per_token: int) -> float:
    """Expected number of `holders` (nodes or ranks, each with experts/holders of them) that one token goes to."""
    if holders <= 1:
        return 1.0
    chosen_groups = min(chosen_groups, groups)
    if holders <= groups:
        per_holder = groups // holders
        missed = math.comb(groups - per_holder, chosen_groups) / math.comb(groups, chosen_groups)
        return min(float(per_token), holders * (1.0 - missed))
    reachable = holders * chosen_groups / groups
    pool, own = experts * chosen_groups // groups, max(1, experts // holders)
    missed = 1.0
    for draw in range(min(per_token, pool)):
        missed *= max(0.0, (pool - own - draw) / (pool - draw))
    return reachable * (1.0 - missed)


@dataclass(frozen=True)
class AllToAll:
    """Seconds of one micro-batch and layer. dispatch also serves the gradient of combine, and the other way round."""

    dispatch: float
    combine: float
    bytes_nic: float  # forward, dispatch and combine, that one rank sends over the network
    bytes_nvlink: float


@dataclass(frozen=True)
class Network:
    """The communication of one layout on one cluster."""

    cluster: Cluster
    calibration: Calibration

    @cached_property
    def nic(self) -> float:
        """Bytes/s a rank reaches over its share of the node's cards."""
        return self.cluster.device.nic * self.calibration.nic.value

    @cached_property
    def nvlink(self) -> float:
        """Bytes/s a rank reaches to its node's other ranks."""
        return self.cluster.device.nvlink * self.calibration.nvlink.value

    @property
    def latency(self) -> float:
        """Seconds of an empty message between nodes: the leaf is left wherever there is more than one."""
        leaf = self.cluster.fabric.radix // 2 // max(1, 8 // self.cluster.fabric.planes)
        if self.cluster.nodes <= leaf:
            return SAME_LEAF
        return CROSS_LEAF + EXTRA_LAYER * (self.cluster.fabric.layers - 2)

    def all_to_all(self, m: ModelConfig, precision: str, tokens: int, ep: int) -> AllToAll:
        """Dispatch and combine of `tokens` over `ep` consecutive ranks."""
        if ep == 1:
            return AllToAll(0.0, 0.0, 0.0, 0.0)
        nodes = max(1, ep // self.cluster.node)
        local = ep // nodes
        share = (m.n_group, m.topk_group, m.n_routed_experts, m.num_experts_per_tok)
        remote = reached(nodes, *share) * (nodes - 1) / nodes
        forwarded = reached(ep, *share) * (local - 1) / local if local > 1 else 0.0
        wire, cal = wire_bytes(m, precision), self.calibration
        wait = cal.sync_nic.value + self.latency if nodes > 1 else cal.sync_nvlink.value

        def seconds(copy: int) -> float:
            return tokens * copy * max(remote / self.nic, forwarded / self.nvlink) + wait

        both = tokens * (wire.dispatch + wire.combine)
        return AllToAll(seconds(wire.dispatch), seconds(wire.combine), both * remote, both * forwarded)

    def message(self, size: float, inside: bool) -> float:
        """A pipeline message. inside: both ranks share a node."""
        return size / self.nvlink + NVLINK_LATENCY if inside else size / self.nic + self.latency

    def ring(self, size: float, ranks: int, stride: int = 1) -> float:
        """A reduce-scatter or all-gather of `size` bytes over `ranks` ranks that lie `stride` apart."""
        if ranks == 1 or size == 0:
            return 0.0
        per_node = max(1, self.cluster.node // stride)
        if ranks <= per_node:
            rate, step = self.nvlink, NVLINK_LATENCY
        else:
            rate, step = min(self.nvlink, per_node * self.nic), self.latency
        return size * (ranks - 1) / ranks / rate + step * math.log2(ranks)
