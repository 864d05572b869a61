"""SIGKILL at random instants of real runs: whatever is left on the disk, the next start goes on from the last published
checkpoint, and the run ends as if nothing had happened."""

import random
import signal
import time
from pathlib import Path

import jobs
import pytest

from deepv3.checkpoint import publish, store
from deepv3.dist import Grid

PATIENCE = 300.0
BATCH = "train.global_batch_size=8"  # for up to four data ranks


def _published(run_dir: Path) -> int:
    """Step of the newest published checkpoint; every published one is whole."""
    found = publish.steps(run_dir / "checkpoints")
    for path in found:
        assert not store.problems(path, Grid(1, 0)), path
    return publish.step_of(found[0]) if found else 0


def _wait_for(job: jobs.Job, draw: random.Random, done: int, steps: int) -> bool:
    """Until an instant to kill at: somewhere in the start of a process, or in one of the next steps or saves."""
    deadline = time.monotonic() + PATIENCE
    if draw.random() < 0.15:
        time.sleep(draw.uniform(0.0, 1.5))
        return True
    target = min(done + draw.randint(1, 4), steps)
    while job.step() < target and time.monotonic() < deadline:
        if all(process.exitcode is not None for process in job.ranks):
            return False
        time.sleep(0.005)
    time.sleep(draw.expovariate(1 / 0.06))
    return True


def storm(run_dir: Path, corpus: Path, kills: int, steps: int, world: int, seed: int) -> dict[str, int]:
    """Start a run again and again and kill it `kills` times, then let it end. Returns what happened, counted."""
    draw, count = random.Random(seed), {"kills": 0, "all": 0, "one": 0, "half-written": 0, "named": 0, "ended": 0}
    count["at rendezvous"] = 0
    overrides = [f"train.steps={steps}", "checkpoint.every=1", "checkpoint.keep=2", BATCH]
    log = f"log:path={run_dir}-samples"
    published = 0
    while count["kills"] < kills:
        job = jobs.start(run_dir, corpus, *overrides, world=world, fault=f"{log} pause:seconds=0.02")
        if _wait_for(job, draw, published, steps):
            victim = None if draw.random() < 0.5 else draw.randrange(world)
            alive = [process.exitcode is None for process in job.ranks]
            job.kill(victim)
            if victim is not None:
                for rank in job.join(
                    30
                ):  # as torchrun does: some wait at the rendezvous for a rank that died on its way
                    job.kill(rank, signal.SIGTERM)
                    count["at rendezvous"] += 1
            codes = job.wait(60)
            if (alive if victim is None else alive[victim : victim + 1]) != [False] * (world if victim is None else 1):
                count["kills"] += 1
                count["all" if victim is None else "one"] += 1
            survivors = [code for rank, code in enumerate(codes) if victim is not None and rank != victim]
            assert set(survivors) <= {75, 0, -signal.SIGTERM}, f"{codes}\n{job.output()}"
            count["named"] += bool(survivors) and f"rank {victim}" in job.output()
        else:
            assert job.wait(PATIENCE) == [0] * world, job.output()
        count["half-written"] += any((run_dir / "checkpoints").glob(".step-*"))
        now = _published(run_dir)
        assert now >= published, f"published step {published} was lost: {now}"
        published = now
        if published == steps:  # the storm outlived the run: it becomes a longer one
            count["ended"] += 1
            steps += 10
            overrides[0] = f"train.steps={steps}"
    job = jobs.start(run_dir, corpus, *overrides, world=world, fault=log)
    assert job.wait(PATIENCE) == [0] * world, job.output()
    return count | {"steps": steps}


def compare(run_dir: Path, corpus: Path, steps: int, world: int) -> None:
    """The storm's run equals one without faults: figures bit for bit, and the samples of every step."""
    calm = run_dir.with_name(run_dir.name + "-calm")
    log = f"log:path={calm}-samples"
    job = jobs.start(calm, corpus, f"train.steps={steps}", "checkpoint.every=0", BATCH, world=world, fault=log)
    assert job.wait(PATIENCE) == [0] * world, job.output()
    figures = [[{key: row[key] for key in jobs.EXACT} for row in jobs.rows(folder)] for folder in (run_dir, calm)]
    assert len(figures[0]) == steps and figures[0] == figures[1]
    for rank in range(world):
        seen = {name: jobs.samples(Path(f"{name}-samples-{rank}")) for name in (run_dir, calm)}
        assert seen[run_dir] == seen[calm] and sorted(seen[calm]) == list(range(1, steps + 1))


def test_eight_kills_lose_nothing(tmp_path, corpus):
    count = storm(tmp_path / "run", corpus, kills=8, steps=24, world=2, seed=1)
    assert count["kills"] == 8 and count["one"] and count["all"]
    compare(tmp_path / "run", corpus, count["steps"], world=2)
    assert not list((tmp_path / "run/checkpoints").glob(".step-*"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_two_hundred_kills_lose_nothing(tmp_path, corpus, seed, record_property):
    world = 1 + seed % 3 if seed % 3 < 2 else 4
    count = storm(tmp_path / "run", corpus, kills=20, steps=60, world=world, seed=100 + seed)
    record_property("storm", count)
    print(f"world {world}: {count}")
    assert count["kills"] == 20
    compare(tmp_path / "run", corpus, count["steps"], world)
