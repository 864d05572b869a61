"""Whole runs through the launch script, as a user starts them: files, resume, data parallelism, refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PRETRAIN = Path(__file__).parents[2] / "launch" / "pretrain.py"
EXACT = ("loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm", "lr", "max_vio", "router_bias_max", "tokens")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        lines = [f"def function_{number}_{i}(a, b):\n    return a * {i * number} + b\n" for i in range(30)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


def start(corpus: Path, run_dir: Path, *overrides: str, processes: int = 0) -> subprocess.CompletedProcess:
    """launch/pretrain.py on a small shape; processes > 0 starts it under torchrun."""
    arguments = [
        "+config=tiny", f"run_dir={run_dir}", f"data.sources=[{{path: {corpus}}}]", "data.validation_fraction=0.2",
        f"data.cache_dir={corpus.parent}/cache", "data.seq_len=64", "model.num_hidden_layers=3", "model.hidden_size=32",
        "model.vocab_size=512", "train.micro_batch_size=2", "train.global_batch_size=4", "train.eval_every=3",
        "train.eval_sequences=4", "train.finish=[]", "checkpoint.every=3", "logging.wandb=disabled", *overrides,
    ]  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *torchrun, str(PRETRAIN), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def rows(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """Six steps without a stop."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    done = start(corpus, run_dir, "train.steps=6")
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def test_a_run_leaves_every_file_it_promises(whole):
    names = {p.name for p in whole.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "validation.jsonl", "loss.png", "expert_load.png", "exit.json"} <= names
    assert {"report.html", "events.jsonl"} <= names
    assert [row["step"] for row in rows(whole)] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows(whole, "validation.jsonl")] == [0, 3, 6]
    promised = (
        "step tokens loss loss_main loss_mtp loss_balance lr grad_norm tokens_per_second max_vio step_seconds mfu"
    )
    assert set(promised.split()) <= rows(whole)[0].keys()
    assert json.loads((whole / "exit.json").read_text())["code"] == 0


def test_a_runs_rows_say_where_time_and_memory_go_and_its_report_shows_it(whole):
    for row in rows(whole):
        parts = [row[f"time_{name}"] for name in ("compute", "data", "optimizer")]
        assert all(part >= 0 for part in parts) and 0.5 * row["step_seconds"] < sum(parts) <= row["step_seconds"]
        held = sum(v for k, v in row.items() if k.startswith("memory_") and k != "memory_gib")
        assert held == pytest.approx(row["memory_gib"])
    assert rows(whole)[3]["time_checkpoint"] > 0, "the save after step 3 belongs to the row of step 4"
    kinds = [row["kind"] for row in rows(whole, "events.jsonl")]
    assert kinds[0] == "start" and kinds[-1] == "done" and "save" in kinds
    text = (whole / "report.html").read_text()
    assert 'id="time"' in text and 'id="load_now"' in text and "from 6 rows" in text and "finished" in text


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(corpus, whole, tmp_path):
    run_dir = tmp_path / "halves"
    for steps in (3, 6):
        done = start(corpus, run_dir, f"train.steps={steps}")
        assert done.returncode == 0, done.stdout + done.stderr
        ended = f"validation loss {rows(run_dir, 'validation.jsonl')[-1]['val_loss']:.3f} after step {steps}"
        assert ended in done.stdout
    for ours, theirs in zip(rows(run_dir), rows(whole), strict=True):
        assert {k: ours[k] for k in EXACT} == {k: theirs[k] for k in EXACT}
    assert rows(run_dir, "validation.jsonl")[-1] == rows(whole, "validation.jsonl")[-1]


def test_starting_a_finished_run_again_changes_nothing(corpus, whole):
    before = (whole / "metrics.jsonl").read_bytes()
    done = start(corpus, whole, "train.steps=6")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_two_data_ranks_train_as_one_process(corpus, whole, tmp_path):
    done = start(corpus, tmp_path / "two", "train.steps=3", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    for ours, theirs in zip(rows(tmp_path / "two"), rows(whole)[:3], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert ours["max_vio_layers"] == theirs["max_vio_layers"]


def test_four_ranks_of_a_pipeline_with_experts_train_as_one_process_which_then_goes_on_and_exports(
    corpus, whole, tmp_path
):
    run_dir = tmp_path / "four"
    grid = ["parallel=dualpipe_pp2_ep2", "train.micro_batch_size=1"]
    done = start(corpus, run_dir, "train.steps=3", *grid, processes=4)
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(run_dir)[0]["max_vio_layers"] == rows(whole)[0]["max_vio_layers"]
    done = start(corpus, run_dir, "train.steps=6", "train.finish=[export,verify]")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing missing" in done.stdout and (run_dir / "export" / "config.json").exists()
    for ours, theirs in zip(rows(run_dir), rows(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_a_grid_that_does_not_fit_is_refused_with_both_sides_before_anything_is_written(corpus, tmp_path):
    grid = ["parallel.pp_size=2", "parallel.schedule=dualpipev"]
    done = start(corpus, tmp_path / "misfit", "train.steps=1", *grid, processes=2)
    assert "4 pipeline stages > model.num_hidden_layers=3" in done.stdout + done.stderr
    assert json.loads((tmp_path / "misfit" / "exit.json").read_text())["code"] == 2
    assert not (tmp_path / "misfit" / "metrics.jsonl").exists()


def test_a_folder_of_another_config_is_refused(corpus, whole):
    done = start(corpus, whole, "train.steps=6", "model.moe_intermediate_size=64")
    assert done.returncode == 2
    assert "moe_intermediate_size" in done.stderr and "Traceback" not in done.stderr
