"""Figures of a run: what they mean, and that their files survive kills and resumes."""

import json
import math

import pytest
import torch

from deepv3.config.schema import Config
from deepv3.pipeline.figures import StepOut
from deepv3.train import metrics


def sums(counts: torch.Tensor, tokens: int) -> StepOut:
    layers = counts.shape[0]
    one = torch.ones((), dtype=torch.float64)
    return StepOut(
        2 * one,
        3 * one,
        0.5 * one,
        counts.double(),
        torch.full((layers,), 2.0 * tokens),
        torch.full((layers,), 4.0 * tokens),
    )


def test_max_vio_is_the_excess_of_the_fullest_expert_over_the_mean():
    counts = torch.tensor([[10.0, 10, 10, 10], [25, 5, 5, 5], [40, 0, 0, 0]])
    assert metrics.max_violation(counts) == pytest.approx([0.0, 1.5, 3.0])


def test_router_figures_are_per_token_and_count_dead_experts():
    figures = metrics.router_figures(sums(torch.tensor([[8, 0, 4, 4], [4, 4, 4, 4]]), tokens=16), tokens=16)
    assert figures["dead_experts"] == 1
    assert figures["max_vio"] == pytest.approx(1.0)
    assert figures["routing_entropy"] == pytest.approx(2.0)
    assert figures["node_fanout"] == pytest.approx(4.0)


def test_a_model_without_experts_has_neutral_router_figures():
    assert metrics.router_figures(sums(torch.zeros(0, 4), tokens=4), tokens=4)["max_vio"] == 0.0


def test_loss_is_main_plus_weighted_mean_mtp_plus_balance():
    figures = metrics.loss_figures(sums(torch.ones(1, 4), 4), mtp_weight=0.3)
    assert figures["loss_mtp"] == pytest.approx(3.0)
    assert figures["loss"] == pytest.approx(2 + 0.3 * 3 + 0.5)


def test_packing_the_sums_and_unpacking_them_changes_nothing():
    before = sums(torch.arange(12).view(3, 4), 5)
    after = StepOut.unpack(before.pack(), n_moe=3)
    for name in StepOut.__dataclass_fields__:
        assert torch.equal(getattr(before, name).double(), getattr(after, name)), name


def test_rows_are_whole_lines_and_nan_becomes_null(tmp_path):
    file = metrics.JsonLines(tmp_path / "m.jsonl")
    file.append({"step": 1, "loss": math.nan, "list": [1.0, math.inf]})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "loss": None, "list": [1.0, None]}


def test_cut_drops_later_steps_and_a_torn_line(tmp_path):
    file = metrics.JsonLines(tmp_path / "m.jsonl")
    for step in range(1, 6):
        file.append({"step": step})
    with open(file.path, "a") as handle:
        handle.write('{"step": 6, "lo')
    file.cut(3)
    assert [row["step"] for row in file.read()] == [1, 2, 3]
    assert file.path.read_text().endswith("\n")


def test_peak_is_the_configured_one_where_given():
    cfg = Config()
    cfg.cluster.peak_tflops = 5.0
    assert metrics.peak_tflops(cfg, torch.device("cpu")) == 5.0
    cfg.cluster.peak_tflops = 0.0
    assert metrics.peak_tflops(cfg, torch.device("cpu")) == 0.0


def test_what_no_long_lived_tensor_explains_is_activations():
    held = {"weights": 2**30, "gradients": 2**31, "master weights": 2**29, "moments": 2**29}
    parts = metrics.memory_parts(held, peak_gib=6.0)
    assert parts == {
        "memory_weights_gib": 1.0,
        "memory_gradients_gib": 2.0,
        "memory_master_gib": 0.5,
        "memory_moments_gib": 0.5,
        "memory_activations_gib": 2.0,
    }


class FakeWandb:
    """What is logged, by step."""

    def __init__(self):
        self.logged, self.finished = [], False

    def log(self, row, step=None):
        self.logged.append((step, row))

    def finish(self):
        self.finished = True


@pytest.fixture
def recorder(tmp_path):
    cfg = Config()
    cfg.run_dir, cfg.logging.wandb = str(tmp_path), "disabled"
    made = metrics.Recorder(cfg, 0)
    made.wandb = FakeWandb()
    return made


def test_wandb_gets_every_figure_of_a_row_with_layers_side_by_side(recorder):
    row = {"step": 3, "loss": 2.0, "time_compute": 0.5, "max_vio_layers": [0.1, 0.2]}
    recorder.step(row)
    expected = {"step": 3, "loss": 2.0, "time_compute": 0.5, "max_vio_layers/00": 0.1, "max_vio_layers/01": 0.2}
    assert recorder.wandb.logged == [(3, expected)]


def test_wandb_gets_the_report_last(recorder, tmp_path):
    (tmp_path / "report.html").write_text("<p>hello</p>")
    recorder.close(tmp_path / "report.html")
    assert list(recorder.wandb.logged[-1][1]) == ["report"] and recorder.wandb.finished


def test_expert_loads_are_thinned_and_pictured_ever_more_rarely(recorder):
    counts = torch.tensor([[4, 4, 8, 0], [4, 4, 4, 4]])
    for step in range(1, 1001):
        recorder.load(step, counts)
    rows = recorder.expert_load.read()
    assert len(rows) < metrics.LOAD_RECORDS and rows[0]["step"] == 1 and rows[-1]["step"] == 1000
    pictured = [step for step, row in recorder.wandb.logged if "expert_load" in row]
    assert pictured[:5] == [1, 2, 4, 8, 16] and 9 <= len(pictured) <= 20
