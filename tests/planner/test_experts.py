"""Redundant experts: the published answers, what every placement keeps to, and what is refused."""

import random
import time

import pytest

from deepv3.errors import ConfigError
from deepv3.planner import experts
from deepv3.planner.experts import Layout, balance, fullest, greedy, in_order, in_place, pack, replicate

# The public balancer's own example and its answer.
EXAMPLE = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
ANSWER = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
EXAMPLE_LAYOUT = Layout(experts=12, slots=16, ranks=8, nodes=2, groups=4)


def cases(seed: int, number: int):
    """Random loads and layouts, among them more nodes than divide the groups, and experts without load."""
    rng = random.Random(seed)
    for _ in range(number):
        nodes, groups, size = rng.choice([1, 2, 3, 4]), rng.choice([1, 2, 4, 6, 8]), rng.randint(1, 8)
        ranks, n = nodes * rng.choice([1, 2, 4]), groups * size
        layout = Layout(n, ranks * (-(-n // ranks) + rng.randint(0, 3)), ranks, nodes, groups)
        layout.check()
        law = rng.choice([rng.random, lambda: rng.lognormvariate(0, 1.5), lambda: rng.choice([0, 0, 1, 5])])
        yield [float(law()) for _ in range(n)], layout


@pytest.mark.parametrize("weights, answer", zip(EXAMPLE, ANSWER))
def test_the_published_example_gives_the_published_placement(weights, answer):
    assert greedy(weights, EXAMPLE_LAYOUT) == answer
    assert balance(weights, EXAMPLE_LAYOUT) == answer


def test_packing_takes_the_heaviest_first_and_keeps_packs_of_equal_length():
    assert pack([5, 1, 4, 4], 2) == [[0, 1], [2, 3]]
    assert pack([1, 9, 5], 3) == [[0], [1], [2]], "one item per pack: nothing to balance"
    assert pack([9, 1, 1, 1], 2) == [[0, 3], [1, 2]], "a full pack takes no more, however light"


def test_replication_copies_the_largest_load_per_copy():
    assert replicate([6, 1], 4) == [0, 1, 0, 0]
    assert replicate([3, 3, 3], 5) == [0, 1, 2, 0, 1], "ties go to the smaller number"


def test_every_expert_is_placed_and_every_slot_filled():
    for weights, layout in cases(1, 300):
        for placed in (balance(weights, layout), greedy(weights, layout), in_order(layout), in_place(layout)):
            assert len(placed) == layout.slots == layout.ranks * layout.slots_per_rank
            assert set(placed) == set(range(layout.experts))


def test_hierarchical_placement_keeps_whole_groups_on_nodes():
    seen = 0
    for weights, layout in cases(2, 300):
        if layout.islands == 1:
            continue
        seen += 1
        room, size = layout.slots // layout.nodes, layout.experts // layout.groups
        for placed in (balance(weights, layout), greedy(weights, layout)):
            nodes_of = [set() for _ in range(layout.groups)]
            for slot, expert in enumerate(placed):
                nodes_of[expert // size].add(slot // room)
            assert all(len(nodes) == 1 for nodes in nodes_of)
            per_node = [sum(node in nodes for nodes in nodes_of) for node in range(layout.nodes)]
            assert per_node == [layout.groups // layout.nodes] * layout.nodes
    assert seen > 100


def test_groups_that_do_not_divide_over_nodes_are_placed_as_on_one_node():
    weights = [random.Random(3).random() for _ in range(16)]
    assert Layout(16, 24, 12, nodes=3, groups=4).islands == 1
    assert balance(weights, Layout(16, 24, 12, nodes=3, groups=4)) == balance(weights, Layout(16, 24, 12))


def test_no_load_is_lost_or_invented():
    for weights, layout in cases(4, 100):
        loads = experts.rank_loads(balance(weights, layout), weights, layout.ranks)
        assert sum(loads) == pytest.approx(sum(weights))


def test_a_placement_is_never_worse_than_order_or_than_no_redundancy():
    better = 0
    for weights, layout in cases(5, 500):
        placed = balance(weights, layout)
        assert fullest(placed, weights, layout) <= fullest(in_order(layout), weights, layout) * (1 + 1e-8)
        ratio = experts.over_mean(experts.rank_loads(placed, weights, layout.ranks))
        assert ratio <= experts.without_redundancy(weights, layout.ranks) * (1 + 1e-8)
        better += placed != greedy(weights, layout)
    assert better > 10, "the greedy steps alone do not keep this promise"


def test_the_same_loads_give_the_same_placement_at_any_scale():
    for weights, layout in cases(6, 100):
        placed = balance(weights, layout)
        assert balance(list(weights), layout) == placed
        assert balance([w * 1024 for w in weights], layout) == placed, "only ratios matter"


def test_a_layer_without_any_load_is_placed_and_counts_as_even():
    layout = Layout(8, 12, 4)
    placed = balance([0.0] * 8, layout)
    assert set(placed) == set(range(8))
    assert experts.over_mean(experts.rank_loads(placed, [0.0] * 8, 4)) == 1.0


def test_as_many_copies_as_ranks_for_each_expert_balances_perfectly():
    weights = [1.0, 100.0, 3.0]
    assert experts.over_mean(experts.rank_loads([0, 1, 2] * 4, weights, 4)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "layout, message",
    [
        (Layout(16, 19, 8), r"16 experts \+ 3 redundant = 19 slots .* 19 % 8 = 3, must be 0; add 5 to replicas"),
        (Layout(16, 15, 5), r"15 slots < 16 experts .*: add 1 to replicas"),
        (Layout(16, 24, 8, nodes=3), r"ranks % nodes = 8 % 3 = 2, must be 0"),
        (Layout(16, 24, 8, groups=5), r"experts % groups: 16 % 5 = 1, must be 0"),
        (Layout(16, 24, 8, groups=0), r"groups = 0"),
        (Layout(16, 16, 0), r"ranks = 0, must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused_with_both_sides(layout, message):
    with pytest.raises(ConfigError, match=message):
        layout.check()


def test_what_a_refusal_proposes_is_possible():
    Layout(16, 19 + 5, 8).check()
    with pytest.raises(ConfigError, match="ranks=6"):
        Layout(16, 18, 8).check()
    Layout(16, 18, 6).check()


@pytest.mark.parametrize(
    "layout", [Layout(256, 288, 32, nodes=4, groups=8), Layout(257, 320, 320, nodes=40), Layout(256, 512, 64)]
)
def test_58_layers_of_256_experts_take_less_than_two_seconds(layout):
    rng = random.Random(7)
    layers = [[rng.lognormvariate(0, 0.5) for _ in range(layout.experts)] for _ in range(58)]
    began = time.perf_counter()
    for weights in layers:
        balance(weights, layout)
    assert time.perf_counter() - began < 2.0
