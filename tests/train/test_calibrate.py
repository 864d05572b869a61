"""A step taken apart by the meter: its rows are the whole step, the planner reads them and plans that very step."""

from dataclasses import replace

import pytest
import torch

import deepv3.kernels as kernels
from deepv3.config.compose import compose
from deepv3.errors import ConfigError
from deepv3.planner.calibration import BUILT_IN
from deepv3.planner.hardware import DEVICES
from deepv3.planner.layout import Layout
from deepv3.planner.measured import calibrate
from deepv3.planner.simulate import Simulator
from deepv3.planner.work import Workload
from deepv3.train import calibrate as bench
from deepv3.train.measure import MEASUREMENTS, read

TINY = (
    "+config=tiny",
    "data.seq_len=64",
    "train.micro_batch_size=2",
    "train.recompute=selective",
    "model.moe_intermediate_size=128",
)
H200, REPORT = DEVICES["h200"], BUILT_IN["report"]


@pytest.fixture(scope="module", params=["bf16", "fp8"])
def measured(request):
    """(precision, part, its steps, its rows)"""
    before = bench.COPY, bench.WARMUP, bench.STEPS
    bench.COPY, bench.WARMUP, bench.STEPS = 1 << 20, 1, 3
    part = bench.measured_part(compose([*TINY, f"precision={request.param}"]))
    one = bench.Bench(part)
    steps = one.steps()
    rows = list(one.rows(steps))
    bench.COPY, bench.WARMUP, bench.STEPS = before
    return request.param, part, steps, rows


def of_step(rows, number: int) -> list[dict]:
    """The copy, and the rows of one of the three steps."""
    each = (len(rows) - 1) // 3
    return [rows[0], *rows[1 + number * each : 1 + (number + 1) * each]]


def layout(part) -> Layout:
    return Layout.of(replace(part, cluster=replace(part.cluster, device="h200", devices=1)))


def test_the_parts_of_a_step_sum_to_the_step(measured):
    for step in measured[2]:
        parts = sum(seconds for _, seconds, _ in step.products.values()) + sum(step.rest.values()) + step.update
        assert parts == pytest.approx(step.step, rel=1e-6)
        assert min(step.rest.values()) > 0 and set(step.rest) == {"attention", "experts", "head", "other"}


def test_a_plan_made_of_a_steps_rows_is_that_step(measured):
    """Whatever the machine did meanwhile. What differs: the planner adds to FP32 sums in the first micro-batch too."""
    _, part, steps, rows = measured
    for number, step in enumerate(steps):
        planned = Simulator(layout(part), calibrate(of_step(rows, number), H200, REPORT, "here")).step()
        assert planned.seconds == pytest.approx(step.step, rel=0.03)
        assert planned.update == pytest.approx(step.update, rel=0.01) or part.precision.name == "fp8"


def test_launching_enqueues_two_micro_batches_a_step_one_at_a_time_and_training_goes_on(monkeypatch):
    monkeypatch.setattr(bench, "LAUNCHINGS", 3)
    one = bench.Bench(bench.measured_part(compose([*TINY, "precision=bf16"])))
    counts, run = [], one.executor.run
    monkeypatch.setattr(
        one.executor, "run", lambda source, count, *a, **k: counts.append(count) or run(source, count, *a, **k)
    )
    seconds = one.launching()
    assert counts == [1] * 6
    with one.meter.installed():
        assert 0 < seconds < 20 * one.step().step, "on a CPU the host does half a step's work"


def test_every_constant_of_one_device_is_measured(measured):
    precision, _, _, rows = measured
    changed, was = calibrate(rows, H200, REPORT, "here").constants(), REPORT.constants()
    names = {"hbm", "update_bytes", "attention", "attention_backward", "bf16_dense", "bf16_dense_wgrad"}
    names |= {"traffic_attention", "traffic_experts", "traffic_head"}
    eights = {"fp8_dense", "fp8_dense_wgrad", "fp8_grouped", "fp8_grouped_dgrad", "fp8_grouped_wgrad", "codes_bytes"}
    names |= {"bf16_grouped"} if precision == "bf16" else eights
    assert {name for name in was if changed[name] != was[name]} == names


def test_flops_are_those_that_the_planner_counts(measured):
    """Per step and constant, against the planner's seconds at a fraction of 1 on a device of 1 FLOP/s."""
    precision, part, _, rows = measured
    ones = {
        name: value._replace(value=1.0)
        for name, value in REPORT.constants().items()
        if name[:4] in ("bf16", "fp8_", "atte")
    }
    slow = replace(H200, bf16=1.0, fp8=1.0)
    work = Workload(
        part.model, slow, REPORT.changed(ones | {"comm_sms": REPORT.comm_sms._replace(value=0.0)}), precision,
        part.train.recompute, 64, 128, ep=1,
    )  # fmt: skip
    dense = min(part.model.first_k_dense_replace, part.model.num_hidden_layers)
    layers = [work.layer(index >= dense).total() for index in range(part.model.num_hidden_layers)] + [work.head()]
    per_step = [row for row in of_step(rows, 0) if "flops" in row]
    for name, kinds in (("attention", ("attention",)), ("gemm", ("gemm_fp8", "gemm_bf16"))):
        expected = bench.MICRO_BATCHES * sum(layer.get(kind, 0.0) for layer in layers for kind in kinds)
        found = sum(row["flops"] for row in per_step if row["kind"] == name)
        assert found == pytest.approx(expected, rel=2e-3), name


def test_the_fastest_quarter_of_the_steps_gives_rows(measured):
    _, _, steps, _ = measured
    slower = [replace(step, step=1e3 + step.step) for step in steps]
    assert bench.fastest(steps) == [min(steps, key=lambda step: step.step)]
    assert {step.step for step in bench.fastest([*slower, *steps, *slower])} == {step.step for step in steps}


def test_nothing_stays_wrapped():
    names = ("grouped_mm", "fp8_mm", "quantise_blocks")
    before = [getattr(kernels, name) for name in names] + [torch.mm, torch.Tensor.backward]
    with bench.Meter(compose([*TINY]).model, 128, 64, torch.device("cpu")).installed():
        assert torch.mm is not before[3]
    assert [getattr(kernels, name) for name in names] + [torch.mm, torch.Tensor.backward] == before


def test_a_large_model_is_measured_in_four_layers_of_its_own_widths():
    part = bench.measured_part(compose(["+config=mini", "precision=fp8", "train.recompute=full"]))
    whole = compose(["+config=mini"]).model
    assert (part.model.num_hidden_layers, part.model.num_nextn_predict_layers, part.model.force_balance) == (4, 0, True)
    assert part.train.global_batch_size == 2 * part.train.micro_batch_size and part.train.recompute == "selective"
    assert part.model.hidden_size == whole.hidden_size and part.model.n_routed_experts == whole.n_routed_experts
    bench.require_room(part, "h100")


def test_a_model_too_wide_for_the_device_is_refused_before_anything_is_built():
    with pytest.raises(ConfigError, match="n_routed_experts"):
        bench.require_room(bench.measured_part(compose(["+config=v3_671b"])), "h200")


def test_a_machine_without_a_device_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="CUDA"):
        MEASUREMENTS["calibration"](*read(["what=calibration", "device=h100", *TINY]))
