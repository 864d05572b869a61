"""Checkpoints written while training goes on: what is written is the state that was copied, whatever happens since."""

import os
import time

import pytest
import ranks
import torch
from standin import config, same, start

from deepv3 import dist
from deepv3.checkpoint import shards, snapshot, store
from deepv3.checkpoint.saver import Saver
from deepv3.checkpoint.snapshot import Snapshot
from deepv3.errors import CheckpointError, ResourceError
from deepv3.optim.ema import WeightAverage


class Slow:
    """shards.write with a wait in front of it; raises `error` instead on `rank`'s write number `at`."""

    def __init__(self, seconds=0.0, error=None, fails=False):
        self.seconds, self.error, self.fails, self.real = seconds, error, fails, shards.write

    def __enter__(self):
        def write(path, source):
            time.sleep(self.seconds)
            if self.fails:
                raise self.error
            return self.real(path, source)

        shards.write = write
        return self

    def __exit__(self, *_):
        shards.write = self.real


def _trained(run_dir, ema=True):
    cfg = config("bf16")
    run = start(cfg)
    average = WeightAverage(run.engine, 0.9) if ema else None
    return run, average, Saver(run_dir, run.engine, run.model, average, run.grid, cfg)


def _everything(run, average) -> dict:
    average.wait()
    averages = {f"{f.name}/{f.lo}": average.view(f).clone() for f in run.engine.fragments()}
    counters = torch.tensor(list(run.engine.counters().values()))
    return {"state": run.state(), "weights": run.weights(), "ema": averages, "bias": run.model.bias.clone(),
            "counters": counters, "random": torch.get_rng_state()}  # fmt: skip


def _move_on(run, average, number) -> None:
    run.step(number)
    run.model.bias += number
    average.update()
    torch.rand(number)


def _written_in_the_background(run_dir):
    run, average, saver = _trained(run_dir)
    _move_on(run, average, 1)
    before = _everything(run, average)
    with Slow(0.4):
        began = time.perf_counter()
        assert saver.start(1, {"progress": {"step": 1}}) is None
        stalled = time.perf_counter() - began
        for number in (2, 3):
            _move_on(run, average, number)
        moved = _everything(run, average)
        saved = saver.wait()
    client = store.load(saved.path, run.engine, run.model, average, run.grid)
    loaded = _everything(run, average)
    return same(before, loaded), same(moved, loaded), stalled < saved.seconds, saved.seconds >= 0.4, client, saved.size


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_written_is_the_state_at_the_copy_and_training_waits_for_the_copy_alone(tmp_path, world):
    for written, later, short, slow, client, size in ranks.run(world, _written_in_the_background, tmp_path):
        assert written and not later and short and slow and client == {"progress": {"step": 1}}
        folder = tmp_path / "checkpoints/step-00000001"
        assert size == sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _put_back(run_dir):
    run, average, saver = _trained(run_dir)
    assert saver.put_back() is None
    _move_on(run, average, 1)
    before = _everything(run, average)
    with Slow(0.3):
        saver.start(1, {"where": run.grid.rank})
        _move_on(run, average, 2)
        client = saver.put_back()  # even while the copy is being written
        restored = _everything(run, average)
        saver.wait()
    again = []
    for _ in range(2):
        _move_on(run, average, 2)
        again.append(_everything(run, average))
        saver.put_back()
    return same(before, restored), same(*again), client == {"where": run.grid.rank}


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_is_wound_back_to_the_copy_exactly_and_as_often_as_wanted(tmp_path, world):
    for restored, repeated, client in ranks.run(world, _put_back, tmp_path):
        assert restored and repeated and client


def _one_rank_fails(run_dir):
    run, average, saver = _trained(run_dir)
    outcomes = []
    for number, error in ((1, None), (2, OSError(28, "No space left on device")), (3, None)):
        _move_on(run, average, number)
        with Slow(error=error, fails=error is not None and run.grid.rank == 1):
            saver.start(number, {})
            try:
                outcomes.append(saver.wait().step)
            except (ResourceError, CheckpointError) as raised:
                outcomes.append(f"{type(raised).__name__}: {raised}")
    return outcomes, sorted(os.listdir(run_dir / "checkpoints"))


def test_a_save_that_fails_on_one_rank_fails_on_all_and_the_next_one_is_free(tmp_path):
    for (first, second, third), left in ranks.run(2, _one_rank_fails, tmp_path):
        assert (first, third) == (1, 3) and left == ["latest", "step-00000001", "step-00000003"]
        assert second.startswith("ResourceError: cannot write") and "(rank 1)" in second


def test_a_second_save_waits_for_the_first(tmp_path):
    run, average, saver = _trained(tmp_path)
    with Slow(0.2):
        saver.start(1, {})
        before = saver.start(2, {})
        assert before.step == 1 and before.path.is_dir()
        assert saver.save(3, {}).step == 3 and store.newest(tmp_path).name == "step-00000003"
    assert saver.finished() is None and saver.wait() is None
    dist.shutdown()


def test_a_failure_is_seen_without_waiting(tmp_path):
    run, average, saver = _trained(tmp_path)
    with Slow(error=OSError(5, "Input/output error"), fails=True):
        saver.start(1, {})
        deadline = time.monotonic() + 20
        while not saver.failed and time.monotonic() < deadline:
            time.sleep(0.01)
        assert saver.failed and saver.finished() is None
        with pytest.raises(CheckpointError, match="Input/output error"):
            saver.wait()
    assert not saver.failed
    dist.shutdown()


TENSORS = [
    ("a", torch.arange(100.0)),
    ("b", torch.arange(33).bfloat16()),
    ("c", torch.zeros(0)),
    ("d", torch.ones(2, 3)),
]


@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
def test_a_copy_is_the_file_that_the_tensors_themselves_would_be_whatever_its_pieces(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(snapshot, "CHUNK", chunk)
    held = Snapshot()
    tensors = [(key, tensor.clone()) for key, tensor in TENSORS]
    held.take(tensors)
    shards.write(tmp_path / "copied", held)
    shards.write(tmp_path / "live", shards.Live(TENSORS))
    assert (tmp_path / "copied").read_bytes() == (tmp_path / "live").read_bytes()
    assert held.size == (tmp_path / "live").stat().st_size
    for _, tensor in tensors:
        tensor.fill_(3)
    held.put_back(tensors)
    assert all(same(tensor, original) for (_, tensor), (_, original) in zip(tensors, TENSORS))


def test_the_host_holds_one_copy_however_often_it_is_taken():
    held = Snapshot()
    for _ in range(3):
        held.take(TENSORS)
        assert sum(chunk.numel() for chunk in held._chunks) == sum(tensor.nbytes for _, tensor in TENSORS)


def test_a_host_without_memory_for_the_copy_is_told_what_to_set(monkeypatch):
    def full(*_, **__):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(ResourceError, match="no host memory for a copy .*checkpoint.asynchronous=false"):
        Snapshot().take(TENSORS)


# -- which checkpoints stay, and where they lie ------------------------------------------------------------------------


def test_every_nth_checkpoint_is_kept_beside_the_newest(tmp_path):
    run, _, saver = _trained(tmp_path, ema=False)
    saver.cfg.checkpoint.keep, saver.cfg.checkpoint.keep_every = 2, 3
    for step in range(1, 9):
        saver.save(step, {})
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == [f"step-{step:08d}" for step in (3, 6, 7, 8)]
    dist.shutdown()


def _on_its_own_disk(folder, act):
    """On a rank that is the first of its node: the run folder exists on its own disk only."""
    os.environ["LOCAL_RANK"] = "0"
    mine = folder / f"node-{os.environ['RANK']}"
    run, average, saver = _trained(mine)
    if act == "save":
        _move_on(run, average, 1)
        saver.start(1, {})
        saver.wait()
        return _everything(run, average), sorted(os.listdir(mine / "checkpoints/step-00000001"))
    if act == "lose" and run.grid.rank == 1:
        os.unlink(mine / "checkpoints/step-00000001/rank-00001.safetensors")
    path = store.newest(mine, run.grid)
    store.load(path, run.engine, run.model, average, run.grid)
    return _everything(run, average)


def test_nodes_with_disks_of_their_own_save_and_go_on_together(tmp_path):
    saved = ranks.run(2, _on_its_own_disk, tmp_path, "save")
    assert [files for _, files in saved] == [
        ["manifest.json", "rank-00000.safetensors"],
        ["manifest.json", "rank-00001.safetensors"],
    ]
    loaded = ranks.run(2, _on_its_own_disk, tmp_path, "load")
    assert all(same(before, after) for (before, _), after in zip(saved, loaded))


def test_a_shard_that_no_node_has_is_named(tmp_path):
    ranks.run(2, _on_its_own_disk, tmp_path, "save")
    with pytest.raises(AssertionError, match="rank-00001.safetensors: missing, so the checkpoint is incomplete"):
        ranks.run(2, _on_its_own_disk, tmp_path, "lose")


def test_another_layout_on_disks_of_nodes_names_the_shard_that_lies_elsewhere(tmp_path):
    ranks.run(2, _on_its_own_disk, tmp_path, "save")
    with pytest.raises(AssertionError, match="rank-00001.safetensors: missing"):
        ranks.run(1, _on_its_own_disk, tmp_path, "load")
