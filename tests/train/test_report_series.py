"""The summary of a metrics file: exact while short, bounded when long, and read once."""

import json
import random

import numpy as np
import pytest
from small_folder import row, write

from deepv3.train import report_series
from deepv3.train.report_series import CAPACITY, Series


def append(path, steps, **more):
    rng = random.Random(0)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row(step, rng, **more)) + "\n" for step in steps)


def test_a_short_run_is_kept_exactly(tmp_path):
    path = write(tmp_path, steps=50) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    series = Series(path).update()
    assert series.steps.tolist() == list(range(1, 51))
    for name in ("loss_main", "grad_norm", "tokens"):
        assert series.mean(name).tolist() == [r[name] for r in rows]
    assert series.layers().tolist() == [r["max_vio_layers"] for r in rows]
    assert series.last == rows[-1]


def test_a_long_run_keeps_a_bounded_number_of_points_and_every_spike(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append(path, range(1, 2001))
    append(path, [2001], grad_norm=77.0)
    append(path, range(2002, 5001))
    series = Series(path).update()
    assert CAPACITY / 2 <= len(series.steps) <= CAPACITY
    assert series.rows == 5000 and series.steps[-1] == 5000
    assert series.high("grad_norm").max() == 77.0
    values = [json.loads(line)["loss_main"] for line in path.read_text().splitlines()]
    assert series.mean("loss_main")[0] == pytest.approx(np.mean(values[: series.width]))


def test_growing_by_pieces_gives_what_reading_at_once_gives(tmp_path):
    path = tmp_path / "metrics.jsonl"
    growing = Series(path)
    for start in range(1, 1801, 300):
        append(path, range(start, start + 300))
        growing.update()
    whole = Series(path).update()
    assert growing.width == whole.width
    np.testing.assert_allclose(growing.mean("loss_main"), whole.mean("loss_main"), rtol=1e-12)
    np.testing.assert_array_equal(growing.high("grad_norm"), whole.high("grad_norm"))
    np.testing.assert_allclose(growing.layers(), whole.layers(), rtol=1e-12)


def test_small_pieces_of_the_file_give_what_one_piece_gives(tmp_path, monkeypatch):
    path = write(tmp_path, steps=60) / "metrics.jsonl"
    whole = Series(path).update()
    monkeypatch.setattr(report_series, "CHUNK", 5000)
    pieces = Series(path).update()
    assert pieces.mean("loss_main").tolist() == whole.mean("loss_main").tolist()


def test_the_line_being_written_waits_for_its_end(tmp_path):
    path = write(tmp_path, steps=3) / "metrics.jsonl"
    line = json.dumps(row(4, random.Random(1)))
    with open(path, "a") as file:
        file.write(line[:100])
    series = Series(path).update()
    assert series.rows == 3
    with open(path, "a") as file:
        file.write(line[100:] + "\n")
    assert series.update().rows == 4


def test_a_file_cut_by_a_resume_is_read_again(tmp_path):
    path = write(tmp_path, steps=30) / "metrics.jsonl"
    series = Series(path).update()
    report_series_lines = path.read_text().splitlines(keepends=True)
    (tmp_path / "beside").write_text("".join(report_series_lines[:10]))
    (tmp_path / "beside").replace(path)
    assert series.update().rows == 10 and series.steps[-1] == 10


def test_damaged_lines_are_left_out_and_null_is_unknown(tmp_path):
    path = write(tmp_path, steps=5) / "metrics.jsonl"
    with open(path, "a") as file:
        file.write(
            '{"step": 6, "los{"step": 7}\nnot json\n' + json.dumps(row(8, random.Random(0), loss_main=None)) + "\n"
        )
    series = Series(path).update()
    assert series.steps.tolist() == [1, 2, 3, 4, 5, 8]
    assert np.isnan(series.mean("loss_main")[-1]) and series.mean("lr")[-1] > 0


def test_fields_that_rows_lack_are_unknown_and_count_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with open(path, "w") as file:
        file.write('{"step": 1, "tokens": 8, "loss_main": 3.0}\n{"step": 2, "tokens": 16, "time_checkpoint": 2.0}\n')
    series = Series(path).update()
    assert not series.has("time_bubble") and series.has("time_checkpoint")
    assert series.share("time_checkpoint").tolist() == [0.0, 2.0]
    assert series.layers() is None


def test_no_file_is_no_rows(tmp_path):
    series = Series(tmp_path / "metrics.jsonl").update()
    assert series.rows == 0 and not len(series.steps)
