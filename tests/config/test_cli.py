"""How a launch script ends: exit code, message and exit.json, alone and among ranks."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from deepv3.config import cli
from deepv3.errors import DataError, PeerLost

ROOT = Path(__file__).parents[2]
GOOD = ["+config=tiny", "train.steps=1"]


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder for one process outside of torchrun."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "run"


def ended(run_dir: Path) -> dict:
    """What exit.json says."""
    return json.loads((run_dir / "exit.json").read_text())


def raising(error: BaseException):
    """A run that fails with ``error``."""

    def run(cfg) -> None:
        raise error

    return run


def test_a_good_run_gets_the_validated_config_and_ends_with_0(run_dir):
    seen = []
    assert cli.execute(seen.append, [*GOOD, f"run_dir={run_dir}", "seed=5"]) == 0
    assert seen[0].seed == 5
    assert ended(run_dir) == {"code": 0, "reason": "done", "rank": 0, "step": None}


def test_the_last_step_of_the_metrics_is_recorded(run_dir):
    def run(cfg) -> None:
        (run_dir / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')

    cli.execute(run, [*GOOD, f"run_dir={run_dir}"])
    assert ended(run_dir)["step"] == 2


@pytest.mark.parametrize(
    "error, code",
    [(DataError("no such corpus"), 2), (PeerLost("rank 3 is gone"), 75), (KeyboardInterrupt(), 75), (KeyError("x"), 1)],
)
def test_each_kind_of_failure_has_its_exit_code(error, code, run_dir, capfd):
    assert cli.execute(raising(error), [*GOOD, f"run_dir={run_dir}"]) == code
    assert ended(run_dir)["code"] == code
    printed = capfd.readouterr().err
    assert ("Traceback" in printed) == (code == 1), "a traceback is for our bugs"
    assert len(printed.splitlines()) == 2 or code == 1
    assert printed.splitlines()[-1].startswith("next: ")


def test_a_full_disk_is_the_users_to_mend_whatever_was_being_written(run_dir, capfd):
    full = OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl")
    assert cli.execute(raising(full), [*GOOD, f"run_dir={run_dir}"]) == 2
    assert "cannot write runs/x/metrics.jsonl: No space left on device; free some space" in capfd.readouterr().err


@pytest.mark.parametrize("mistake", ["typo=1", "model.n_routed_experts=10", "precision=fp31"])
def test_a_mistake_is_told_before_anything_runs(mistake, run_dir, capfd):
    assert cli.execute(raising(AssertionError("called")), [*GOOD, f"run_dir={run_dir}", mistake]) == 2
    assert mistake.split("=")[0] in capfd.readouterr().err
    assert ended(run_dir)["code"] == 2


def test_an_end_replaces_that_of_the_attempt_before(run_dir):
    arguments = [*GOOD, f"run_dir={run_dir}"]
    assert cli.execute(raising(DataError("first")), arguments) == 2
    assert cli.execute(raising(PeerLost("second")), arguments) == 75
    assert ended(run_dir)["reason"] == "second"
    assert cli.execute(raising(PeerLost("third")), [*arguments, "typo=1"]) == 2
    assert "typo=1" in ended(run_dir)["reason"]
    assert cli.execute(lambda cfg: None, arguments) == 0
    assert ended(run_dir)["code"] == 0


def test_rank_0_alone_speaks_of_a_mistake_that_all_ranks_share(run_dir, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(cli, "SILENCE", 0.0)
    for rank in "3120":
        monkeypatch.setenv("RANK", rank)
        assert cli.execute(raising(AssertionError("called")), [*GOOD, f"run_dir={run_dir}", "typo=1"]) == 2
        assert (rank == "0") == ("typo=1" in capfd.readouterr().err)
    assert ended(run_dir)["rank"] == 0


def test_the_first_rank_to_fail_is_the_recorded_cause_and_the_same_failure_is_told_once(run_dir, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "4")
    failures = {"2": DataError("shard is empty"), "1": DataError("shard is empty"), "3": PeerLost("rank 2 is gone")}
    for rank, error in failures.items():
        monkeypatch.setenv("RANK", rank)
        cli.execute(raising(error), [*GOOD, f"run_dir={run_dir}"])
    assert ended(run_dir) == {"code": 2, "reason": "shard is empty", "rank": 2, "step": None}
    cause, following, consequence = capfd.readouterr().err.splitlines()
    assert (cause, consequence) == ("rank 2: DataError: shard is empty", "rank 3: PeerLost: rank 2 is gone")
    assert following.startswith("next: mend that, then ")


def test_success_on_rank_0_does_not_hide_a_failure_elsewhere(run_dir, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")

    def run_while_rank_1_fails(cfg) -> None:
        monkeypatch.setenv("RANK", "1")
        cli.record_exit(run_dir, 75, "rank 1 stopped")
        monkeypatch.setenv("RANK", "0")

    assert cli.execute(run_while_rank_1_fails, [*GOOD, f"run_dir={run_dir}"]) == 0
    assert ended(run_dir)["reason"] == "rank 1 stopped"


def test_a_run_folder_that_cannot_be_written_is_refused_before_anything_runs(run_dir, capfd):
    run_dir.parent.joinpath("file").write_text("")
    folder = f"{run_dir.parent}/file/run"
    assert cli.execute(raising(AssertionError("called")), [*GOOD, f"run_dir={folder}"]) == 2
    assert f"run_dir = {folder} cannot be written" in capfd.readouterr().err
    assert cli.execute(raising(AssertionError("called")), [*GOOD, f"run_dir={folder}", "typo=1"]) == 2
    assert "typo=1" in capfd.readouterr().err


def test_the_world_size_of_torchrun_is_validated(run_dir, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert cli.execute(raising(AssertionError("called")), [*GOOD, f"run_dir={run_dir}"]) == 2
    assert "train.global_batch_size = 16 is not divisible" in capfd.readouterr().err


def test_cfg_job_prints_the_config_and_runs_nothing(run_dir, capfd):
    assert cli.execute(raising(AssertionError("called")), [*GOOD, "--cfg", "job", f"run_dir={run_dir}"]) == 0
    assert f"run_dir: {run_dir}" in capfd.readouterr().out
    assert not run_dir.exists()
    assert cli.execute(raising(AssertionError("called")), [*GOOD, "--cfg"]) == 2


def test_help_lists_presets_and_parts(capfd):
    assert cli.execute(raising(AssertionError("called")), ["--help"]) == 0
    printed = capfd.readouterr().out
    for words in ("+config=v3_671b", "precision=bf16|fp32|fp8", "--cfg job"):
        assert words in printed


def test_a_launch_script_refuses_a_mistake_in_a_process_of_its_own(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "launch" / "pretrain.py"),
        "+config=tiny",
        "+typo=1",
        f"run_dir={tmp_path}/run",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    first, following = done.stderr.splitlines()
    assert first == "ConfigError: +typo=1: no such field. docs/config.md lists every field"
    assert following.startswith("next: mend that, then python /") and "launch/pretrain.py +config=tiny" in following
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
