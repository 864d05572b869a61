"""Redundant experts: which experts get a second copy at inference, and on which rank every copy lies.

The method is that of DeepSeek's expert-parallel load balancer (public, EPLB; report 3.4.1 and 3.4.2), written anew:

1. *Groups to nodes.* A group of experts (the router's, report 2.1.2) stays on one node, because a token reaches a
   limited number of groups: the heaviest group first, each to the lightest node with room.
2. *Copies.* Within each node, every spare slot goes to the expert with the largest load per copy.
3. *Copies to ranks.* Within each node, the heaviest copy first, each to the lightest rank with a free slot.
4. *Never worse than doing nothing.* A layer for which ``in_order`` or ``in_place`` has the smaller fullest rank takes
   that. This step is ours: 1-3 are greedy, and on one small case in ten they lose to one of the two.

Where the groups do not divide over the nodes, the whole machine counts as one node and all experts as one group, which
is also the better balance and the larger traffic between nodes. Words: a *slot* is room for one expert's weights; slots
are numbered rank by rank. A *copy* is an expert in a slot; the tokens of an expert split evenly over its copies.

Given up: loads that change within a batch, the price of moving weights, splitting tokens unevenly over copies. Pure
Python without torch or numpy; the same input gives the same placement, ties go to the smaller number.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from deepv3.errors import ConfigError

Weights = Sequence[float]  # load of each item; any unit, only ratios matter


@dataclass(frozen=True)
class Layout:
    """Sizes. ``slots - experts`` of the slots are redundant; every rank holds ``slots / ranks`` of them."""

    experts: int  # logical experts of a layer
    slots: int  # physical experts of a layer, over all ranks
    ranks: int  # GPUs that share one layer's experts
    nodes: int = 1
    groups: int = 1  # the model's n_group

    @property
    def slots_per_rank(self) -> int:
        return self.slots // self.ranks

    @property
    def hierarchical(self) -> bool:
        """Whether every node gets the same number of whole groups."""
        return self.groups % self.nodes == 0

    @property
    def islands(self) -> int:
        """Parts that are balanced on their own: the nodes, or 1 where placement is global."""
        return self.nodes if self.hierarchical else 1

    def check(self) -> None:
        """Raises ConfigError with both sides of the equation that fails and a value that mends it."""
        for name, value in (("experts", self.experts), ("ranks", self.ranks), ("nodes", self.nodes)):
            if value < 1:
                raise ConfigError(f"{name} = {value}, must be at least 1")
        spare = self.slots - self.experts
        if spare < 0:
            raise ConfigError(
                f"{self.slots} slots < {self.experts} experts (a shared one that is placed counts): "
                f"add {-spare} to replicas"
            )
        if self.slots % self.ranks:
            fits = max(r for r in range(1, self.ranks) if self.slots % r == 0)
            raise ConfigError(
                f"{self.experts} experts + {spare} redundant = {self.slots} slots do not fill {self.ranks} ranks "
                f"evenly: {self.slots} % {self.ranks} = {self.slots % self.ranks}, must be 0; "
                f"add {-self.slots % self.ranks} to replicas, or set ranks={fits}"
            )
        if self.ranks % self.nodes:
            raise ConfigError(
                f"ranks % nodes = {self.ranks} % {self.nodes} = {self.ranks % self.nodes}, must be 0; "
                "change ranks or nodes"
            )
        if self.groups < 1 or self.experts % self.groups:
            left = f"{self.experts} % {self.groups} = {self.experts % self.groups}" if self.groups else "groups = 0"
            raise ConfigError(f"experts % groups: {left}, must be 0; groups=1 places without regard to groups")


def pack(weights: Weights, packs: int) -> list[list[int]]:
    """Step 1 and 3: items into equally long packs, the heaviest first, each to the lightest pack with room.

    weights: one per item, their number divisible by packs. Returns the items of each pack in the order they came.
    With one item per pack nothing is to be balanced, and item i goes to pack i.

        pack([5, 1, 4, 4], 2) == [[0, 1], [2, 3]]     5 | 4, then 4 to the lighter second, 1 to the first
    """
    room = len(weights) // packs
    if room == 1:
        return [[item] for item in range(packs)]
    members: list[list[int]] = [[] for _ in range(packs)]
    lightest = [(0.0, p) for p in range(packs)]
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        load, p = heapq.heappop(lightest)
        members[p].append(item)
        if len(members[p]) < room:
            heapq.heappush(lightest, (load + weights[item], p))
    return members


def replicate(weights: Weights, slots: int) -> list[int]:
    """Step 2: the item in each slot. One copy of each in order, then each further slot to the largest weight per copy.

    replicate([6, 1], 4) == [0, 1, 0, 0]: 6 > 1, then 6/2 > 1.
    """
    copies = [1] * len(weights)
    heaviest = [(-weight, item) for item, weight in enumerate(weights)]
    heapq.heapify(heaviest)
    items = list(range(len(weights)))
    for _ in range(slots - len(weights)):
        _, item = heaviest[0]
        items.append(item)
        copies[item] += 1
        heapq.heapreplace(heaviest, (-weights[item] / copies[item], item))
    return items


def greedy(weights: Weights, layout: Layout) -> list[int]:
    """Steps 1-3, exactly EPLB's. weights: [experts]. Returns the expert in each slot, [slots]."""
    islands = layout.islands
    groups = layout.groups if layout.hierarchical else 1
    size = layout.experts // groups
    sums = [sum(weights[g * size : (g + 1) * size]) for g in range(groups)]
    placed: list[int] = []
    for members in pack(sums, islands):
        experts = [g * size + k for g in members for k in range(size)]
        copies = replicate([weights[e] for e in experts], layout.slots // islands)
        shares = [weights[experts[c]] / n for c, n in zip(copies, counts_of(copies, copies))]
        for rank in pack(shares, layout.ranks // islands):
            placed += [experts[copies[i]] for i in rank]
    return placed


def in_order(layout: Layout) -> list[int]:
    """What needs no measured load: per island its experts in their order, over and over until its slots are full."""
    size, slots = layout.experts // layout.islands, layout.slots // layout.islands
    return [island * size + i % size for island in range(layout.islands) for i in range(slots)]


def in_place(layout: Layout) -> list[int]:
    """The experts in order over the ranks, as without redundancy; a rank's spare slots repeat what it holds already.

    With fewer experts than ranks, neighbours share one. No rank has more load than in ``without_redundancy``, so
    neither has the best placement.
    """
    n, ranks, placed = layout.experts, layout.ranks, []
    for r in range(ranks):
        first = r * n // ranks
        held = max((r + 1) * n // ranks - first, 1)
        placed += [first + i % held for i in range(layout.slots_per_rank)]
    return placed


def balance(weights: Weights, layout: Layout) -> list[int]:
    """Steps 1-4 for one layer. weights: [experts], finite and >= 0. Returns the expert in each slot, [slots]."""
    published = greedy(weights, layout)
    plain = min(in_order(layout), in_place(layout), key=lambda placed: fullest(placed, weights, layout))
    # A difference in the last bits is no reason to leave the published method's answer.
    better = fullest(plain, weights, layout) < fullest(published, weights, layout) * (1 - 1e-9)
    return plain if better else published


def counts_of(wanted: Sequence[int], placed: Sequence[int]) -> list[int]:
    """How often each of the wanted is among the placed."""
    seen: dict[int, int] = {}
    for item in placed:
        seen[item] = seen.get(item, 0) + 1
    return [seen.get(item, 0) for item in wanted]


def rank_loads(placed: Sequence[int], weights: Weights, ranks: int) -> list[float]:
    """Load of each rank when every expert's load is split evenly over its copies. placed: [slots]."""
    shares = [weights[e] / n for e, n in zip(placed, counts_of(placed, placed))]
    room = len(placed) // ranks
    return [math.fsum(shares[r * room : (r + 1) * room]) for r in range(ranks)]


def fullest(placed: Sequence[int], weights: Weights, layout: Layout) -> float:
    """Load of the fullest rank: what a layer's step waits for."""
    return max(rank_loads(placed, weights, layout.ranks))


def over_mean(loads: Sequence[float]) -> float:
    """Largest over mean; 1 where there is no load at all."""
    total = math.fsum(loads)
    return max(loads) * len(loads) / total if total > 0 else 1.0


def without_redundancy(weights: Weights, ranks: int) -> float:
    """Largest over mean load of the ranks with the experts in their order and one copy of each.

    Where the experts do not divide over the ranks, some ranks hold one more than others, maybe none.
    """
    n = len(weights)
    return over_mean([math.fsum(weights[r * n // ranks : (r + 1) * n // ranks]) for r in range(ranks)])


def slots_of_experts(placed: Sequence[int], experts: int) -> list[list[int]]:
    """For each expert the slots that hold it, ascending: the inverse of a placement."""
    held: list[list[int]] = [[] for _ in range(experts)]
    for slot, expert in enumerate(placed):
        held[expert].append(slot)
    return held
