"""Checkpoints damaged at random: what is loaded is what was saved, or the load stops with a CheckpointError."""

import hashlib
import json
import logging
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from mutate import damaged, odd_value, trials
from standin import config, same, start

from deepv3 import dist
from deepv3.checkpoint import manifest, reader, store
from deepv3.errors import CheckpointError

CASES = range(500)
MANY = range(5000, 6000)


class Bench:
    """A saved stand-in, and the attempt to load a damaged copy of it."""

    def __init__(self, folder: Path):
        self.folder, self.cfg = folder, config()
        self.run = start(self.cfg)
        self.run.step(1)
        self.good = store.save(folder / "run", 1, self.run.engine, self.run.model, None, self.run.grid, self.cfg, {})
        self.saved = self.run.state()
        self.content = json.loads((self.good / manifest.NAME).read_text())

    def case(self, draw: random.Random) -> str:
        """Damage a copy and read it in each way there is."""
        run_dir = self.folder / "damaged"
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(self.good, run_dir / "checkpoints" / self.good.name)
        path = run_dir / "checkpoints" / self.good.name
        reader._proven.clear()  # a copy within a clock tick, of the same size, would count as seen
        draw.choice((self._bytes, self._bytes, self._manifest, self._manifest, self._manifest, self._files))(path, draw)
        before = {p for p in self.folder.rglob("*") if run_dir not in p.parents}
        try:
            found = store.newest(run_dir, self.run.grid)
            if found is None:
                return "no checkpoint"
            store.load(path, self.run.engine, self.run.model, None, self.run.grid)
            whole = store.Reader(path)
            for name in whole.shapes:
                whole.read(name)
            store.check_run_folder(run_dir, self.cfg)
        finally:
            assert before == {p for p in self.folder.rglob("*") if run_dir not in p.parents}, "wrote elsewhere"
        assert same(self.run.state(), self.saved), "other numbers were loaded in silence"
        return "works"

    def _bytes(self, path: Path, draw: random.Random) -> None:
        file = draw.choice(sorted(path.iterdir()))
        file.write_bytes(damaged(file.read_bytes(), draw))

    def _files(self, path: Path, draw: random.Random) -> None:
        file = draw.choice(sorted(path.iterdir()))
        how = draw.choice(("gone", "folder", "link out", "dangling", "loop", "renamed", "extra", "swapped"))
        if how == "extra":
            (path / "rank-00007.safetensors").write_bytes(b"x")
            return
        content = file.read_bytes()
        file.unlink()
        if how == "folder":
            file.mkdir()
        elif how == "link out":
            file.symlink_to("/etc/passwd")
        elif how == "dangling":
            file.symlink_to("nowhere")
        elif how == "loop":
            file.symlink_to(file.name)
        elif how == "renamed":
            file.with_suffix(".bak").write_bytes(content)
        elif how == "swapped":
            other = next(p for p in path.iterdir() if p != file)
            file.write_bytes(other.read_bytes())

    def _manifest(self, path: Path, draw: random.Random) -> None:
        """Change a value, then make the hash right again: a file that was edited, or written by another program."""
        outer = json.loads(json.dumps(self.content))
        for _ in range(draw.choice((1, 1, 2))):
            _change(outer if draw.random() < 0.1 else outer["content"], draw)
        if draw.random() < 0.9 and isinstance(outer.get("content"), dict):
            outer["sha256"] = manifest._digest(outer["content"])
        (path / manifest.NAME).write_text(json.dumps(outer))


def _change(node, draw: random.Random) -> None:
    """Replace, remove, double or exchange something below a JSON value."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = draw.choice(keys)
        inner = node[key]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.8:
            node = inner
            continue
        how = draw.random()
        if how < 0.15:
            del node[key]
        elif how < 0.25 and isinstance(node, list):
            node.append(inner)
        elif how < 0.35 and isinstance(node, dict):
            node[str(odd_value(draw))] = node.pop(key)
        elif how < 0.5 and isinstance(inner, int):
            node[key] = inner + draw.choice((-1, 1, 128, 10**12))
        else:
            node[key] = odd_value(draw)
        return


@pytest.fixture
def bench(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)  # hundreds of checkpoints are passed over
    yield Bench(tmp_path)
    dist.shutdown()


def test_no_damaged_checkpoint_ends_in_a_foreign_error_or_other_numbers(bench):
    outcomes = trials(CASES, bench.case)
    assert outcomes["CheckpointError"] > len(CASES) / 2 and outcomes["works"] > 10


@pytest.mark.slow
def test_a_thousand_damaged_checkpoints(bench):
    assert sum(trials(MANY, bench.case).values()) == len(MANY)


TRICKS = (
    "../rank-00000.safetensors", "/etc/passwd", "rank-00000.safetensors/../../x", "rank-00000.safetensors\0", "", ".",
    "rank-00000.safetensors\n", "..", "rank-0.safetensors", "RANK-00000.safetensors", "manifest.json",
)  # fmt: skip


@pytest.mark.parametrize("name", TRICKS)
def test_a_shard_name_that_leads_out_of_the_folder_is_refused(bench, name):
    outer = json.loads(json.dumps(bench.content))
    outer["content"]["shards"][0]["name"] = name
    outer["sha256"] = manifest._digest(outer["content"])
    (bench.good / manifest.NAME).write_text(json.dumps(outer))
    with pytest.raises(CheckpointError, match="is no shard's name"):
        store.Reader(bench.good)


def test_a_tensor_that_promises_more_than_its_file_holds_is_refused_before_memory_is_taken(bench):
    outer = json.loads(json.dumps(bench.content))
    name = next(iter(outer["content"]["shapes"]))
    outer["content"]["shapes"][name] = [10**14]
    first = next(s for s in outer["content"]["shards"][0]["slices"] if s[0] == name)
    first[2] = 10**14
    outer["sha256"] = manifest._digest(outer["content"])
    (bench.good / manifest.NAME).write_text(json.dumps(outer))
    with pytest.raises(CheckpointError, match="cannot hold"):
        store.Reader(bench.good)


def test_outcomes_do_not_depend_on_the_run(bench):
    """The same seeds damage alike: a failure can be looked at again."""

    def digest(seed):
        return hashlib.sha256(damaged(b"x" * 999, random.Random(seed))).hexdigest()

    assert Counter(map(digest, range(50))) == Counter(map(digest, range(50)))
