"""The exhaustive optimum, held against plain enumeration, and the balancer held against it."""

import itertools
import random

import pytest

from deepv3.errors import ConfigError
from deepv3.planner.experts import Layout, balance, fullest
from deepv3.planner.experts_optimal import deals, draw, main, optimum, ratios

# Measured on 20,000 cases of each of five seeds (docs/redundant-experts.md): worst 1.5, 99 % within 1.16.
WORST, NEARLY_ALL = 1.51, 1.2


def enumerated(weights: list[float], layout: Layout) -> float:
    """The optimum by trying every expert in every slot."""
    size, room = layout.experts // layout.groups, layout.slots // layout.nodes
    best = float("inf")
    for placed in itertools.product(range(layout.experts), repeat=layout.slots):
        if len(set(placed)) < layout.experts:
            continue
        if layout.islands > 1:
            homes = {(expert // size, slot // room) for slot, expert in enumerate(placed)}
            if len(homes) > layout.groups:
                continue
        best = min(best, fullest(placed, weights, layout))
    return best


@pytest.mark.parametrize(
    "layout",
    [Layout(3, 6, 2), Layout(4, 6, 3), Layout(5, 6, 2), Layout(4, 8, 4, nodes=2, groups=2), Layout(3, 6, 6)],
)
def test_the_search_finds_what_trying_every_placement_finds(layout):
    rng = random.Random(str(layout))
    for _ in range(2):
        weights = [rng.lognormvariate(0, 1) for _ in range(layout.experts)]
        assert optimum(weights, layout) == pytest.approx(enumerated(weights, layout), rel=1e-9)


def test_groups_are_dealt_in_every_way_once():
    found = [tuple(sorted(parts)) for parts in deals((0, 1, 2, 3), 2)]
    assert sorted(found) == [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))]


def test_the_balancer_stays_within_the_stated_factor_of_the_optimum():
    found = ratios(1500, seed=11)
    plain, ours = found["in order"], found["balanced (steps 1-4)"]
    assert ours[0] >= 1 - 1e-9, "nothing is better than the optimum"
    assert ours[-1] <= WORST and ours[int(0.99 * len(ours))] <= NEARLY_ALL
    assert sum(v < 1 + 1e-9 for v in ours) > 0.6 * len(ours)
    assert sum(ours) < 0.9 * sum(plain)


def test_more_replicas_never_raise_the_optimum():
    rng, seen, gains = random.Random(12), 0, 0
    while seen < 300:
        weights, layout = draw(rng)
        more = Layout(layout.experts, layout.slots + layout.ranks, layout.ranks, layout.nodes, layout.groups)
        if more.slots // more.islands > 10:
            continue  # longer than a test should take
        seen += 1
        before, after = optimum(weights, layout), optimum(weights, more)
        assert after <= before * (1 + 1e-9)
        gains += after < before * 0.999
    assert gains > 100


def test_more_replicas_may_raise_the_balancers_fullest_rank_but_only_a_little():
    rng, raised = random.Random(13), []
    for _ in range(2000):
        weights, layout = draw(rng)
        more = Layout(layout.experts, layout.slots + layout.ranks, layout.ranks, layout.nodes, layout.groups)
        a, b = (fullest(balance(weights, chosen), weights, chosen) for chosen in (layout, more))
        if b > a * (1 + 1e-9):
            raised.append(b / a)
    assert 0 < len(raised) < 0.25 * 2000 and max(raised) < 1.25


def test_large_cases_are_refused():
    with pytest.raises(ConfigError, match="exhaustive search over 24 slots: at most 16"):
        optimum([1.0] * 16, Layout(16, 24, 8))


def test_the_table_is_markdown_and_the_same_each_time(capsys):
    main(["cases=20", "seed=3"])
    first = capsys.readouterr().out
    main(["cases=20", "seed=3"])
    assert capsys.readouterr().out == first
    assert len(first.splitlines()) == 5 and all(line.startswith("|") for line in first.splitlines())


def test_no_cases_and_unknown_keys_are_refused():
    with pytest.raises(ConfigError, match="cases = 0"):
        main(["cases=0"])
    with pytest.raises(ConfigError, match="Did you mean cases"):
        main(["case=2"])
