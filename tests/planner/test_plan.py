"""The whole plan of the report's run, as JSON holds it and as tables show it."""

import json
import sys

import pytest
from plans import REPORT, config
from rich.console import Console

from deepv3.planner.plan import Assumptions, document, make_plan
from deepv3.planner.report import show


@pytest.fixture(scope="module")
def report():
    """The plan of the report's own run, in FP8, as a document."""
    later = [config(f"+config=v3_671b_{name}", f"cluster.devices={n}") for name, n in (("32k", 2048), ("128k", 512))]
    names = ("v3_671b", "v3_671b_32k", "v3_671b_128k")
    return document(make_plan(config(), later, REPORT, Assumptions(), names))


def test_the_report_is_reproduced(report):
    assert report["total_parameters"] == 671_026_404_352
    assert report["active_parameters_range"] == [36_625_603_584, 37_552_282_624]
    assert report["mtp_parameters"] == 11_610_067_968
    assert report["kv_cache_bytes_per_token"] == 70_272
    assert report["flops_per_token"]["causal"] / 1e9 == pytest.approx(250.4, abs=0.05)
    assert report["tokens_per_second_per_gpu"] == pytest.approx(1543, rel=0.05)
    assert report["step_seconds"] == pytest.approx(19.926, rel=0.05)
    assert report["gpu_hours_per_trillion_tokens"] == pytest.approx(180e3, rel=0.05)
    assert report["mfu"] == pytest.approx(0.3894, rel=0.05)
    assert report["step"]["mfu_full_attention"] == pytest.approx(0.4373, rel=0.05)
    assert report["run"]["gpu_hours"] == pytest.approx(2.788e6, rel=0.05)
    assert report["run"]["dollars"] == pytest.approx(5.576e6, rel=0.05)
    assert report["network"]["cost_per_device_dollars"] == pytest.approx(4390, rel=0.01)
    assert report["fits"] is True


def test_ranges_hold_their_value_and_the_published_one(report):
    for name, published in (("step_seconds", 19.926), ("tokens_per_second_per_gpu", 1543)):
        low, high = report[f"{name}_range"]
        assert low < report[name] < high
        assert low < published < high
    assert set(report["uncertainty"]) >= {"interference", "fp8_grouped", "traffic_attention"}


def test_phases_that_need_split_sequences_say_so(report):
    notes = [row["notes"] for row in report["run"]["phases"]]
    assert not notes[0] and "context parallelism" in notes[1][0] and "context parallelism" in notes[2][0]


def test_the_document_is_plain_json(report):
    assert json.loads(json.dumps(report)) == report


def test_parts_of_the_flops_sum_to_the_whole(report):
    flops = report["flops_per_token"]
    for parts, whole in (("parts_causal", "causal"), ("parts_full_attention", "full_attention")):
        assert sum(flops[parts].values()) - flops[parts]["MTP"] == pytest.approx(flops[whole])


def test_every_table_is_printed(report, capsys):
    show(report, Console(width=120, file=sys.stdout))
    out = capsys.readouterr().out
    for text in (
        "671.03 B",
        "GFLOP per token",
        "156,768",
        "norm outputs",
        "384,272",
        "pipeline bubble",
        "v3_671b_128k",
        "failures: 51 expected",
    ):
        assert text in out
