"""Charts: round ticks, a frame that keeps the bulk readable, what lies beyond it counted, numbers as a table."""

import json
import re

import numpy as np
import pytest

from deepv3.train.report_chart import Chart, Frame, H, Line, W, draw, nice_ticks, si


def line(y, name="a", **style) -> Line:
    y = np.array(y, dtype=float)
    return Line(name, np.arange(1, len(y) + 1, dtype=float), y, **style)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (2.2e-5, "2.2e-5"),
        (1e-4, "1e-4"),
        (-0.0025, "-2.5e-3"),
        (1.23456, "1.235"),
        (3072, "3,072"),
        (14.8e12, "14.8 T"),
        (999_999, "1 M"),
        (None, "–"),
    ],
)
def test_numbers_are_for_people(value, text):
    assert si(value) == text


def test_ticks_are_round_and_inside():
    assert nice_ticks(0.03, 0.97) == [0.2, 0.4, 0.6, 0.8]
    assert nice_ticks(1, 14_800) == [2500, 5000, 7500, 10000, 12500]
    assert nice_ticks(3, 3) == [3]


def test_one_outlier_does_not_flatten_the_rest_and_is_counted():
    y = np.full(400, 2.0) + np.linspace(0, 0.5, 400)
    y[100] = 1e4
    frame = Frame(Chart("k", "t", "", [line(y)]))
    assert frame.y1 < 3 and frame.beyond == 1
    assert "1 point(s) above the frame" in draw(Chart("k", "t", "", [line(y)]))


def test_a_constant_is_drawn_within_the_frame():
    html = draw(Chart("k", "t", "", [line([1.9, 1.9 + 1e-16, 1.9])]))
    path = re.search(r'class="line c0" d="([^"]+)"', html).group(1)
    y = [float(v) for v in re.findall(r"\d+ ([\d.]+)", path)]
    assert len(y) == 3 and all(10 < v < H - 10 for v in y) and max(y) - min(y) < 0.2


def test_a_single_step_is_a_dot():
    assert 'class="dot c0"' in draw(Chart("k", "t", "", [line([3.0])]))


def test_nan_leaves_a_gap():
    html = draw(Chart("k", "t", "", [line([1.0, 2.0, np.nan, 2.0, 1.0])]))
    path = re.search(r'class="line c0" d="([^"]+)"', html).group(1)
    assert path.count("M") == 2


def test_stacked_areas_reach_the_sum():
    chart = Chart("k", "t", "s", [], stack=[line([1.0, 1.0], "x"), line([2.0, 2.0], "y")])
    frame = Frame(chart)
    html = draw(chart)
    top = re.search(r'class="area c1" d="M0 ([\d.]+)', html).group(1)
    assert float(top) == pytest.approx(float(frame.y(np.array(3.0))), abs=0.1)
    assert f"L{W} " in html


def test_what_has_no_values_is_not_drawn():
    assert draw(Chart("k", "t", "", [line([np.nan, np.nan]), Line("b", np.zeros(0), np.zeros(0))])) == ""


def test_every_chart_carries_its_numbers_as_a_table_and_as_data():
    html = draw(Chart("k", "Loss", "nats", [line(np.arange(500), "train"), line(np.arange(10), "val")]))
    assert "<caption>Loss, nats</caption>" in html and html.count("<tr>") == 17
    data = json.loads(re.search(r'<script type="application/json">(.*)</script>', html).group(1))
    assert [entry[0] for entry in data["lines"]] == ["train", "val"] and len(data["lines"][0][1]) == 500


def test_names_are_escaped_everywhere():
    html = draw(Chart("k", "<i>", "", [line([1.0, 2.0], "</script><b>")]))
    assert "<i>" not in html.replace("<i></i>", "") and html.count("</script>") == 1 and "<b>&" not in html
