"""Runs as processes: started together, measured, stopped, and their ends told as they were."""

import sys
import time

import pytest

from deepv3.errors import ResourceError
from deepv3.train import mps
from deepv3.train.side_by_side import STOPPED, Group, Trial, calibrate

# Stands in for launch/pretrain.py: a row every PACE seconds, STEPS of them; dies where it is told to.
SCRIPT = """
import json, os, sys, time
from pathlib import Path
given = dict(argument.split("=", 1) for argument in sys.argv[1:])
folder = Path(given["run_dir"][1:-1].replace(chr(92), ""))  # as Hydra's grammar reads it
folder.mkdir(parents=True)
(folder / "environment.json").write_text(json.dumps(dict(os.environ)))
for step in range(1, int(given["steps"]) + 1):
    if step == int(given.get("die", 0)):
        (folder / "exit.json").write_text(json.dumps({"code": 2, "reason": "gradient norm not finite"}))
        sys.exit(2)
    if step == int(given.get("crash", 0)):
        sys.exit("Killed by nobody")
    time.sleep(float(given.get("pace", 0)))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step}) + "\\n")
"""


@pytest.fixture
def group(tmp_path):
    """Makes groups of stand-ins."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def make(*trials, common=(), devices=(), environment=None):
        return Group(tmp_path / "it's", trials, list(common), list(devices), environment or {}, script)

    return make


def far():
    return time.monotonic() + 20


def test_runs_are_dealt_to_the_devices_in_turn_and_see_one_each(group, tmp_path):
    made = group(*(Trial(f"r{i}", []) for i in range(3)), common=["steps=1"], devices=["4", "6"])
    with made:
        assert made.wait(far())
    assert [trial.device for trial in made.trials] == ["4", "6", "4"]
    for trial in made.trials:
        seen = (made.folder / trial.name / "environment.json").read_text()
        assert f'"CUDA_VISIBLE_DEVICES": "{trial.device}"' in seen


def test_every_end_is_told_as_it_was(group):
    trials = Trial("good", []), Trial("bad", ["die=3"]), Trial("dead", ["crash=2"]), Trial("slow", ["pace=20"])
    with group(*trials, common=["steps=4"], environment={"SOME": "thing"}) as made:
        assert made.wait(far(), lambda: len(made.running()) == 1)
        assert not made.wait(time.monotonic())
    ends = [made.end(trial) for trial in trials]
    assert ends[0] == "done" and ends[3] == STOPPED
    assert ends[1] == "ended with code 2: gradient norm not finite"
    assert ends[2] == "ended with code 1: Killed by nobody"
    assert [made.steps(trial) for trial in trials] == [4, 2, 1, 0]
    assert '"SOME": "thing"' in (made.folder / "good" / "environment.json").read_text()


def test_leaving_the_group_in_an_error_ends_its_runs(group):
    slow = Trial("slow", ["pace=30", "steps=9"])
    with pytest.raises(RuntimeError, match="mine"), group(slow):
        raise RuntimeError("mine")
    assert not slow.running and slow.stopped


def test_the_slowest_run_sets_the_pace_and_all_are_ended(group):
    trials = Trial("quick", ["pace=0.01"]), Trial("slow", ["pace=0.05"])
    with group(*trials, common=["steps=1000"]) as made:
        pace = calibrate(made, far(), first=2, steps=10)
        assert not made.running()
    assert 0.04 <= pace.step < 0.5 and pace.startup >= 0.1


def test_a_run_that_dies_leaves_the_pace_to_the_others(group):
    trials = Trial("bad", ["die=4", "pace=0.01"]), Trial("good", ["pace=0.03"])
    with group(*trials, common=["steps=1000"]) as made:
        assert 0.02 <= calibrate(made, far(), first=2, steps=10).step < 0.5


def test_no_pace_where_all_die_or_time_is_over(group):
    with group(Trial("bad", ["die=1", "steps=9"])) as made, pytest.raises(ResourceError, match="gradient norm not"):
        calibrate(made, far())
    with group(Trial("slow", ["pace=5", "steps=9"])) as made, pytest.raises(ResourceError, match="raise limit"):
        calibrate(made, time.monotonic() + 0.3)


@pytest.mark.parametrize("code", [0, 1])
def test_the_service_is_used_where_it_starts_and_is_ended_afterwards(code, tmp_path, monkeypatch):
    control = tmp_path / mps.CONTROL
    control.write_text(f"#!{sys.executable}\nimport sys\nopen('{tmp_path}/log', 'a').write(repr(sys.argv[1:]) + "
                       f"sys.stdin.read() + '|')\nsys.exit({code})\n")  # fmt: skip
    control.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with mps.service() as variables:
        assert sorted(variables) == ([] if code else ["CUDA_MPS_LOG_DIRECTORY", "CUDA_MPS_PIPE_DIRECTORY"])
    assert (tmp_path / "log").read_text() == ("['-d']|" if code else "['-d']|[]quit -t 5\n|")


def test_without_the_service_there_is_nothing_to_set(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with mps.service() as variables:
        assert variables == {}
