"""A run beside its plan: medians after settling, errors with their sign, damaged folders refused."""

import json
from dataclasses import replace

import pytest
from plans import REPORT, config

from deepv3.errors import DataError
from deepv3.planner.command import main
from deepv3.planner.compared import compare
from deepv3.planner.plan import Assumptions, make_plan

SMALL = ("+config=moe_16b", "cluster=h100", "train.global_batch_size=512", "train.tokens=1e12", "train.eval_every=0")


@pytest.fixture(scope="module")
def plan():
    return make_plan(config(*SMALL, precision="bf16"), [], REPORT, Assumptions())


def write(folder, rates, memory=40.0):
    """A run folder whose metrics hold these rates."""
    rows = (
        {"step": i, "tokens_per_second_per_gpu": r, "memory_gib": memory, "step_seconds": 1.0}
        for i, r in enumerate(rates)
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_slow_first_steps_do_not_count(plan, tmp_path):
    rate = plan.step.tokens_per_second_per_gpu
    found = compare(plan, write(tmp_path, [1.0] * 10 + [0.8 * rate, rate, 1.1 * rate]))
    assert found["steps"] == 3 and found["throughput_error"] == pytest.approx(0.0)


def test_errors_are_positive_where_the_plan_says_more(plan, tmp_path):
    rate = plan.step.tokens_per_second_per_gpu
    found = compare(plan, write(tmp_path, [rate / 1.1] * 12, memory=20.0))
    assert found["throughput_error"] == pytest.approx(0.1)
    assert found["memory_error"] == pytest.approx(found["planned_memory_gib"] / 20.0 - 1.0)


def test_what_torch_does_not_allocate_is_left_out(plan, tmp_path):
    more = replace(
        plan, cal=REPORT.changed({"workspace": REPORT.workspace._replace(value=REPORT.workspace.value + 2**30)})
    )
    run = write(tmp_path, [1.0] * 12)
    assert compare(plan, run)["planned_memory_gib"] - compare(more, run)["planned_memory_gib"] == pytest.approx(1.0)


@pytest.mark.parametrize("content", [None, "", "{}\n" * 12, "{not json\n" * 12, '{"step": 1}\n'])
def test_a_folder_without_enough_metrics_is_refused(plan, tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match="measured"):
        compare(plan, tmp_path)


def test_the_command_prints_the_comparison(capsys, tmp_path):
    run = write(tmp_path, [10_000.0] * 12)
    main([*SMALL, f"measured={run}"])
    assert "measured over 2 steps: 10,000 tokens/s" in capsys.readouterr().out
    main([*SMALL, f"measured={run}", "json=true"])
    assert json.loads(capsys.readouterr().out)["measured"]["steps"] == 2
