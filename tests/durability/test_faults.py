"""Faults put into real runs: each is survived, or ends the run with a code and a sentence that names what happened."""

import json
import signal
import time

import jobs
import pytest

from deepv3.checkpoint import publish

EIGHT = ("train.steps=8", "checkpoint.every=2")


def _reach(job: jobs.Job, step: int) -> None:
    deadline = time.monotonic() + 120
    while job.step() < step and time.monotonic() < deadline:
        assert any(process.exitcode is None for process in job.ranks), job.output()
        time.sleep(0.01)


def _events(run_dir, kind: str) -> list[str]:
    return [row["text"] for row in jobs.rows(run_dir, "events.jsonl") if row["kind"] == kind]


def _published(run_dir) -> list[int]:
    return sorted(publish.step_of(path) for path in publish.steps(run_dir / "checkpoints"))


@pytest.fixture(scope="module")
def calm(corpus, tmp_path_factory):
    """Eight steps on two ranks without a fault."""
    run_dir = tmp_path_factory.mktemp("calm") / "run"
    job = jobs.start(run_dir, corpus, *EIGHT, world=2)
    assert job.wait(120) == [0, 0], job.output()
    return [{key: row[key] for key in jobs.EXACT} for row in jobs.rows(run_dir)]


def _figures(run_dir) -> list[dict]:
    return [{key: row[key] for key in jobs.EXACT} for row in jobs.rows(run_dir)]


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_after_a_save_and_the_run_goes_on_from_it(tmp_path, corpus, calm, number):
    run_dir = tmp_path / "run"
    job = jobs.start(run_dir, corpus, "train.steps=8", "checkpoint.every=0", world=2, fault="pause:seconds=0.1")
    _reach(job, 2)
    job.kill(1, number)
    assert job.wait(60) == [75, 75], job.output()
    stopped = jobs.ended(run_dir)
    assert stopped["code"] == 75 and "state saved" in stopped["reason"]
    assert _published(run_dir) == [job.step()] and 2 <= job.step() < 8
    assert jobs.start(run_dir, corpus, *EIGHT, world=2).wait(120) == [0, 0]
    assert _figures(run_dir) == calm


def test_a_signal_before_the_first_step_leaves_at_once(tmp_path, corpus):
    run_dir = tmp_path / "run"
    job = jobs.start(run_dir, corpus, "train.steps=8", fault="build:seconds=30")
    while not (run_dir / "building").exists():
        time.sleep(0.01)
    job.kill(0, signal.SIGTERM)
    assert job.wait(20) == [75]
    assert "before the first step" in jobs.ended(run_dir)["reason"]


def test_after_a_peers_death_a_signal_saves_nothing_and_the_dead_rank_is_named(tmp_path, corpus):
    """The survivor's main thread is stuck, as it would be in a device collective, and cannot run a handler's wish."""
    run_dir = tmp_path / "run"
    job = jobs.start(run_dir, corpus, "train.steps=8", "checkpoint.every=100", world=2, fault="hang:rank=0,step=3")
    _reach(job, 2)
    time.sleep(1.5)
    job.kill(1)
    time.sleep(0.5)
    began = time.monotonic()
    job.kill(0, signal.SIGTERM)
    assert job.wait(60) == [75, -9], job.output()
    assert time.monotonic() - began < 5  # 2.1 to 2.5 s with two cores busy
    assert jobs.ended(run_dir)["reason"].startswith("rank 1 died in step 3")
    assert _published(run_dir) == []


# -- ranks -------------------------------------------------------------------------------------------------------------


def test_a_hung_rank_is_named_with_step_and_place_and_stacks_are_kept(tmp_path, corpus):
    run_dir = tmp_path / "run"
    overrides = ("train.steps=8", "train.hang_seconds=5", "checkpoint.every=2")
    job = jobs.start(run_dir, corpus, *overrides, world=2, fault="hang:rank=1,step=4")
    assert job.wait(120) == [75, 75], job.output()
    reason = jobs.ended(run_dir)["reason"]
    assert reason.startswith("rank 1 hangs in step 4, in sleeping (durability/injected.py") and "5 s" in reason
    assert "in sleeping" in (run_dir / "stacks/rank-00001.txt").read_text()
    assert (run_dir / "stacks/rank-00000.txt").exists()
    assert reason in _events(run_dir, "alarm")


def test_a_killed_rank_is_named_by_those_left(tmp_path, corpus):
    run_dir = tmp_path / "run"
    job = jobs.start(run_dir, corpus, "train.steps=99", world=2, fault="pause:seconds=0.1")
    _reach(job, 2)
    time.sleep(1.5)
    job.kill(1)
    assert job.wait(60) == [75, -9], job.output()
    assert jobs.ended(run_dir)["reason"].startswith("rank 1 died in step")


def test_a_mistake_of_ours_on_one_rank_is_its_own_and_the_others_name_it(tmp_path, corpus):
    run_dir = tmp_path / "run"
    job = jobs.start(run_dir, corpus, "train.steps=8", world=2, fault="bug:rank=1,step=2")
    assert job.wait(60) == [75, 1], job.output()
    assert jobs.ended(run_dir)["code"] == 1 and "a mistake of ours" in jobs.ended(run_dir)["reason"]
    assert "rank 1 left in step 2: KeyError" in job.output()


def test_a_slow_rank_is_named(tmp_path, corpus):
    run_dir = tmp_path / "run"
    job = jobs.start(run_dir, corpus, "train.steps=52", "checkpoint.every=0", world=2, fault="slow:rank=1,seconds=0.2")
    assert job.wait(120) == [0, 0], job.output()
    (alarm,) = _events(run_dir, "alarm")
    assert alarm.startswith("slow: rank 1 (0.") and "over the last 50 steps" in alarm


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_a_nan_on_one_rank_skips_the_step_for_all_and_is_counted(tmp_path, corpus):
    run_dir = tmp_path / "run"
    job = jobs.start(run_dir, corpus, *EIGHT, world=2, fault="nan:rank=1,step=3")
    assert job.wait(120) == [0, 0], job.output()
    assert [row["step"] for row in jobs.rows(run_dir) if row["skipped"]] == [3]
    assert jobs.rows(run_dir)[2]["grad_norm"] is None and jobs.rows(run_dir)[7]["grad_norm"] > 0
    manifest = json.loads((run_dir / "checkpoints/step-00000008/manifest.json").read_text())["content"]
    assert manifest["counters"] == {"applied_steps": 7, "skipped_steps": 1}
    assert len(_events(run_dir, "skip")) == 1


def test_numbers_that_stay_infinite_end_the_run(tmp_path, corpus):
    run_dir = tmp_path / "run"
    job = jobs.start(run_dir, corpus, *EIGHT, "train.max_skipped_steps=3", fault="nan:rank=0,step=0")
    assert job.wait(60) == [75], job.output()
    assert "not finite for 3 steps in a row up to step 3" in jobs.ended(run_dir)["reason"]


SPIKED = ("train.steps=24", "checkpoint.every=4", "train.spike_window=16")


def test_a_spike_rewinds_to_the_last_copy_and_its_data_is_passed_over(tmp_path, corpus):
    """Step 19 begins with sample 72; the copy before it is that of step 16."""
    run_dir, log = tmp_path / "run", tmp_path / "samples"
    fault = f"spike:samples=72 log:path={log}"
    job = jobs.start(run_dir, corpus, *SPIKED, "train.spike=rewind", world=2, fault=fault)
    assert job.wait(120) == [0, 0], job.output()
    assert [row["step"] for row in jobs.rows(run_dir)] == list(range(1, 25))
    (rewind,) = _events(run_dir, "rewind")
    assert "back to step 16; samples 64 to 75 are passed over for good" in rewind and "loss" in rewind
    firsts = list(dict.fromkeys(row["samples"] for row in jobs.rows(tmp_path, "samples-0")))
    assert firsts == list(range(0, 108, 4))  # on and on: nothing twice
    assert all(row["loss_main"] < 10 for row in jobs.rows(run_dir))
    # from the same copy and the later data, the state is what a plain run makes of them
    manifest = json.loads((run_dir / "checkpoints/step-00000024/manifest.json").read_text())["content"]
    assert manifest["clients"][0]["progress"] == {"step": 24, "tokens": 24 * 128, "samples": 108}


def test_a_spike_is_told_or_not_as_asked(tmp_path, corpus):
    for mode, alarms in (("warn", 1), ("off", 0)):
        run_dir = tmp_path / mode
        job = jobs.start(run_dir, corpus, *SPIKED, f"train.spike={mode}", fault="spike:samples=72")
        assert job.wait(60) == [0], job.output()
        assert len(_events(run_dir, "alarm")) == alarms and not _events(run_dir, "rewind")
        assert jobs.rows(run_dir)[18]["loss_main"] > 10


# -- disks -------------------------------------------------------------------------------------------------------------


def test_one_failed_save_costs_an_alarm_and_the_next_one_stands(tmp_path, corpus, calm):
    run_dir = tmp_path / "run"
    job = jobs.start(run_dir, corpus, *EIGHT, world=2, fault="disk:rank=1,errno=28,from=1,to=2 pause:seconds=0.1")
    assert job.wait(120) == [0, 0], job.output()
    (alarm,) = _events(run_dir, "alarm")
    assert "a checkpoint was not saved" in alarm and "No space left on device" in alarm and "(rank 1)" in alarm
    assert _published(run_dir) == [6, 8] and _figures(run_dir) == calm


def test_a_disk_that_stays_full_ends_the_run_and_the_older_checkpoint_stands(tmp_path, corpus, calm):
    run_dir = tmp_path / "run"
    job = jobs.start(run_dir, corpus, *EIGHT, world=2, fault="disk:rank=1,errno=28,from=1,to=99 pause:seconds=0.1")
    assert job.wait(120) == [2, 2], job.output()
    assert "No space left on device" in jobs.ended(run_dir)["reason"] and jobs.ended(run_dir)["code"] == 2
    assert _published(run_dir) == [2] and "Traceback" not in job.output()
    assert not list((run_dir / "checkpoints").glob(".step-*"))
    assert jobs.start(run_dir, corpus, *EIGHT, world=2).wait(120) == [0, 0]
    assert _figures(run_dir) == calm


def test_a_run_folder_that_cannot_be_written_is_refused_by_name(corpus, tmp_path):
    (tmp_path / "file").write_text("in the way")
    job = jobs.start(tmp_path / "file/run", corpus, "train.steps=2")
    assert job.wait(30) == [2]
    assert "run_dir" in job.output() and "give another run_dir" in job.output() and "Traceback" not in job.output()


# -- other numbers of ranks --------------------------------------------------------------------------------------------


def test_fewer_and_more_ranks_go_on_with_the_same_samples(tmp_path, corpus):
    """Two ranks, then one, then four: sample by sample the run of one rank that was never stopped."""
    batch = ("train.global_batch_size=8", "checkpoint.every=0", "train.micro_batch_size=1")
    for name, stages in (("changing", ((2, 3), (1, 6), (4, 9))), ("calm", ((1, 9),))):
        for world, steps in stages:
            fault = f"log:path={tmp_path / name}-{world}"
            job = jobs.start(tmp_path / name, corpus, *batch, f"train.steps={steps}", world=world, fault=fault)
            assert job.wait(120) == [0] * world, job.output()
    drawn: dict[int, list[str]] = {}
    for world in (2, 1, 4):
        ranks = [jobs.samples(tmp_path / f"changing-{world}-{rank}") for rank in range(world)]
        for step in ranks[0]:  # rank r has the samples n with n % world == r
            assert step not in drawn
            drawn[step] = [sha for row in zip(*(rank[step] for rank in ranks)) for sha in row]
    assert drawn == jobs.samples(tmp_path / "calm-1-0")
    for ours, theirs in zip(jobs.rows(tmp_path / "changing"), jobs.rows(tmp_path / "calm"), strict=True):
        assert abs(ours["loss"] - theirs["loss"]) < 1e-4
