"""Evaluation gives training's own validation loss; texts are scored whole; figures and refusals."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models

from deepv3.config.cli import guarded
from deepv3.config.schema import SourceConfig
from deepv3.data.tokenizer import SPECIAL, Tokenizer, train
from deepv3.errors import ConfigError, DataError
from deepv3.eval.perplexity import Figures, byte_widths, documents, held_out
from deepv3.export.opened import open_source

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        lines = [f"def größe_{number}_{i}(a, b):\n    return a * {i * number} + b\n" for i in range(30)]
        (folder / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    """A run of two steps with validation, an average of the weights and masks between documents."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    arguments = [
        "+config=tiny", f"run_dir={run_dir}", f"data.sources=[{{path: {corpus}}}]", "data.validation_fraction=0.2",
        f"data.cache_dir={corpus.parent}/cache", "data.seq_len=64", "model.num_hidden_layers=2", "model.hidden_size=32",
        "model.vocab_size=512", "train.micro_batch_size=2", "train.global_batch_size=4", "train.eval_every=1",
        "train.eval_sequences=6", "train.finish=[]", "checkpoint.every=1", "logging.wandb=disabled", "train.steps=2",
        "data.mask_documents=true", "optim.ema_decay=0.5", "optim.warmup_steps=0",
    ]  # fmt: skip
    command = [sys.executable, str(LAUNCH / "pretrain.py"), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def validation(run: Path, step: int) -> dict:
    rows = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    return next(row for row in rows if row["step"] == step)


@pytest.mark.parametrize("step", [1, 2])
def test_held_out_loss_is_the_number_that_training_wrote(run, step):
    opened = open_source(run / "checkpoints" / f"step-{step:08d}")
    figures = held_out(opened.load(), opened.cfg, opened.tokenizer)
    assert figures.loss == pytest.approx(validation(run, step)["val_loss"], rel=1e-12)
    assert figures.loss_mtp == pytest.approx(validation(run, step)["val_loss_mtp"], rel=1e-12)
    assert figures.tokens == 6 * 64


def test_a_run_evaluates_its_newest_checkpoint_and_changes_no_file_of_it(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    opened = open_source(run)
    twice = [held_out(opened.load(), opened.cfg, opened.tokenizer).loss for _ in range(2)]
    assert twice[0] == twice[1] == pytest.approx(validation(run, 2)["val_loss"], rel=1e-12)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    average = open_source(run, ema=True)
    assert held_out(average.load(), average.cfg, average.tokenizer).loss != twice[0]


def test_bits_per_byte_count_the_bytes_of_the_targets(run):
    opened = open_source(run)
    figures = held_out(opened.load(), opened.cfg, opened.tokenizer)
    assert figures.bytes > figures.tokens
    assert figures.bits_per_byte == pytest.approx(figures.nats / math.log(2) / figures.bytes)


def test_another_validation_source_is_read_whole_and_too_many_sequences_are_refused(run, corpus, tmp_path):
    (tmp_path / "own.txt").write_text((corpus / "3.txt").read_text() * 3)
    opened = open_source(run)
    data = replace(opened.cfg.data, validation_sources=[SourceConfig(str(tmp_path))])
    cfg, model = replace(opened.cfg, data=data), opened.load()
    one = held_out(model, cfg, opened.tokenizer, sequences=1)
    assert one.tokens == 64 and str(tmp_path) in one.what
    with pytest.raises(ConfigError, match="sequences = 10000, but .* held out"):
        held_out(model, cfg, opened.tokenizer, sequences=10000)
    with pytest.raises(ConfigError, match="sequences = 0"):
        held_out(model, cfg, opened.tokenizer, sequences=0)
    nothing = replace(opened.cfg, data=replace(opened.cfg.data, validation_fraction=0.0))
    with pytest.raises(ConfigError, match="nothing is held out"):
        held_out(model, nothing, opened.tokenizer)


def test_documents_are_scored_one_by_one_behind_an_eos(run, corpus, tmp_path):
    opened = open_source(run)
    model, tokenizer = opened.load(), opened.tokenizer
    texts = [(corpus / f"{n}.txt").read_text()[:size] for n, size in ((1, 70), (2, 400))]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.md").write_text(text, encoding="utf-8")
    (tmp_path / "damaged.md").write_bytes(b"\xff\xfe\xff")
    figures = documents(model, tokenizer, SourceConfig(str(tmp_path)), 512, str(tmp_path / "cache"))
    nats = 0.0
    for text in texts:
        ids = [tokenizer.eos, *tokenizer.encode(text), tokenizer.eos]
        logits = model.logits(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
        nats -= logits.gather(-1, torch.tensor(ids[1:])[:, None]).sum().item()
    assert figures.nats == pytest.approx(nats, rel=1e-5)
    assert (figures.documents, figures.bad) == (2, 1)
    assert figures.bytes == sum(len(text.encode()) for text in texts)
    assert figures.tokens == sum(len(tokenizer.encode(text)) + 1 for text in texts)


def test_a_source_without_text_and_a_tokenizer_without_eos_are_refused(run, tmp_path):
    opened = open_source(run)
    (tmp_path / "damaged.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="no document that can be read, 1 bad"):
        documents(opened.load(), opened.tokenizer, SourceConfig(str(tmp_path)), 64, str(tmp_path / "cache"))
    silent = Tokenizer(opened.tokenizer.backend, {})
    with pytest.raises(DataError, match="no eos"):
        documents(opened.load(), silent, SourceConfig(str(tmp_path)), 64)


def test_widths_of_tokens_add_up_to_the_bytes_of_a_text():
    tokenizer = train(iter(["def größe(x):\n    return '深度 🙂'\n" * 9]), 320)
    text = "größe = '深度 🙂 ünbekannt'\n"
    assert byte_widths(tokenizer)[tokenizer.encode(text)].sum() == len(text.encode())
    assert byte_widths(tokenizer)[: len(SPECIAL)].sum() == 0


def test_bytes_of_a_vocabulary_of_words_are_not_guessed():
    backend = Backend(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="a"))
    assert json.loads(backend.to_str())["decoder"] is None
    assert byte_widths(Tokenizer(backend, {"eos_token": "<eos>"})) is None
    assert Figures("x", 10.0, 4).bits_per_byte is None
    assert "bits per byte" not in "".join(Figures("x", 10.0, 4).describe())


def test_launch_eval_prints_the_figures_and_writes_them_as_json(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert launch(f"source={run}", "output=figures.json") == 0
    written = json.loads(Path("figures.json").read_text())
    assert written["held_out"]["loss"] == pytest.approx(validation(run, 2)["val_loss"], rel=1e-12)
    assert f"loss {written['held_out']['loss']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "source=PATH is needed"),
        (["length=4000"], "length = 4000 must be at least 2 and at most model.max_position_embeddings = 512"),
        (["tasks=[some]"], "needs the package lm_eval"),
        (["data.nonsense=1"], "data.nonsense"),
        (["text=nowhere"], "nowhere"),
        (["typo=1"], "typo"),
    ],
)
def test_launch_eval_refuses_with_code_2(run, capsys, monkeypatch, arguments, told):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert launch(*([f"source={run}"] if arguments else []), *arguments) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error


def launch(*arguments: str) -> int:
    """launch/eval.py in this process."""
    import runpy

    return guarded(lambda: runpy.run_path(str(LAUNCH / "eval.py"))["main"](list(arguments)))
