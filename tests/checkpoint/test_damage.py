"""What is on the disk after faults, and what is read of it: nothing half-written, nothing damaged, never in silence."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from standin import config, same, start

from deepv3 import dist
from deepv3.checkpoint import find, manifest, publish, shards, store
from deepv3.errors import CheckpointError, ResourceError

SHARD = "rank-00000.safetensors"


class Saver:
    """A run on one rank that saves when told."""

    def __init__(self, run_dir: Path):
        self.dir, self.cfg = run_dir, config()
        self.cfg.run_dir, self.cfg.checkpoint.keep = str(run_dir), 2
        self.run = start(self.cfg)
        self.at = 0

    def save(self, *numbers: int) -> Path:
        for number in numbers:
            self.run.step(number)
            self.at = number
            path = store.save(self.dir, number, self.run.engine, self.run.model, None, self.run.grid, self.cfg, {})
        return path

    def load(self, path: Path) -> None:
        store.load(path, self.run.engine, self.run.model, None, self.run.grid)

    def published(self) -> list[str]:
        return sorted(p.name for p in (self.dir / "checkpoints").iterdir())


@pytest.fixture
def saver(tmp_path):
    yield Saver(tmp_path)
    dist.shutdown()


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    path.write_bytes(data)


def _edit(path: Path, change) -> None:
    """Change the manifest's content and make its hash right again."""
    outer = json.loads(path.read_text())
    change(outer["content"])
    outer["sha256"] = manifest._digest(outer["content"])
    path.write_text(json.dumps(outer))


DAMAGE = {
    "flipped bit in a shard": (lambda f: _flip(f / SHARD), f"{SHARD}: content does not match its SHA-256"),
    "truncated shard": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-1]), f"{SHARD}: has .* bytes"),
    "missing shard": (lambda f: (f / SHARD).unlink(), f"{SHARD}: missing, so the checkpoint is incomplete"),
    "missing manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: missing, so .* is no complete"),
    "flipped bit in the manifest": (lambda f: _flip(f / "manifest.json"), "manifest.json: "),
    "empty manifest": (lambda f: (f / "manifest.json").write_text(""), "manifest.json: cannot be read"),
    "foreign manifest": (lambda f: (f / "manifest.json").write_text("[1]"), "is not a manifest of ours"),
    "later version": (
        lambda f: (f / "manifest.json").write_text(json.dumps({"format": manifest.FORMAT, "version": 99})),
        "version 99, this program reads 1",
    ),
    "path out of the folder": (
        lambda f: _edit(f / "manifest.json", lambda c: c["shards"][0].update(name="../../etc/passwd")),
        "'../../etc/passwd' is no shard's name",
    ),
    "a slice too few": (
        lambda f: _edit(f / "manifest.json", lambda c: c["shards"][0]["slices"].pop(0)),
        "first.weight: slices end at element 0, the tensor has 481",
    ),
    "a slice twice": (
        lambda f: _edit(f / "manifest.json", lambda c: c["shards"][0]["slices"].append(["first.weight", 0, 481])),
        "first.weight: elements 0 to 481 are stored twice",
    ),
    "a field missing": (lambda f: _edit(f / "manifest.json", lambda c: c.pop("shapes")), "does not follow the format"),
    "a field of another type": (
        lambda f: _edit(f / "manifest.json", lambda c: c.update(shards=3)), "does not follow the format"
    ),
    "a slice that is not in its shard": (
        lambda f: _edit(f / "manifest.json", lambda c: c["shards"][0]["slices"].__setitem__(0, ["first.weight", 0, 4])),
        "does not follow the format",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_previous_checkpoint_is_taken(saver, caplog, kind):
    older, damaged = saver.save(1), saver.save(2)
    act, words = DAMAGE[kind]
    act(damaged)
    with pytest.raises(CheckpointError, match=words):
        saver.load(damaged)
    with caplog.at_level(logging.WARNING):
        assert store.newest(saver.dir, saver.run.grid) == older
    assert "step-00000002 passed over" in caplog.text


def test_a_manifest_that_promises_what_its_shard_has_not_is_refused(saver):
    def promise(content):
        content["shapes"]["norm.weight"] = [38]
        next(s for s in content["shards"][0]["slices"] if s[0] == "norm.weight")[2] = 38
        content["shards"][0]["buffers"].append("ghost")

    path = saver.save(1)
    _edit(path / "manifest.json", promise)
    reader = store.Reader(path)
    with pytest.raises(CheckpointError, match="norm.weight/0 has no elements 0 to 38"):
        reader.read("norm.weight")
    with pytest.raises(CheckpointError, match="has no tensor buffer/ghost"):
        reader.buffer("ghost")


def test_a_failed_load_changes_nothing(saver):
    path = saver.save(1)
    saver.run.step(2)
    before = saver.run.state()
    _flip(path / SHARD)
    with pytest.raises(CheckpointError):
        saver.load(path)
    assert same(before, saver.run.state())


def test_where_every_checkpoint_is_damaged_the_run_does_not_start_afresh_in_silence(saver):
    for path in (saver.save(1), saver.save(2)):
        _flip(path / SHARD)
    with pytest.raises(CheckpointError, match=r"none of its 2 checkpoints can be read:(.|\n)*start afresh in another"):
        store.newest(saver.dir)


def test_a_run_without_checkpoints_has_no_newest(tmp_path):
    assert store.newest(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    assert store.newest(tmp_path) is None


def test_a_save_cut_off_at_any_point_is_never_read_and_cleared_by_the_next(saver, monkeypatch):
    first = saver.save(1)

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    for module, name in ((shards, "write"), (publish, "sync_folder"), (Path, "rename")):
        monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None)  # a kill cleans nothing up
        monkeypatch.setattr(module, name, killed)
        with pytest.raises(Killed):
            saver.save(2)
        monkeypatch.undo()
        (left,) = (saver.dir / "checkpoints").glob(".step-00000002.*.partial")
        assert store.newest(saver.dir) == first
        saver.run.step(2)
        shutil.rmtree(left)
    (saver.dir / "checkpoints/.step-00000009.partial").mkdir()
    saver.save(3)
    assert saver.published() == ["latest", "step-00000001", "step-00000003"]


def test_the_newest_keep_are_kept(saver):
    saver.save(1, 2, 3, 4)
    assert saver.published() == ["latest", "step-00000003", "step-00000004"]
    saver.cfg.checkpoint.keep = 1
    saver.save(5)
    assert saver.published() == ["latest", "step-00000005"]


def test_later_steps_of_a_run_that_was_wound_back_are_put_aside(saver):
    saver.save(2, 4)
    saver.load(saver.dir / "checkpoints/step-00000002")
    saver.save(3)
    assert saver.published() == ["abandoned-step-00000004", "latest", "step-00000002", "step-00000003"]
    assert store.newest(saver.dir).name == "step-00000003"


def test_saving_a_step_again_replaces_it(saver):
    path = saver.save(1)
    again = saver.save(1)  # the stand-in has moved on
    assert again == path and saver.published() == ["latest", "step-00000001"]
    assert manifest.read(path).counters["applied_steps"] == 2


def test_a_disk_too_small_is_refused_before_anything_is_written(saver, monkeypatch):
    saver.save(1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(
        ResourceError, match=r"takes 0.000 GiB, .* has 0.000 GiB free; free some, lower checkpoint.keep"
    ):
        saver.save(2)
    assert saver.published() == ["latest", "step-00000001"]


def test_a_folder_that_cannot_be_made_is_named(saver):
    (saver.dir / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot make a folder for .*step-00000001"):
        saver.save(1)


# -- which checkpoint, whose folder ------------------------------------------------------------------------------------


def test_resume_takes_what_the_config_names(saver):
    older, newer = saver.save(1), saver.save(2)
    assert store.choose(saver.cfg, saver.run.grid) == newer
    saver.cfg.train.resume = str(older)
    assert store.choose(saver.cfg, saver.run.grid) == older
    saver.cfg.train.resume = str(saver.dir)  # another run's folder
    assert store.choose(saver.cfg, saver.run.grid) == newer
    saver.cfg.train.resume = "never"
    assert store.choose(saver.cfg, saver.run.grid) is None
    assert not (saver.dir / "checkpoints").exists() and (saver.dir / "checkpoints.replaced" / newer.name).is_dir()


def test_a_folder_of_another_run_is_refused_with_both_values(saver):
    saver.save(1)
    saver.cfg.model.hidden_size, saver.cfg.data.fim_rate = 64, 0.5
    with pytest.raises(CheckpointError, match=r"belongs to another run(.|\n)*fim_rate: 0.1 -> 0.5\n.*: 7168 -> 64"):
        store.check_run_folder(saver.dir, saver.cfg)
    saver.cfg.train.resume = "never"
    store.check_run_folder(saver.dir, saver.cfg)


def test_a_folder_may_go_on_with_more_steps_and_other_logging(saver):
    saver.save(1)
    saver.cfg.train.steps, saver.cfg.logging.plot_every, saver.cfg.checkpoint.every = 99, 1, 7
    store.check_run_folder(saver.dir, saver.cfg)
    store.check_run_folder(saver.dir / "nothing here", saver.cfg)


def test_a_damaged_manifest_is_passed_over_when_the_config_is_compared(saver):
    saver.save(1, 2)
    _flip(saver.dir / "checkpoints/step-00000002/manifest.json")
    saver.cfg.seed = 99
    with pytest.raises(CheckpointError, match="step-00000001 was made with(.|\n)*seed: 3 -> 99"):
        find.check_run_folder(saver.dir, saver.cfg)


# -- reading without a layout ------------------------------------------------------------------------------------------


def test_the_reader_gives_whole_tensors_single_experts_and_buffers(saver):
    saver.run.model.bias += 2.5
    path = saver.save(1)
    reader = store.Reader(path)
    up = "mlp.experts.up.weight"
    masters = {f.name: f.master for f in saver.run.engine.fragments()}
    assert reader.shapes[up] == (4, 7, 13) and reader.buffers == ["bias"]
    for name, tensor in store.read_tensors(path, reader.shapes):
        assert tensor.dtype == torch.float32 and torch.equal(tensor.flatten(), masters[name])
    assert torch.equal(reader.read(up, index=2), masters[up].view(4, 7, 13)[2])
    assert torch.equal(reader.buffer("bias"), torch.full((4,), 2.5))
    exp_avg = next(f.exp_avg for f in saver.run.engine.fragments() if f.name == "norm.weight")
    assert torch.equal(reader.read("norm.weight", "exp_avg"), exp_avg.float())


def test_the_reader_says_what_is_not_stored(saver):
    reader = store.Reader(saver.save(1))
    for call, words in (
        (lambda: reader.read("nothing"), "holds no parameter nothing"),
        (lambda: reader.read("norm.weight", "ema"), r"not ema; the run had no weight average \(optim.ema_decay = 0\)"),
        (lambda: reader.buffer("nothing"), "holds no buffer nothing"),
    ):
        with pytest.raises(CheckpointError, match=words):
            call()


def test_shards_are_written_in_blocks_of_any_size_alike(tmp_path, monkeypatch):
    tensors = [
        ("a", torch.arange(100.0)),
        ("b", torch.arange(33).bfloat16()),
        ("c", torch.zeros(0)),
        ("d", torch.ones(2, 3)),
    ]
    whole = shards.write(tmp_path / "whole", shards.Live(tensors))
    monkeypatch.setattr(shards, "BLOCK", 24)
    assert shards.write(tmp_path / "parts", shards.Live(tensors)) == whole
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert whole.size == shards.Live(tensors).size == (tmp_path / "whole").stat().st_size
    assert whole.sha256 == shards.sha256(tmp_path / "whole")
    opened = shards.Opened(tmp_path / "parts")
    assert all(same(opened.read(key), tensor) for key, tensor in tensors)
    assert torch.equal(opened.read("a", 10, 20), torch.arange(10.0, 20.0))
