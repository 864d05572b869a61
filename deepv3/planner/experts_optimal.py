"""The best placement there is, by exhaustive search over small cases, and how far the greedy method stays behind it.

``python -m deepv3.planner.experts_optimal [cases=N] [seed=N]`` draws small random cases and prints the ratios.

Method: every way to give each expert at least one copy, and for each the copies packed into ranks by depth-first
search, heaviest first, cut where a rank reaches the best found so far. With whole groups on nodes: every way to deal
groups to nodes, each node searched on its own. Time grows like slots!, so this is for up to about 12 slots.
"""

import itertools
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from deepv3.config.cli import guarded
from deepv3.config.compose import from_arguments
from deepv3.config.schema import knob
from deepv3.errors import ConfigError
from deepv3.planner.experts import Layout, Weights, balance, fullest, greedy, in_order

LARGEST = 16  # slots of an island; beyond, the search takes minutes to for ever
SLACK = 1e-12  # relative; below it two loads are the same number in another order of adding


def copy_counts(slots: int, experts: int) -> Iterator[tuple[int, ...]]:
    """Every way to share slots among experts with at least one each."""
    for cuts in itertools.combinations(range(1, slots), experts - 1):
        edges = (0, *cuts, slots)
        yield tuple(b - a for a, b in itertools.pairwise(edges))


def best_packing(shares: list[float], ranks: int, room: int, best: float) -> float:
    """The smallest possible fullest rank, or `best` where none is below it. shares: ranks * room, descending."""
    loads, free = [0.0] * ranks, [room] * ranks

    def place(item: int) -> None:
        nonlocal best
        if item == len(shares):
            best = max(loads)
            return
        tried = set()
        for rank in range(ranks):
            state = (loads[rank], free[rank])  # ranks in the same state are interchangeable
            if not free[rank] or state in tried or loads[rank] + shares[item] >= best * (1 - SLACK):
                continue
            tried.add(state)
            loads[rank], free[rank] = loads[rank] + shares[item], free[rank] - 1
            place(item + 1)
            loads[rank], free[rank] = state

    place(0)
    return best


def best_island(weights: Weights, slots: int, ranks: int, best: float) -> float:
    """The smallest possible fullest rank of one island, or `best` where none is below it."""
    room, floor = slots // ranks, sum(weights) / ranks
    for counts in copy_counts(slots, len(weights)):
        if best <= floor * (1 + SLACK):
            break
        shares = sorted((w / n for w, n in zip(weights, counts) for _ in range(n)), reverse=True)
        if shares[0] + sum(shares[len(shares) - room + 1 :]) < best:  # the largest with the smallest beside it
            best = best_packing(shares, ranks, room, best)
    return best


def deals(groups: tuple[int, ...], each: int) -> Iterator[list[tuple[int, ...]]]:
    """Every way to split groups into unordered parts of `each`."""
    if not groups:
        yield []
        return
    first, rest = groups[0], groups[1:]
    for others in itertools.combinations(rest, each - 1):
        left = tuple(g for g in rest if g not in others)
        for parts in deals(left, each):
            yield [(first, *others), *parts]


def optimum(weights: Weights, layout: Layout) -> float:
    """Load of the fullest rank of the best placement that the layout allows. Raises ConfigError for large cases."""
    layout.check()
    islands, slots = layout.islands, layout.slots // layout.islands
    if slots > LARGEST:
        raise ConfigError(f"exhaustive search over {slots} slots: at most {LARGEST}")
    groups = layout.groups if layout.hierarchical else 1
    size = layout.experts // groups
    best = float("inf")
    for parts in deals(tuple(range(groups)), groups // islands):
        worst = 0.0
        for part in parts:
            inside = [weights[g * size + k] for g in part for k in range(size)]
            worst = max(worst, best_island(inside, slots, layout.ranks // islands, best))
        best = min(best, worst)
    return best


def draw(rng: random.Random) -> tuple[list[float], Layout]:
    """A small case: 2-8 ranks, up to 10 slots an island, loads between even and heavy-tailed, integers now and then."""
    nodes = rng.choice([1, 1, 2])
    groups_per_node = rng.choice([1, 2]) if nodes > 1 else 1
    ranks, room = rng.choice([2, 3, 4]), rng.choice([1, 2, 3, 4, 5])
    if ranks * room > 10 or ranks * room < groups_per_node:
        return draw(rng)
    size = rng.randint(1, ranks * room // groups_per_node)
    experts = nodes * groups_per_node * size
    layout = Layout(experts, nodes * ranks * room, nodes * ranks, nodes, nodes * groups_per_node)
    law = rng.choice([lambda: rng.randint(1, 100), rng.random, lambda: rng.lognormvariate(0, 1)])
    return [float(law()) for _ in range(experts)], layout


def ratios(cases: int, seed: int) -> dict[str, list[float]]:
    """Fullest rank over the optimum's, ascending, of the three methods on `cases` random small cases."""
    rng = random.Random(seed)
    found: dict[str, list[float]] = {"in order": [], "greedy (steps 1-3)": [], "balanced (steps 1-4)": []}
    for _ in range(cases):
        weights, layout = draw(rng)
        best = optimum(weights, layout)
        placements = (in_order(layout), greedy(weights, layout), balance(weights, layout))
        for values, placed in zip(found.values(), placements):
            values.append(fullest(placed, weights, layout) / best)
    return {name: sorted(values) for name, values in found.items()}


def table(cases: int, seed: int) -> str:
    """The ratios as a markdown table."""
    lines = ["| over the optimum | optimal | median | mean | 90 % | 99 % | worst |", "|---|---|---|---|---|---|---|"]
    for name, values in ratios(cases, seed).items():
        n = len(values)
        optimal = sum(v < 1 + 1e-9 for v in values) / n
        marks = [values[n // 2], sum(values) / n, values[int(n * 0.9)], values[int(n * 0.99)], values[-1]]
        lines.append(f"| {name} | {optimal:.1%} | " + " | ".join(f"{v:.3f}" for v in marks) + " |")
    return "\n".join(lines)


@dataclass
class Arguments:
    """The command line."""

    cases: int = knob(2000, "Random cases.")
    seed: int = knob(0, "Seed of the draw.")


def main(argv: list[str]) -> None:
    """Print the table."""
    args = from_arguments(argv, Arguments)
    if args.cases < 1:
        raise ConfigError(f"cases = {args.cases}, must be at least 1")
    print(table(args.cases, args.seed))


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
