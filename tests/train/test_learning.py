"""The experiment "does FP8 learn like BF16" as a whole, at toy size: data, pace, length, runs, verdict, files."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from deepv3.config.compose import compose
from deepv3.data.prepare import prepare
from deepv3.errors import ConfigError, ResourceError
from deepv3.train import learning
from deepv3.train.learning import Length, Options, arguments, curve, installed_folders, length, measure, read, trials
from deepv3.train.side_by_side import Pace

ROOT = Path(__file__).parents[2]
SMALL = [
    "+config=tiny", "model.num_hidden_layers=2", "model.hidden_size=64", "model.vocab_size=400", "data.seq_len=32",
    "model.num_nextn_predict_layers=0", "model.n_routed_experts=8", "train.global_batch_size=2", "data.num_proc=1",
    "train.micro_batch_size=2", "data.fim_rate=0", "data.validation_fraction=0", "data.tokenizer_train_bytes=50000",
]  # fmt: skip

# Stands in for launch/pretrain.py: a loss that falls with the steps, from a level of its recipe and seed.
SCRIPT = """
import json, signal, sys, time
from pathlib import Path
given = dict(argument.split("=", 1) for argument in sys.argv[1:])  # the last of a key counts
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
folder, steps = Path(given["run_dir"].strip("'")), int(given["train.steps"])
folder.mkdir(parents=True)
(folder / "curve.json").write_text(json.dumps([steps, given.get("optim.warmup_steps"), given.get("optim.lr_schedule")]))
level = 2 + 0.01 * int(given["seed"]) + 0.001 * (given["precision"] == "fp8")
for step in range(1, steps + 1):
    time.sleep(0.02)
    row = {"step": step, "loss_main": level + 1 / step, "grad_norm": 1.0, "tokens_per_second": 5.0, "skipped": False}
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\\n")
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with 60 kB of this repository's source."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("loop", "metrics", "step", "sweep"):
        (folder / f"{name}.py").write_text((ROOT / "deepv3" / "train" / f"{name}.py").read_text())
    (folder / "copy.py").write_text((folder / "loop.py").read_text())
    return folder


@pytest.fixture
def stand_in(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def small(cache) -> list[str]:
    return [*SMALL, f"data.cache_dir={cache}"]


def test_two_real_runs_end_in_a_table_a_picture_and_curves(text, tmp_path):
    command = [sys.executable, ROOT / "launch" / "learning.py", f"output={tmp_path}/out", "runs=[bf16-1,fp8-1]"]
    command += [f"folders=[{text}]", "tokens=500", *small(tmp_path / "cache")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "out" / "learning.json").read_text())
    assert [run["end"] for run in data["runs"]] == ["done", "done"]
    losses = [np.array(run["losses"]) for run in data["runs"]]
    assert [len(values) for values in losses] == [7, 7] and data["tokens_per_step"] == 64
    assert losses[0][0] != losses[1][0], "FP8 and BF16 have not computed the same"
    assert np.allclose(*losses, rtol=0.02), "the same weights and data begin alike"
    assert "| fp8-1 |" in done.stdout and done.stdout.strip() == (tmp_path / "out" / "learning.md").read_text().strip()
    assert (tmp_path / "out" / "learning.png").stat().st_size > 10_000
    assert not list((tmp_path / "out").rglob("checkpoints")), "nothing is saved under way"


def test_all_runs_are_shortened_alike_to_fit_the_limit(text, tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(learning, "SAFETY", 0.1)  # of the time, so that a busy machine is no reason to fail
    options = Options(output=str(tmp_path / "out"), folders=[str(text)], limit=50.0, runs=["bf16-1", "bf16-2", "fp8-1"])
    said = measure(options, small(tmp_path / "cache"), stand_in)
    curves = [json.loads((tmp_path / "out" / "runs" / name / "curve.json").read_text()) for name in options.runs]
    steps, warmup, schedule = curves[0]
    assert curves == [curves[0]] * 3 and 4 <= steps < 5.0 / 0.02
    assert warmup == str(min(20, steps // 10)) and schedule == f"[{{shape:cosine,tokens:{steps * 64},to:0.0004}}]"
    assert "SHORTENED from" in said and said.count("| done |") == 3
    data = json.loads((tmp_path / "out" / "learning.json").read_text())
    assert data["verdict"]["gaps"]["1"] == pytest.approx(0.001 / 2.01, rel=0.1)


def test_runs_that_the_limit_meets_are_judged_by_what_all_have(text, tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(learning, "calibrate", lambda group, until: Pace(startup=0.0, step=0.0001))
    monkeypatch.setattr(learning, "AFTER", 1.0)
    options = Options(output=str(tmp_path / "out"), folders=[str(text)], limit=6.0, runs=["bf16-1", "fp8-1"])
    said = measure(options, small(tmp_path / "cache"), stand_in)
    assert "STOPPED at the limit" in said and said.count("| stopped at the limit |") == 2
    data = json.loads((tmp_path / "out" / "learning.json").read_text())
    assert 4 <= data["verdict"]["steps"] == min(len(run["losses"]) for run in data["runs"])
    assert data["verdict"]["gaps"]["1"] > 0


@pytest.mark.parametrize("works", [True, False])
def test_the_service_is_used_only_if_short_runs_of_every_recipe_work_with_it(works, tmp_path, monkeypatch):
    script, ended = tmp_path / "script.py", []
    script.write_text(
        "import os, sys\n"
        f"open('{tmp_path}/log', 'a').write(('MPS ' if 'SERVICE' in os.environ else '') + "
        "next(a for a in sys.argv if a.startswith('run_dir')).split('/')[-1].strip(\"'\") + '|')\n"
        f"sys.exit('SERVICE' in os.environ and not {works})\n"
    )

    @contextmanager
    def service():
        yield {"SERVICE": "1"}
        ended.append(True)

    monkeypatch.setattr(learning.mps, "service", service)
    options = Options(runs=["bf16-1", "fp8-1", "fp8-2"])
    with ExitStack() as stack:
        found = learning._company(stack, learning.Warmth(tmp_path, options, [], ["0"], Event(), script))
        assert found == ({"SERVICE": "1"} if works else {}) and ended == ([] if works else [True])
    assert ended == [True]
    assert (tmp_path / "log").read_text() == ("MPS fp8|MPS bf16|" if works else "MPS fp8|fp8|bf16|")


def test_no_token_is_read_twice_and_short_text_is_said(text, tmp_path):
    options = Options(output="out", folders=[str(text)], tokens=1e9, limit=60)
    cfg = compose(arguments(options, small(tmp_path / "cache")))
    prepared = prepare(cfg, lambda line: None)
    rows = prepared.shape.rows(prepared.train[0].tokens("train"))
    assert learning.epoch(prepared) == rows and prepared.train[0].source.copies == 1
    whole = length(cfg, prepared, options, None)
    assert whole.steps == rows // 2 and "SHORT of tokens=1e+09" in whole.why
    assert length(cfg, prepared, options, 9.7).steps == 9
    assert length(cfg, prepared, Options(tokens=640.0), None) == Length(10, "tokens=640")
    with pytest.raises(ResourceError, match="no last quarter"):
        length(cfg, prepared, options, 3.0)


def test_the_curve_of_the_learning_rate_ends_with_the_run():
    cfg = compose(["+config=learn_300m", *curve(compose(["+config=learn_300m"]), 1234)])
    assert sum(segment.tokens for segment in cfg.optim.lr_schedule) == 1234 * 32 * 1024
    assert cfg.optim.lr_schedule[0].to == pytest.approx(cfg.optim.lr / 10) and cfg.train.steps == 1234
    assert cfg.optim.warmup_steps == 100


def test_runs_differ_in_precision_recipe_and_seed_alone():
    options = Options(output="out", folders=["/a b", "/it's"])
    base = arguments(options, [])
    made = {trial.name: compose([*base, *trial.arguments]) for trial in trials(options)}
    found = {name: (cfg.precision.name, cfg.precision.recipe, cfg.seed) for name, cfg in made.items()}
    assert found == {
        "bf16-1": ("bf16", "v3", 1), "bf16-2": ("bf16", "v3", 2), "fp8-1": ("fp8", "v3", 1), "fp8-2": ("fp8", "v3", 2),
        "block-1": ("fp8", "block_gradients", 1),
    }  # fmt: skip
    for cfg in made.values():
        assert (cfg.model, cfg.data, cfg.optim) == (made["bf16-1"].model, made["bf16-1"].data, made["bf16-1"].optim)
        assert (cfg.train.eval_every, cfg.checkpoint.every, cfg.logging.wandb) == (0, None, "disabled")
    source = made["fp8-1"].data.sources[0]
    assert (source.path, source.folders, source.unique) == ("/a b", ["/it's"], True) and ".cuh" in source.suffixes


def test_sources_of_the_user_stay_and_else_installed_software_is_read():
    mine = compose(arguments(Options(output="out"), ["data.sources=[{path: /mine}]"]))
    assert [source.path for source in mine.data.sources] == ["/mine"]
    folders = installed_folders()
    assert folders and all(Path(folder).is_dir() for folder in folders)
    assert any((Path(folder) / "torch").is_dir() for folder in folders)
    source = compose(arguments(Options(output="out"), [])).data.sources[0]
    assert [source.path, *source.folders] == folders


@pytest.mark.parametrize(
    "argv, match",
    [
        ([], "output is empty"),
        (["output=OUT", "runs=[fp4-1]"], "fp4-1"),
        (["output=OUT", "runs=[fp8]"], "RECIPE-SEED"),
        (["output=OUT", "runs=[fp8-1,fp8-1]"], "twice"),
        (["output=USED"], "holds runs already"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_work(argv, match, tmp_path):
    (tmp_path / "used" / "runs").mkdir(parents=True)
    places = {"OUT": str(tmp_path / "out"), "USED": str(tmp_path / "used")}
    for word, place in places.items():
        argv = [argument.replace(word, place) for argument in argv]
    with pytest.raises(ConfigError, match=match):
        read(argv)
    assert not (tmp_path / "out").exists()
