"""A whole run in FP8: it learns, goes on from its checkpoint bit for bit, and its export is verified."""

import json
import sys
import time
from pathlib import Path

import pytest
import ranks

LAUNCH = Path(__file__).parents[2] / "launch"
EXACT = ("loss_main", "loss_mtp", "loss_balance", "grad_norm", "max_vio")


def _run(corpus: str, run_dir: str, *overrides: str) -> None:
    """On a rank: what launch/pretrain.py does."""
    sys.path.insert(0, str(LAUNCH))
    from finish import finish

    from deepv3.config.compose import compose
    from deepv3.train.entry import pretrain

    cfg = compose([
        "+config=tiny", "precision=fp8", f"run_dir={run_dir}", f"data.sources=[{{path: {corpus}}}]",
        f"data.cache_dir={corpus}/../cache", "data.validation_fraction=0", "data.seq_len=32", "data.num_proc=1",
        "model.num_hidden_layers=2", "model.hidden_size=64", "model.vocab_size=512", "model.intermediate_size=128",
        "train.micro_batch_size=2", "train.global_batch_size=4", "train.eval_every=0", "checkpoint.every=2",
        "checkpoint.keep=9", "train.finish=[]", "logging.wandb=disabled", "logging.progress=false",
        "logging.plot_every=100", "optim.lr=3e-3", *overrides,
    ])  # fmt: skip
    pretrain(cfg, time.time(), finish)


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(12):
        text = "".join(f"def function_{number}_{i}(a, b):\n    return a * {i * number} + b\n" for i in range(30))
        (folder / f"{number}.txt").write_text(text)
    return folder


def test_a_run_in_fp8_learns_goes_on_exactly_and_exports(corpus, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    ranks.run(1, _run, str(corpus), str(whole), "train.steps=6", "train.finish=[export,verify]")
    for steps in (2, 6):
        ranks.run(1, _run, str(corpus), str(halves), f"train.steps={steps}")
    ours, theirs = rows(halves), rows(whole)
    assert [row["step"] for row in ours] == [1, 2, 3, 4, 5, 6]
    assert [{key: row[key] for key in EXACT} for row in ours] == [{key: row[key] for key in EXACT} for row in theirs]
    assert theirs[-1]["loss_main"] < theirs[0]["loss_main"] - 0.1 and not any(row["skipped"] for row in theirs)
    assert json.loads((whole / "finished.json").read_text())["done"] == ["export", "verify"]
