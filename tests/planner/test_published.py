"""Rows that others published, within 15 %, none of them fitted but the two that say so; and runs of this code."""

from dataclasses import replace
from pathlib import Path

import pytest
from plans import REPORT, v3_simulator
from published import (
    AUTOMODEL,
    CALIBRATIONS,
    EAGER,
    FITTED,
    GRAPHS,
    MEGATRON,
    MEGATRON_FITTED,
    OURS,
    TORCHTITAN,
    WHOLE,
)

from deepv3.planner.measured import read_calibration


@pytest.mark.parametrize("row", [*MEGATRON, *AUTOMODEL, *TORCHTITAN], ids=lambda row: row.name)
def test_unfitted_rows_are_within_fifteen_percent(row):
    assert abs(row.error()) < 0.15


@pytest.mark.parametrize("row", [FITTED, MEGATRON_FITTED], ids=lambda row: row.name)
def test_the_two_fitted_rows_are_met(row):
    assert abs(row.error()) < 0.02


def test_the_mean_error_of_the_unfitted_rows_is_small():
    errors = [row.error() for row in (*MEGATRON, *AUTOMODEL, *TORCHTITAN)]
    assert sum(map(abs, errors)) / len(errors) < 0.07
    assert abs(sum(errors) / len(errors)) < 0.02, "no lasting bias"


def test_the_range_of_a_plan_holds_what_nodes_of_eight_made():
    """One launch time, fitted to one release on one device, holds four releases on two."""
    eights = [row for row in (MEGATRON_FITTED, *MEGATRON) if row.layout.cluster.node == 8 and "H100" not in row.name]
    rows = [row for row in eights if "overlapped" not in row.name]
    assert len(rows) == 7
    for row in rows:
        least, most = row.range()
        assert least <= row.rate <= most, row.name


def test_each_mechanism_of_the_newest_recipes_speeds_a_plan_up():
    """GB300's recipe of 26.06, one mechanism after the other: stages, experts' fused products, attention's format.

    docs/planner.md has the other mechanisms' shares.
    """
    last = next(row for row in MEGATRON if "GB300, MXFP8, PP2 EP32 (26.06)" in row.name)
    plain = replace(last.layout, schedule="1f1b", virtual=1)
    interleaved = replace(last.layout, schedule="interleaved")
    eager = {"fused_experts": EAGER.fused_experts}
    stages = [replace(last, layout=layout, calibration=GRAPHS) for layout in (plain, interleaved)]
    kernels = [replace(last, calibration=WHOLE.changed(eager)), replace(last, calibration=WHOLE), last]
    for rows in (stages, kernels):
        rates = [row.step.tokens_per_second_per_gpu for row in rows]
        assert all(later > 1.01 * earlier for earlier, later in zip(rates, rates[1:]))


def test_fused_memory_bound_work_of_whole_step_graphs_is_what_this_code_measured():
    """In BF16 around the experts: there products make the codes, and here nothing is quantised."""
    bf16, fp8 = (read_calibration(str(CALIBRATIONS / f"{name}.json")) for name in ("h200-bf16", "h200"))
    for measured in (bf16, fp8):
        assert measured.traffic_attention.value == pytest.approx(WHOLE.traffic_attention.value, rel=0.01)
    assert bf16.traffic_experts.value == pytest.approx(WHOLE.traffic_experts.value, rel=0.01)


def test_dispatch_in_bf16_costs_more_than_in_fp8():
    row = next(row for row in MEGATRON if "26.02" in row.name and "GB200" in row.name)
    assert row.layout.sends == "bf16" and row.layout.precision == "fp8"
    lighter = replace(row, layout=replace(row.layout, wire=""))
    assert lighter.step.moved < row.step.moved and lighter.step.seconds < row.step.seconds


@pytest.mark.parametrize(
    "name, too_fast", [("B200, MXFP8, PP16 EP8 (26.02)", 0.25), ("B300, MXFP8, PP16 EP8 (26.02)", 0.15)]
)
def test_kernels_alone_do_not_explain_rows_with_many_experts_a_device(name, too_fast):
    (row,) = (row for row in (MEGATRON_FITTED, *MEGATRON) if name in row.name)
    assert replace(row, calibration=REPORT).error() > too_fast


@pytest.mark.parametrize("run", OURS, ids=lambda run: run.row.name)
def test_our_own_runs_are_planned_within_ten_percent_and_their_memory_within_five(run):
    assert abs(run.row.error()) < 0.10
    assert run.planned_gib() == pytest.approx(run.gib, rel=0.05)


@pytest.mark.parametrize("run", OURS, ids=lambda run: run.row.name)
def test_after_one_calibration_file_our_runs_on_that_device_are_within_ten_percent(run):
    calibrated = run.calibrated()
    assert calibrated.calibration != REPORT
    assert abs(calibrated.error()) < 0.10


def test_the_page_shows_what_the_planner_says():
    page = (Path(__file__).parents[2] / "docs" / "planner.md").read_text(encoding="utf-8").replace("*", "")
    for row in (MEGATRON_FITTED, *MEGATRON, *AUTOMODEL):
        error = row.error()
        assert f"| {row.rate:,} | {row.rate * (1 + error):,.0f} | {100 * error:+.1f} % |" in page, row.name
    for row in (FITTED, *TORCHTITAN):
        assert f"| {row.rate * (1 + row.error()):,.0f} |" in page, row.name
    for run in OURS:
        error, gib = run.row.error(), run.planned_gib()
        planned = f"{run.row.rate * (1 + error):,.0f} | {100 * error:+.1f} %"
        calibrated = f"{100 * run.calibrated().error():+.1f} %"
        memory = f"{run.gib} | {gib:.1f} | {100 * (gib / run.gib - 1):+.1f} %"
        assert f"| {run.row.name} | {run.row.rate:,} | {planned} | {calibrated} | {memory} |" in page, run.row.name
    step = v3_simulator().step()
    assert f"| {step.seconds:.2f} s" in page and f"| {step.tokens_per_second_per_gpu:,.0f} (" in page
