"""Damaged checkpoints met by real processes: named, passed over for the one before; nothing else differs."""

import json

import jobs
import pytest

from deepv3.checkpoint import publish

EIGHT = ("train.steps=8", "checkpoint.every=2", "checkpoint.keep=3")


def _flip(path) -> None:
    """Turn one bit in the middle of a file."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 16]))


@pytest.fixture(scope="module")
def calm(corpus, tmp_path_factory):
    """The eighth step of two ranks that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("calm") / "run"
    job = jobs.start(run_dir, corpus, *EIGHT, world=2)
    assert job.wait(120) == [0, 0], job.output()
    return [{key: row[key] for key in jobs.EXACT} for row in jobs.rows(run_dir)]


@pytest.mark.parametrize("harm", ["flipped byte", "missing shard"])
def test_a_damaged_newest_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(tmp_path, corpus, calm, harm):
    run_dir = tmp_path / "run"
    assert jobs.start(run_dir, corpus, *EIGHT, "train.steps=6", world=2).wait(120) == [0, 0]
    shard = run_dir / "checkpoints/step-00000006/rank-00001.safetensors"
    _flip(shard) if harm == "flipped byte" else shard.unlink()
    asked = jobs.start(run_dir, corpus, *EIGHT, f"train.resume={shard.parent}", world=2)
    assert asked.wait(120) == [2, 2], asked.output()
    reason = jobs.ended(run_dir)["reason"]
    assert shard.name in reason and "step-00000004" in reason, reason  # what is wrong, and what to take instead
    (run_dir / "exit.json").unlink()
    job = jobs.start(run_dir, corpus, *EIGHT, world=2)
    assert job.wait(120) == [0, 0], job.output()
    assert shard.name in job.output() or shard.parent.name in job.output()
    assert [{key: row[key] for key in jobs.EXACT} for row in jobs.rows(run_dir)] == calm
    assert 8 in [publish.step_of(path) for path in publish.steps(run_dir / "checkpoints")]
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 0
