"""Does FP8 learn like BF16: the number of a run, the criterion and its edges, what the table and the files say."""

import json

import numpy as np
import pytest

from deepv3.train.learning_verdict import BOUND, Curve, as_json, draw, judge, read_curve, smooth, table

STEPS = 40


def curve(name, level, end="done", steps=STEPS, **fields):
    """A run whose loss falls to `level` and stays there for the last quarter."""
    losses = np.concatenate([np.linspace(9, level, steps - 10), np.full(10, level)])
    return Curve(name, losses, end, 1000.0, 2.0, **({"skipped": 0} | fields))


def five(fp8=(2.001, 2.011), block=2.2):
    """BF16's seeds differ by 0.5 %."""
    names = zip(("bf16-1", "bf16-2", "fp8-1", "fp8-2", "block-1"), (2.0, 2.01, *fp8, block))
    return [curve(name, level) for name, level in names]


def test_the_last_quarter_is_the_mean_of_the_last_steps_alone():
    losses = np.arange(40.0)
    assert Curve("bf16-1", losses, "done", 0, 0, 0).last_quarter(40) == np.arange(30, 40).mean()
    assert Curve("bf16-1", losses, "done", 0, 0, 0).last_quarter(20) == np.arange(15, 20).mean()


def test_a_run_that_did_not_get_there_or_lost_its_loss_has_no_number():
    assert curve("fp8-1", 2.0).last_quarter(STEPS + 1) is None
    broken = curve("fp8-1", 2.0)
    broken.losses[-3] = np.nan
    assert broken.last_quarter(STEPS) is None
    early = curve("fp8-1", 2.0)
    early.losses[3] = np.nan  # before the last quarter
    assert early.last_quarter(STEPS) is not None


def test_close_within_the_spread_is_met():
    verdict = judge(five(), STEPS)
    assert verdict.met is True
    assert verdict.gaps == pytest.approx({1: 0.0005, 2: 2.011 / 2.01 - 1})
    assert verdict.spread == pytest.approx(0.005)
    assert verdict.text().endswith("met") and "NOT" not in verdict.text()


@pytest.mark.parametrize("fp8", [(2.0 * (1 + 1.2 * BOUND), 2.01), (2.0, 2.01 * (1 - 1.2 * BOUND))])
def test_one_seed_beyond_the_bound_is_not_met_in_either_direction(fp8):
    assert judge(five(fp8), STEPS).met is False


def test_below_the_bound_but_beyond_the_spread_is_not_met():
    curves = five((2.004, 2.001))
    curves[1] = curve("bf16-2", 2.001)  # spread 0.05 %, gap of the first seed 0.2 %
    assert judge(curves, STEPS).met is False


def test_the_wrong_recipe_does_not_enter_the_criterion():
    assert judge(five(block=7.0), STEPS).met is True


def test_a_missing_run_leaves_the_criterion_undecided_unless_the_others_break_it():
    curves = five()
    curves[3].losses = curves[3].losses[:5]
    assert judge(curves, STEPS).met is None
    assert "not decided" in judge(curves, STEPS).text()
    curves[2] = curve("fp8-1", 2.1)
    assert judge(curves, STEPS).met is False
    assert judge(five()[:1], STEPS).met is None
    assert "nothing to compare" in judge(five()[:1], STEPS).text()


def test_the_table_shows_every_run_also_one_that_died():
    curves = five()
    curves[4] = curve("block-1", 9.0, "ended with code 2: gradient norm not finite", steps=12, skipped=20)
    rows = table(curves, judge(curves, STEPS)).splitlines()
    assert rows[2].startswith("| bf16-1 | 2.00000 |  | 40 | 1,000 |")
    assert "| +0.050% |" in rows[4]
    assert rows[6] == "| block-1 | none |  | 12 | 1,000 | 2.00 | 20 | ended with code 2: gradient norm not finite |"


def test_a_curve_is_read_from_the_runs_own_rows(tmp_path):
    rows = [
        {"step": 1, "loss_main": 3.0, "grad_norm": 2.0, "tokens_per_second": 10.0, "skipped": False},
        {"step": 2, "loss_main": None, "grad_norm": None, "tokens_per_second": 30.0, "skipped": True},
        {"step": 3, "loss_main": 2.0, "grad_norm": 4.0, "tokens_per_second": 20.0, "skipped": False},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_curve("fp8-2", tmp_path, "done")
    assert (found.recipe, found.seed, found.tokens_per_second) == ("fp8", 2, 20.0)
    assert (found.largest_norm, found.skipped) == (4.0, 1)
    assert found.losses[[0, 2]].tolist() == [3.0, 2.0] and np.isnan(found.losses[1])


def test_a_run_that_wrote_nothing_is_a_curve_of_no_steps(tmp_path):
    found = read_curve("fp8-1", tmp_path, "ended with code 1: Killed")
    assert len(found.losses) == 0 and judge([found], STEPS).means == {"fp8-1": None}


def test_json_keeps_every_step_with_null_for_what_is_no_number():
    curves = five()
    curves[4].losses[5] = np.inf
    data = json.loads(json.dumps(as_json(curves, judge(curves, STEPS), {"length": "x"}), allow_nan=False))
    assert data["runs"][4]["losses"][5] is None and len(data["runs"][0]["losses"]) == STEPS
    assert data["verdict"]["met"] is True and data["length"] == "x"


def test_smoothing_keeps_means_and_drops_the_ends():
    assert smooth(np.arange(6.0), 3) == pytest.approx([1, 2, 3, 4])
    assert len(smooth(np.arange(2.0), 3)) == 0


@pytest.mark.parametrize("kept", [slice(0, 5), slice(0, 1), slice(2, 4)])
def test_a_picture_comes_of_all_runs_and_of_few(kept, tmp_path):
    curves = five()
    curves[3].losses[20:] = np.nan
    some = curves[kept]
    path = draw(some, judge(some, STEPS), 1000, tmp_path / "a.png")
    assert path.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [path]
