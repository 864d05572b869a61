"""Sweeps: what is expanded, where each job writes, what happens after a failure, and what the table says."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.text import Text

from deepv3.errors import ConfigError
from deepv3.train import sweep
from deepv3.train.sweep import expand, plan, run_sweep

# Stands in for launch/pretrain.py: leaves what a run leaves; fails or stops where its seed says so.
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
from deepv3.config.compose import compose
cfg = compose(sys.argv[1:])
folder = Path(cfg.run_dir)
folder.mkdir(parents=True, exist_ok=True)
(folder / "argv.json").write_text(json.dumps([sys.argv[1:], os.environ.get("WORLD_SIZE")]))
if cfg.seed == 13:
    (folder / "exit.json").write_text('{"code": 2, "reason": "unlucky", "rank": 0, "step": null}')
    sys.exit(1)
if cfg.seed == 14:
    os._exit(9)
if cfg.seed == 15:
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(0.2)
loss = 10 * cfg.model.bias_update_speed + cfg.seed
for step in (1, 2):
    with open(folder / "metrics.jsonl", "a") as file:
        row = {"step": step, "loss_main": loss, "tokens_per_second": 1000.0, "max_vio": 0.5}
        file.write(json.dumps(row) + "\\n")
(folder / "validation.jsonl").write_text(json.dumps({"step": 2, "val_loss": loss + 1}) + "\\n")
(folder / "exit.json").write_text('{"code": 0, "reason": "done", "rank": 0, "step": 2}')
"""


def plain(processes: int) -> list[str]:
    """A launcher without torchrun."""
    return [sys.executable]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The stand-in's path; outside of torchrun."""
    monkeypatch.delenv("RANK", raising=False)
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def jobs(folder: Path) -> list[dict]:
    """The rows of sweep.json."""
    return json.loads((folder / "sweep.json").read_text())["jobs"]


def test_lists_choices_and_ranges_expand_to_their_product_last_key_fastest():
    found = [
        job.swept for job in expand(["+config=tiny", "seed=range(1,4)", "train.steps=choice(5,6)", "data.seq_len=64"])
    ]
    assert found == [{"seed": s, "train.steps": n} for s in "123" for n in "56"]


def test_lists_and_presets_can_be_swept():
    found = expand(["+config=tiny,mini", "train.finish=[export],[]"])
    assert [job.overrides for job in found][:2] == [
        ["+config=tiny", "train.finish=[export]"],
        ["+config=tiny", "train.finish=[]"],
    ]


@pytest.mark.parametrize("argument", ["model=glob(*)", "optim.lr=interval(0,1)", "run_dir=a,b", "seed=range("])
def test_what_cannot_be_expanded_is_refused(argument):
    with pytest.raises(ConfigError, match=argument.split("=")[0]):
        expand(["+config=tiny", argument])


def test_every_job_has_a_folder_of_its_own_below_the_sweeps():
    found = plan(["+config=tiny", "model.bias_update_speed=0,0.001", "seed=1"], "script.py")
    assert [job.run_dir for job in found.jobs] == [
        "runs/tiny-sweep/0-bias_update_speed-0",
        "runs/tiny-sweep/1-bias_update_speed-0.001",
    ]
    assert plan(["+config=tiny", "run_dir=/there"], "script.py").jobs[0].run_dir == "/there/0-run"


def test_a_sweep_runs_every_job_and_compares_them(script, tmp_path, capfd):
    folder = tmp_path / "it's a sweep"
    quoted = str(folder).replace("'", "\\'")
    argv = ["-m", "+config=tiny", "seed=1,2", "model.bias_update_speed=0,0.5", f"run_dir='{quoted}'"]
    assert run_sweep(argv, script, plain) == 0
    rows = jobs(folder)
    assert [row["loss"] for row in rows] == [1.0, 6.0, 2.0, 7.0]
    assert [row["val_loss"] for row in rows] == [2.0, 7.0, 3.0, 8.0]
    assert {(row["step"], row["tokens_per_second"], row["max_vio"], row["code"]) for row in rows} == {
        (2, 1000.0, 0.5, 0)
    }
    printed = capfd.readouterr().out
    for words in ("model.bias_update_speed", "val loss", "6.0000", "1,000", "0.500", "done"):
        assert words in printed


def test_lists_stand_in_the_table_as_they_were_written():
    rows = [sweep.Job({"train.finish": "[export]"}, [], reason="[bold]"), sweep.Job({"train.finish": "[]"}, [])]
    cells = [list(column.cells) for column in sweep.table(sweep.Sweep("s.py", Path("x"), rows)).columns]
    assert Text.from_markup(cells[1][0]).plain == "[export]" and Text.from_markup(cells[-1][0]).plain == "[bold]"


def test_a_failed_job_is_listed_and_the_next_one_runs(script, tmp_path, capfd):
    folder = tmp_path / "sweep"
    assert (
        run_sweep(["+config=tiny", "model.bias_update_speed=0.5", "seed=1,13,14,2", f"run_dir={folder}"], script, plain)
        == 2
    )
    rows = jobs(folder)
    assert [row["code"] for row in rows] == [0, 2, 9, 0]
    assert [row["loss"] for row in rows] == [6.0, None, None, 7.0]
    printed = capfd.readouterr().out
    assert "failed (2): unlucky" in printed and "failed (9): ended with code 9 and no exit.json" in printed


def test_a_combination_that_cannot_work_is_listed_without_being_started(script, tmp_path, capfd):
    folder = tmp_path / "sweep"
    assert run_sweep(["+config=tiny", "model.n_routed_experts=10,16", f"run_dir={folder}"], script, plain) == 2
    assert [row["code"] for row in jobs(folder)] == [2, 0]
    assert "model.n_routed_experts = 10 is not divisible by model.n_group = 4" in jobs(folder)[0]["reason"]
    assert [path.name for path in sorted(folder.iterdir())] == ["1-n_routed_experts-16", "sweep.json"]


@pytest.mark.parametrize("mistake", ["typo=1", "model.n_routed_experts=10,11", "config=tiny,mini"])
def test_a_sweep_of_which_no_job_can_work_is_refused(mistake, script, tmp_path, capfd):
    assert run_sweep(["+config=tiny", mistake, f"run_dir={tmp_path}/sweep"], script, plain) == 2
    assert mistake.split("=")[0] in capfd.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_under_torchrun_is_refused(script, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "0")
    assert run_sweep(["-m", "+config=tiny", "seed=1,2"], script, plain) == 2
    assert "a sweep starts torchrun itself" in capfd.readouterr().err


def test_after_an_interrupt_no_further_job_starts(script, tmp_path, capfd):
    before = signal.getsignal(signal.SIGINT)
    assert run_sweep(["+config=tiny", "seed=1,15,2", f"run_dir={tmp_path}/sweep"], script, plain) == 75
    assert [row["reason"] for row in jobs(tmp_path / "sweep")] == ["done", "done", "not started"]
    assert signal.getsignal(signal.SIGINT) is before


def test_the_outcome_of_an_earlier_attempt_does_not_count(script, tmp_path):
    argv = ["+config=tiny", "seed=14", f"run_dir={tmp_path}/sweep"]
    old = tmp_path / "sweep" / "0-run" / "exit.json"
    old.parent.mkdir(parents=True)
    old.write_text('{"code": 0, "reason": "done", "rank": 0, "step": 2}')
    assert run_sweep(argv, script, plain) == 9


def test_success_on_rank_0_does_not_hide_torchruns_failure(tmp_path):
    (tmp_path / "exit.json").write_text('{"code": 0, "reason": "done", "rank": 0, "step": 2}')
    job = sweep.Job({}, [])
    sweep._read_outcome(job, tmp_path, 1)
    assert job.failed() and job.code == 1


def test_a_job_runs_under_torchrun_with_the_processes_of_its_cluster(script, tmp_path):
    argv = ["+config=tiny", "cluster.nproc_per_node=2", f"run_dir={tmp_path}/sweep"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    code = f"import sys; from deepv3.train.sweep import run_sweep; sys.exit(run_sweep({argv!r}, {script!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    arguments, world = json.loads((tmp_path / "sweep" / "0-run" / "argv.json").read_text())
    assert world == "2"
    assert arguments == ["+config=tiny", "cluster.nproc_per_node=2", f"run_dir='{tmp_path}/sweep/0-run'"]
