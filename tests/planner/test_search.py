"""The search tries everything, gives each layout one fate, and its ranking is what simulation says."""

import time
from dataclasses import replace

import pytest
import yaml
from plans import REPORT, config, v3

from deepv3.config.schema import ParallelConfig
from deepv3.errors import ConfigError
from deepv3.planner.layout import Layout
from deepv3.planner.memory import Memory, misfit
from deepv3.planner.search import KEPT, candidates, objection, save_preset, search, text
from deepv3.planner.simulate import Simulator

SMALL = ("+config=moe_16b", "cluster=h100", "train.global_batch_size=512", "train.eval_every=0")


@pytest.fixture(scope="module")
def small():
    """A 16 B model on 64 H100: (result, CPU seconds)."""
    start = time.process_time()
    return search(config(*SMALL), REPORT), time.process_time() - start


def test_every_layout_has_exactly_one_fate(small):
    found, _ = small
    out = [text for rows in found["reasons"].values() for text in rows]
    ranked = [row["text"] for row in found["ranked"]]
    assert len(out) + len(ranked) == found["tried"] == len(set(out) | set(ranked))


def test_five_hundred_layouts_take_less_than_a_minute(small):
    found, seconds = small
    assert found["tried"] >= 500
    assert seconds * 500 / found["tried"] < 60


def test_the_ranking_is_sorted_and_fits(small):
    times = [row["step_seconds"] for row in small[0]["ranked"]]
    assert times == sorted(times) and len(times) == KEPT
    assert all(row["gib"] <= 79.6 for row in small[0]["ranked"])


def test_nothing_turned_down_as_slow_would_have_been_among_the_best(small):
    """Six of them, the best bound included, simulated after all."""
    worst = small[0]["ranked"][-1]["step_seconds"]
    slow = set(small[0]["reasons"]["slower than the ten best"])
    layouts = [layout for layout in candidates(Layout.of(config(*SMALL))) if text(layout) in slow]
    assert len(layouts) == len(slow) > 8
    by_bound = sorted((Simulator(layout, REPORT) for layout in layouts), key=Simulator.bound)
    for simulator in [*by_bound[:3], *by_bound[3 :: len(by_bound) // 3]]:
        assert simulator.step().seconds >= worst * (1 - 1e-9)


def test_the_reports_own_layout_is_among_the_best_for_its_cluster():
    """Against its neighbours: other expert groups, schedules, recompute, precision and micro-batch on PP16."""
    mine, best = v3(), Simulator(v3(), REPORT).step().seconds
    assert not objection(mine, REPORT)
    others = [replace(mine, ep=32), replace(mine, schedule="1f1b"), replace(mine, schedule="zb1p"),
              replace(mine, recompute="full"), replace(mine, precision="bf16"), replace(mine, micro=2)]  # fmt: skip
    for other in others:
        assert objection(other, REPORT) or Simulator(other, REPORT).bound() > best * 0.999, text(other)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"ep": 256, "pp": 16}, "ep_size does not divide"),
        ({"batch": 100}, "the batch does not divide"),
        ({"pp": 64, "ep": 32}, "more stages than layers"),
        ({"batch": 3072}, "too few micro-batches"),
        ({"recompute": "none"}, "does not fit"),
        ({"ep": 4, "schedule": "1f1b"}, "does not fit"),
    ],
)
def test_a_layout_that_cannot_run_has_its_reason(change, reason):
    count = {"cluster": replace(v3().cluster, count=1024 * 3)} if "ep_size" in reason else {}
    assert reason in objection(v3(**count, **change), REPORT)


def test_what_passes_runs():
    layout = v3(pp=8, schedule="dualpipev")
    assert objection(layout, REPORT) == "" == misfit(Memory(layout, REPORT).ranks(), layout)
    layout.refuse_impossible()


def test_the_best_layout_is_written_as_a_preset(small, tmp_path):
    path = tmp_path / "mine.yaml"
    save_preset(small[0], path)
    values = yaml.safe_load(path.read_text())
    best = small[0]["ranked"][0]
    assert ParallelConfig(**values).pp_size == best["pp_size"] and values["schedule"] == best["schedule"]
    assert f"train.recompute={best['recompute']}" in path.read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize("name", ["mine.json", "nowhere/mine.yaml"])
def test_a_preset_goes_into_an_existing_folder(small, tmp_path, name):
    with pytest.raises(ConfigError, match="save ="):
        save_preset(small[0], tmp_path / name)


def test_a_cluster_too_small_for_any_layout_is_refused_with_the_counts():
    with pytest.raises(ConfigError, match="does not fit in memory: .*take more or larger devices"):
        search(config("+config=v3_671b", "cluster=h200_1", "train.global_batch_size=8"), REPORT)
