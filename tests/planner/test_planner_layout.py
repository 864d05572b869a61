"""Layouts read a configuration as training does, and refuse what no grid can run."""

from dataclasses import replace

import pytest
from plans import REPORT, config, v3

from deepv3.errors import ConfigError, ScheduleError
from deepv3.planner.layout import Layout
from deepv3.planner.memory import Memory
from deepv3.planner.plan import Assumptions, make_plan
from deepv3.planner.simulate import Simulator


def test_the_reports_configuration_is_its_layout():
    layout = v3()
    assert (layout.pp, layout.ep, layout.dp, layout.micro_batches, layout.tokens) == (16, 64, 128, 120, 4096)
    assert (layout.stages, layout.copies(), layout.batch, layout.moment_bytes) == (16, 2, 15_360, 2)
    assert v3(schedule="dualpipev", pp=8).stages == 16 and v3(schedule="dualpipev", pp=8).copies() == 1


def test_stages_are_those_that_training_splits():
    assert [str(spec) for spec in v3().specs] == ["E4", *["4"] * 14, "1HM"]


def test_a_layout_text_is_planned_as_written():
    layout = Layout.of(config("+config=v3_671b", "parallel.layout=E|4|...|5HM"))
    assert str(layout.specs[0]) == "E" and str(layout.specs[15]) == "5HM"
    uneven, even = Simulator(layout, REPORT).step(), Simulator(v3(), REPORT).step()
    assert uneven.seconds > 1.1 * even.seconds, "the last stage carries more than its share"
    assert Memory(layout, REPORT).rank(0).parameters != Memory(v3(), REPORT).rank(0).parameters


@pytest.mark.parametrize(
    "change, named",
    [
        ({"pp": 7}, "parallel.pp_size"),
        ({"ep": 96}, "parallel.ep_size"),
        ({"batch": 15_000}, "train.global_batch_size=14976"),
    ],
)
def test_grids_that_do_not_divide_are_refused(change, named):
    with pytest.raises(ConfigError, match=named):
        v3(**change).refuse_impossible()


def test_experts_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="n_routed_experts"):
        v3(m=replace(v3().m, n_routed_experts=96)).refuse_impossible()


def test_strict_refuses_a_step_that_overlaps_less():
    few = ("+config=v3_671b", "cluster=h800_2048", "train.global_batch_size=3072", "train.eval_every=0")
    plan = make_plan(config(*few), [], REPORT, Assumptions())
    assert "fewer pairs overlap" in plan.step.notes[0]
    with pytest.raises(ScheduleError, match="parallel.strict=true"):
        make_plan(config(*few, "parallel.strict=true"), [], REPORT, Assumptions())
