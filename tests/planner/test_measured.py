"""Measured rows become constants: what went into synthetic rows comes out, and damaged rows are refused."""

import json
from dataclasses import replace

import pytest
from plans import REPORT, constants, model, on, v3

from deepv3.errors import ConfigError
from deepv3.planner.calibration import Calibration
from deepv3.planner.hardware import DEVICES
from deepv3.planner.measured import calibrate, read_calibration
from deepv3.planner.megatron import BUILT_IN
from deepv3.planner.simulate import Simulator

H800 = DEVICES["h800"]


def gemm(fraction: float, **keys) -> dict:
    """A GEMM row that reaches a fraction of the peak."""
    row = {"kind": "gemm", "format": "fp8", "shape": "dense", "pass": "forward", "flops": 1e12} | keys
    peak = H800.fp8 if row["format"] == "fp8" else H800.bf16
    return row | {"seconds": row["flops"] / (peak * fraction)}


def everything() -> list[dict]:
    """Rows for every kind, made from known constants."""
    rows = [gemm(0.5), gemm(0.6), gemm(0.7), gemm(0.31, **{"pass": "weight"})]
    rows += [gemm(0.41, shape="grouped"), gemm(0.42, shape="grouped", **{"pass": "input"})]
    rows += [gemm(0.43, shape="grouped", **{"pass": "weight"}), gemm(0.55, format="bf16")]
    rows += [
        {"kind": "attention", "pass": p, "flops": 1e12, "seconds": 1e12 / H800.bf16 / f}
        for p, f in (("forward", 0.5), ("backward", 0.4))
    ]
    rows += [{"kind": "copy", "bytes": 1e9, "seconds": 1e9 / H800.hbm / 0.8}]
    rows += [
        {"kind": "alltoall", "scope": "nic", "bytes": b, "seconds": 2e-4 + b / (0.7 * H800.nic)}
        for b in (1e6, 5e7, 2e8)
    ]
    rows += [{"kind": "elementwise", "piece": "experts", "bytes": 1e9, "seconds": 3.0 * 1e9 / (0.8 * H800.hbm)}]
    rows += [{"kind": "pair", "slots": 0.1, "seconds": 0.108}, {"kind": "host", "layers": 20, "seconds": 0.01}]
    rows += [{"kind": "elementwise", "piece": "head", "bytes": 1e9, "seconds": 1.2 * 1e9 / (0.8 * H800.hbm)}]
    rows += [{"kind": "codes", "parameters": 1e9, "seconds": 4.4e9 / (0.8 * H800.hbm)}]
    rows += [{"kind": "launching", "layers": 4, "seconds": 4 * 135 * 1e-5 * 4e9 / H800.host}]
    return [*rows, {"kind": "update", "parameters": 1e9, "seconds": 24e9 / (0.8 * H800.hbm)}]


def test_known_constants_come_back_out_of_their_rows():
    cal = calibrate(everything(), H800, REPORT, "here")
    expected = {
        "fp8_dense": 0.6, "fp8_dense_wgrad": 0.31, "fp8_grouped": 0.41, "fp8_grouped_dgrad": 0.42,
        "fp8_grouped_wgrad": 0.43, "bf16_dense": 0.55, "attention": 0.5, "attention_backward": 0.4, "hbm": 0.8,
        "nic": 0.7, "sync_nic": 2e-4, "traffic_experts": 3.0, "interference": 1.08, "layer_overhead": 5e-4,
        "update_bytes": 24.0, "codes_bytes": 4.4, "traffic_head": 1.2, "launch": 1e-5,
    }  # fmt: skip
    for name, value in expected.items():
        assert getattr(cal, name).value == pytest.approx(value), name
    assert cal.name == "here" and "here" in cal.fp8_dense.source


@pytest.mark.parametrize("times, low, high", [(0.5, 1.0, 1.01), (2.0, 2.0, 2.3)], ids=["half", "twice"])
def test_a_host_that_enqueues_slower_than_the_device_computes_sets_the_pace(times, low, high):
    """Head and update come on top of the layers."""
    layout = on("h200", 1, m=model("mini"), pp=1, ep=1, batch=4)
    busy = Simulator(layout, constants(launch=0.0)).step()
    layers = 4 * layout.m.num_hidden_layers
    row = {"kind": "launching", "layers": layers, "seconds": times * busy.seconds}
    bound = Simulator(layout, calibrate([row], layout.cluster.device, REPORT, "here")).step()
    assert low * busy.seconds <= bound.seconds < high * busy.seconds


def test_a_slow_host_is_no_bound_where_micro_batches_are_cuda_graphs():
    layout = on("h200", 1, m=model("mini"), pp=1, ep=1, batch=4)
    slow = constants(launch=1e-3)
    busy = Simulator(layout, constants(launch=0.0)).step().seconds
    assert Simulator(layout, slow).step().seconds > 2 * busy
    assert Simulator(replace(layout, cuda_graph=True), slow).step().seconds == pytest.approx(busy)


@pytest.mark.parametrize("cut", [{"pp": 2}, {"ep": 2}, {"schedule": "dualpipev"}], ids=str)
def test_a_search_credits_no_cuda_graphs_to_a_model_that_is_cut_up(cut):
    layout = replace(on("h200", 2, m=model("mini"), pp=1, ep=1, batch=8), **cut)
    slow = constants(launch=1e-3)
    asked = replace(layout, cuda_graph=True)
    assert Simulator(asked, slow).step().seconds == Simulator(layout, slow).step().seconds


def test_the_time_of_fp32_sums_is_taken_off_a_weight_gradient():
    """At the rate that this file's copies reach: products at 0.5 of the peak, then 2 GB of sums."""
    row = gemm(0.5, shape="grouped", **{"pass": "weight"}) | {"summed": 2e9}
    row["seconds"] += 2e9 / (0.8 * H800.hbm)
    copy = {"kind": "copy", "bytes": 1e9, "seconds": 1e9 / H800.hbm / 0.8}
    assert calibrate([row, copy], H800, REPORT, "here").fp8_grouped_wgrad.value == pytest.approx(0.5)


def test_constants_without_rows_keep_their_value():
    cal = calibrate(everything(), H800, REPORT, "here")
    assert cal.traffic_attention == REPORT.traffic_attention and cal.nvlink == REPORT.nvlink


def test_extremes_of_the_rows_are_the_range_with_the_slow_end_low():
    cal = calibrate([gemm(0.5), gemm(0.6), gemm(0.7), {"kind": "pair", "slots": 1.0, "seconds": 1.1},
                     {"kind": "pair", "slots": 1.0, "seconds": 1.2}], H800, REPORT, "here")  # fmt: skip
    assert (cal.fp8_dense.low, cal.fp8_dense.high) == pytest.approx((0.5, 0.7))
    assert (cal.interference.low, cal.interference.high) == pytest.approx((1.2, 1.1))


def test_an_imagined_machine_is_planned_within_ten_percent_after_one_calibration():
    """Rows drawn from constants the planner does not know: its step then equals that machine's."""
    truth = constants(fp8_dense=0.6, fp8_grouped=0.5, attention=0.5, nic=0.6, hbm=0.8, interference=1.2)
    rows = [gemm(0.6), gemm(0.5, shape="grouped"), {"kind": "pair", "slots": 1.0, "seconds": 1.2}]
    rows += [{"kind": "attention", "pass": "forward", "flops": 1e12, "seconds": 1e12 / H800.bf16 / 0.5}]
    rows += [{"kind": "copy", "bytes": 1e9, "seconds": 1e9 / H800.hbm / 0.8}]
    rows += [
        {"kind": "alltoall", "scope": "nic", "bytes": b, "seconds": 1e-3 + b / (0.6 * H800.nic)} for b in (1e6, 2e8)
    ]
    layout = v3(batch=128 * 32)
    planned, real = (Simulator(layout, cal).step().seconds for cal in (calibrate(rows, H800, REPORT, "x"), truth))
    before = Simulator(layout, REPORT).step().seconds
    assert planned == pytest.approx(real, rel=0.01)
    assert abs(before / real - 1) > 0.05, "the machine differs from the report's, or this would prove nothing"


@pytest.mark.parametrize(
    "row",
    [
        {"kind": "gemm", "seconds": 1.0},
        {"kind": "nonsense", "seconds": 1.0},
        gemm(0.5) | {"seconds": 0.0},
        gemm(0.5) | {"pass": "sideways"},
        gemm(0.5) | {"seconds": "fast"},
        {"kind": "elementwise", "piece": "router", "bytes": 1.0, "seconds": 1.0},
        {"kind": "copy", "seconds": 1.0},
        {"kind": "copy", "seconds": 1.0, "bytes": 0.0},
        {"kind": "update", "seconds": 1.0, "parameters": -1},
        {"kind": ["gemm"], "seconds": 1.0},
        "gemm",
        None,
        gemm(0.5, shape="grouped", **{"pass": "weight"}) | {"summed": 1e15},
        {"kind": "alltoall", "scope": "nic", "bytes": 1e6, "seconds": 1e-3},
    ],
)
def test_a_row_that_cannot_be_read_is_refused(row):
    with pytest.raises(ConfigError, match="calibration"):
        calibrate([row], H800, REPORT, "here")


def test_an_all_to_all_that_gets_faster_with_size_is_refused():
    rows = [{"kind": "alltoall", "scope": "nvlink", "bytes": b, "seconds": s} for b, s in ((1e6, 2e-3), (1e8, 1e-3))]
    with pytest.raises(ConfigError, match="no slower"):
        calibrate(rows, H800, REPORT, "here")


def test_a_file_is_read_whole(tmp_path):
    path = tmp_path / "h200.json"
    path.write_text(json.dumps({"format": 1, "device": "h800", "rows": everything()}))
    cal = read_calibration(str(path))
    assert cal.name == "h200" and cal.fp8_dense.value == pytest.approx(0.6)


def test_built_in_names_are_read():
    assert read_calibration("report") == Calibration() and set(BUILT_IN) == {
        "report",
        "torchtitan",
        "megatron",
        "megatron_blackwell",
        "megatron_graphs",
        "megatron_whole",
        "megatron_whole_fp8",
    }


@pytest.mark.parametrize(
    "content, named",
    [
        ("{", "readable"),
        ("[]", "format"),
        ('{"format": 2}', "format"),
        ('{"format": 1, "device": "abacus", "rows": []}', "abacus"),
        ('{"format": 1, "device": "h100", "rows": {}}', "rows"),
        ('{"format": 1, "device": "h100", "base": "hope", "rows": []}', "hope"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content, named):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=named):
        read_calibration(str(path))


def test_every_constant_has_a_source_and_its_value_within_its_range():
    for cal in BUILT_IN.values():
        for name, value in cal.constants().items():
            low, high = sorted((value.low, value.high))
            assert value.source and low <= value.value <= high, name
