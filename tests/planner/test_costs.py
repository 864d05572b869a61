"""Times of actions: with equal stages the schedules' formulas, and what pairs hide."""

from dataclasses import replace

import pytest
from plans import constants, v3, v3_simulator

from deepv3.pipeline.actions import Action, Pair
from deepv3.pipeline.check import check
from deepv3.pipeline.schedule import make_schedule
from deepv3.planner.costs import Costs, Stage
from deepv3.planner.network import AllToAll
from deepv3.planner.simulate import Simulator
from deepv3.planner.work import Layer, Seconds

# -- the bubble's formula ---------------------------------------------------------------------------------------------


def one_layer(forward, inputs, weight):
    """A dense layer of three equal-sided pieces."""
    half = [Seconds(any=seconds / 2) for seconds in (forward, inputs, weight)]
    return Layer(False, *half, *half, shared=0.0)


EQUAL = Stage((one_layer(1.0, 1.0, 0.9),))


def equal_costs(stages: int) -> Costs:
    """Stages alike, no network, no interference."""
    return Costs([EQUAL] * stages, AllToAll(0.0, 0.0, 0.0, 0.0), message=0.0, stretch=1.0, full=False)


@pytest.mark.parametrize(
    "name, ranks, count", [("1f1b", 8, 20), ("zb1p", 8, 20), ("dualpipe", 8, 20), ("dualpipev", 4, 10)]
)
def test_the_simulated_bubble_equals_the_formula(name, ranks, count):
    """Equal stages, no network: F = I = 1.0, W = 0.9, and a pair takes what its halves take."""
    schedule = make_schedule(name, ranks, count)
    costs = equal_costs(schedule.stages)
    f, b, w = (costs(Action(kind, 1, 0)) for kind in "FBW")
    pair = costs(Pair(Action("F", 1, 0), Action("B", 2, 1)))
    assert (f, b, w, pair) == pytest.approx((1.0, 1.9, 0.9, 2.9))
    half = ranks // 2 if name == "dualpipe" else ranks
    formula = {"1f1b": (ranks - 1) * (f + b), "zb1p": (ranks - 1) * (f + b - 2 * w)}.get(
        name, (half - 1) * (pair + b - 3 * w)
    )
    assert max(check(schedule, costs).bubble) == pytest.approx(formula)


# -- costs of actions -------------------------------------------------------------------------------------------------


def test_a_pair_hides_communication_that_its_halves_would_show():
    costs = v3_simulator().costs
    pair = costs.cost(Pair(Action("F", 3, 0), Action("B", 12, 1)))
    f, b = costs.cost(Action("F", 3, 0)), costs.cost(Action("B", 12, 1))
    assert pair.exposed < 0.1 * (f.exposed + b.exposed)
    assert pair.seconds < f.seconds + b.seconds
    assert pair.stretched == pytest.approx(0.05 * (pair.seconds - pair.stretched))


def test_a_slow_network_shows_in_a_pair():
    slow = Simulator(v3(), constants(nic=0.1)).costs.cost(Pair(Action("F", 3, 0), Action("B", 12, 1)))
    assert slow.exposed > 0.0


def test_a_full_backward_is_its_two_halves_less_what_it_hides():
    costs = v3_simulator().costs
    b, i, w = (costs.cost(Action(kind, 4, 0)) for kind in "BIW")
    assert b.seconds - b.exposed == pytest.approx(i.seconds - i.exposed + w.seconds)
    assert b.exposed <= i.exposed


def test_a_stage_without_layers_takes_some_time():
    nothing = Costs([Stage(())] * 2, AllToAll(0.0, 0.0, 0.0, 0.0), message=0.0, stretch=1.0, full=False)
    assert nothing(Action("F", 0, 0)) > 0.0


def test_one_rank_hides_its_exchanges_in_pairs():
    """DualPipeV on one pipeline rank: no messages, and less of the network in the open than with 1F1B."""
    base = {"pp": 1, "ep": 8, "cluster": replace(v3().cluster, count=8), "batch": 8 * 16, "precision": "bf16"}
    paired, plain = (Simulator(v3(**base, schedule=name), constants()) for name in ("dualpipev", "1f1b"))
    assert paired.costs.message == 0.0
    assert paired.step().exposed < 0.3 * plain.step().exposed
    assert paired.step().pipeline < plain.step().pipeline * 1.05
