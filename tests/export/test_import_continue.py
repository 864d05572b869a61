"""From a run to Hugging Face's format and back into a run, by the commands a user types: training goes on."""

import importlib.util
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from deepv3.export.hf import export
from deepv3.export.verify import verify

LAUNCH = Path(__file__).parents[2] / "launch"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def train(*arguments: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def call(script: str, *arguments: str) -> None:
    """A launch script's main, in this process."""
    spec = importlib.util.spec_from_file_location(f"launch_{script}", LAUNCH / f"{script}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(list(arguments))


def rows(run_dir: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "corpus"
    folder.mkdir()
    for number in range(40):
        lines = [f"def function_{number}_{i}(a, b):\n    return a * {i * number} + b\n" for i in range(30)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def imported(corpus, tmp_path_factory) -> tuple[Path, list[str], list[str]]:
    """A run of four steps in FP32 taken to Hugging Face's format and back: its folder, the arguments common to all
    runs, and those that the import has printed."""
    folder = tmp_path_factory.mktemp("runs")
    common = [
        "+config=tiny", f"data.sources=[{{path: {corpus}}}]", f"data.cache_dir={corpus.parent / 'cache'}",
        "data.validation_fraction=0.2", "data.seq_len=64", "train.micro_batch_size=2", "train.global_batch_size=4",
        "train.eval_every=4", "train.eval_sequences=4", "train.finish=[]", "logging.wandb=disabled", "train.steps=4",
        "optim.lr=3e-3",
    ]  # fmt: skip
    shape = ["model.num_hidden_layers=3", "model.hidden_size=32", "model.vocab_size=512"]
    train(str(LAUNCH / "pretrain.py"), *common, *shape, f"run_dir={folder / 'a'}")
    call("export_hf", f"source={folder / 'a'}", f"output={folder / 'hf'}", "dtype=float32")
    printed = io.StringIO()
    with redirect_stdout(printed):
        call("import_hf", f"source={folder / 'hf'}", f"output={folder / 'imported'}")
    assert "3 layers, 1 of MTP" in printed.getvalue()
    told = printed.getvalue().splitlines()[-1].split()[1:]
    assert f"train.resume={folder / 'imported'}" in told and "model.vocab_size=512" in told
    return folder, common, told


@pytest.mark.parametrize(
    "layout",
    [
        "parallel.pp_size=2",
        pytest.param("parallel.ep_size=2", marks=pytest.mark.slow),
        pytest.param("parallel.pp_size=1", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_go_on_from_an_import_where_the_exported_run_stood(layout, imported, tmp_path):
    folder, common, told = imported
    train(*TORCHRUN, str(LAUNCH / "pretrain.py"), *common, *told, layout, f"run_dir={tmp_path / 'b'}")

    before, after = rows(folder / "a", "validation.jsonl"), rows(tmp_path / "b", "validation.jsonl")
    assert [row["step"] for row in before] == [row["step"] for row in after] == [0, 4]
    assert after[0]["val_loss"] == pytest.approx(before[-1]["val_loss"], rel=1e-5)
    assert after[0]["val_loss_mtp"] == pytest.approx(before[-1]["val_loss_mtp"], rel=1e-5)
    assert before[0]["val_loss"] > after[0]["val_loss"] > after[-1]["val_loss"], "it must learn, before and after"
    assert rows(tmp_path / "b", "metrics.jsonl")[0]["tokens"] == 4 * 64, "tokens are counted from the import on"

    output = export(tmp_path / "b", tmp_path / "hf")  # of a checkpoint that two ranks have written
    assert verify(output, tmp_path / "b")["logits_relative_difference"] <= 1e-5
