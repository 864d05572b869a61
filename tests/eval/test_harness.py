"""Tasks from local files through the real lm_eval, installed beside the environment and not into it."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from deepv3.eval.score import Row, windows
from deepv3.export.hf import export
from deepv3.export.opened import open_source
from deepv3.generate.sample import generate

pytestmark = pytest.mark.versions
VERSION = "0.4.13"
CACHE = Path(__file__).parents[2] / ".cache" / "packages"
EVAL = Path(__file__).parents[2] / "launch" / "eval.py"
ROWS = [
    {"question": "def f(", "choices": ["self", "zq"], "text": "def f(self):\n    return self.x\n" * 9, "said": ""},
    {"question": "", "choices": ["def", " @@"], "text": "x = 1\n", "said": ""},
    {"question": "import ", "choices": ["os\n", "é"], "text": "größe = 2\n", "said": ""},
]


@pytest.fixture(scope="module")
def packages() -> Path:
    """A folder with lm_eval and what this environment lacks of its dependencies."""
    folder = CACHE / f"lm_eval-{VERSION}"
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    if folder.is_dir():
        return folder
    report = subprocess.run(
        [*pip, "--dry-run", "--report", "-", f"lm_eval=={VERSION}"],
        check=True,
        timeout=600,
        capture_output=True,
        text=True,
    )
    lacking = [
        f"{item['metadata']['name']}=={item['metadata']['version']}" for item in json.loads(report.stdout)["install"]
    ]
    subprocess.run([*pip, "--no-deps", "--target", str(beside), *lacking], check=True, timeout=900)
    beside.rename(folder)
    return folder


def test_tasks_from_local_files_give_the_models_own_figures(packages, make_run, tmp_path):
    folder = export(make_run().dir, tmp_path / "export", "float32")
    opened = open_source(folder)
    model, tokenizer = opened.load(), opened.tokenizer

    def logprob(row: Row) -> float:
        logits = model.logits(torch.tensor([row.inputs()]))[0, len(row.context) - 1 :].double().log_softmax(-1)
        return logits.gather(-1, torch.tensor(row.targets)[:, None]).sum().item()

    def answer(question: str, choices: list[str]) -> int:
        start = tokenizer.encode(question)
        ends = [tokenizer.encode(question + choice)[len(start) :] for choice in choices]
        first, second = (logprob(Row(start or [tokenizer.eos], end)) for end in ends)
        return int(second > first)

    for row in ROWS:
        ids = torch.tensor([tokenizer.encode(row["question"]) or [tokenizer.eos]])
        row["said"] = tokenizer.decode(generate(model, ids, 8)[0, ids.shape[1] :].tolist(), True)
        row["answer"] = answer(row["question"], row["choices"])
    ROWS[2]["answer"] = 1 - ROWS[2]["answer"]  # one wrong: accuracy 2/3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test", "doc_to_text": "{{question}}",
    }  # fmt: skip
    tasks = {
        "choice": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
                   "metric_list": [{"metric": "acc"}]},
        "whole": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                  "metric_list": [{"metric": "bits_per_byte"}]},
        "said": {"output_type": "generate_until", "doc_to_target": "{{said}}",
                 "metric_list": [{"metric": "exact_match"}],
                 "generation_kwargs": {"until": ["never said"], "max_gen_toks": 8}},
    }  # fmt: skip
    for name, own in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": f"local_{name}", **common, **own}))
    listed = ",".join(str(tmp_path / f"{name}.yaml") for name in tasks)
    environment = os.environ | {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [
        sys.executable,
        str(EVAL),
        f"source={folder}",
        f"tasks=[{listed}]",
        f"output={tmp_path}/out.json",
        "length=64",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    out = json.loads((tmp_path / "out.json").read_text())["tasks"]
    assert out["local_choice"]["acc,none"] == pytest.approx(2 / 3)
    assert out["local_said"]["exact_match,none"] == 1.0
    cut = [windows(tokenizer.encode(row["text"]), tokenizer.eos, 64) for row in ROWS]
    assert len(cut[0]) > 1, "one text takes several windows"
    nats = -sum(logprob(row) for rows in cut for row in rows)
    size = sum(len(row["text"].encode()) for row in ROWS)
    assert out["local_whole"]["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)


@pytest.mark.parametrize("name", ["no_such_task", "missing.yaml"])
def test_a_task_that_cannot_be_had_is_refused(packages, make_run, tmp_path, name):
    run = make_run()
    environment = os.environ | {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EVAL), f"source={run.dir}", f"tasks=[{name}]", "length=64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 2 and f"tasks={name}" in done.stderr and "Traceback" not in done.stderr
