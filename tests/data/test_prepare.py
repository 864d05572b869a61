"""Preparing: interruption, concurrency, several processes, what is made again and what is not, a disk in trouble."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_corpus import make_config, make_text, write_corpus

from deepv3.data import cache as cache_module
from deepv3.data import pieces, tokenise
from deepv3.data.cache import build_once
from deepv3.data.prepare import prepare
from deepv3.data.tokenizer import read_tokenizer, save_tokenizer
from deepv3.errors import DataError, ResourceError

HERE = Path(__file__).parent

# What the launcher does, with pieces small and slow enough that a test can interrupt them.
SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
from small_corpus import make_config
from deepv3.data import pieces, tokenise
from deepv3.data.prepare import prepare
pieces.MIN_BYTES = 4000
done = tokenise.tokenise_piece
def slowly(job, piece):
    time.sleep({pause})
    return done(job, piece)
tokenise.tokenise_piece = slowly
prepared = prepare(make_config(Path({cache!r}), Path({run!r}), path={path!r}, num_proc={processes}))
print(prepared.train[0].folder)
"""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "MIN_BYTES", 4000)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """150 documents, about 20 pieces."""
    return write_corpus(tmp_path_factory.mktemp("texts") / "in", 150)


@pytest.fixture
def start(tmp_path, texts):
    """start(name of the cache, ...) -> a process that prepares ``texts``; none outlives the test."""
    started = []

    def one(cache, pause=0.0, processes=1):
        fields = {"here": str(HERE), "pause": pause, "processes": processes, "path": str(texts)}
        script = SCRIPT.format(cache=str(tmp_path / cache), run=str(tmp_path / f"run{len(started)}"), **fields)
        command = [sys.executable, "-c", script]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield one
    for process in started:
        process.kill()
        process.communicate()


def finish(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return Path(out.strip()), err


def content(folder):
    """{file name: hash} of a finished folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def await_pieces(folder, count):
    """Wait until a preparation under way has finished that many pieces; returns its working folder."""
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        for work in folder.glob("tokens/*.building"):
            if len(list(work.glob("0*.json"))) >= count:
                return work
        time.sleep(0.02)
    raise AssertionError("no preparation got under way")


@pytest.fixture
def reference(tmp_path, texts, silent):
    """The folder that an undisturbed preparation makes."""
    return prepare(make_config(tmp_path / "reference", tmp_path / "run", path=texts), silent).train[0].folder


def test_a_killed_preparation_goes_on_where_it_was_and_ends_the_same(tmp_path, start, reference):
    victim = start("cache", pause=0.15)
    work = await_pieces(tmp_path / "cache", 3)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    finished = {path: path.stat().st_mtime_ns for path in work.glob("0*.json")}
    assert 3 <= len(finished) < 15
    (work / ".00004.train.arrow.999").write_bytes(b"half a file")
    folder, err = finish(start("cache"))
    assert f"{len(finished)} of them done before" in err
    assert content(folder) == content(reference)
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("0*.json")}
    assert all(kept[path.name] == made for path, made in finished.items())
    assert folder.name == reference.name


def test_killing_the_parent_of_several_processes_leaves_none_behind(tmp_path, start, reference):
    victim = start("cache", processes=2)
    await_pieces(tmp_path / "cache", 1)
    children = Path(f"/proc/{victim.pid}/task/{victim.pid}/children").read_text().split()
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    deadline = time.monotonic() + 20
    while any(alive(int(child)) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(int(child)) for child in children)
    folder, _ = finish(start("cache", processes=2))
    assert content(folder) == content(reference)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ranks_and_runs_that_prepare_at_once_make_one_cache(tmp_path, start, reference):
    results = [finish(process) for process in [start("cache", pause=0.02) for _ in range(3)]]
    assert {folder for folder, _ in results} == {tmp_path / "cache" / "tokens" / reference.name}
    assert sum("tokenising" in err for _, err in results) == 1
    assert sum("training a tokenizer" in err for _, err in results) == 1
    assert content(results[0][0]) == content(reference)
    assert not list((tmp_path / "cache").glob("*/*.building"))


def test_several_processes_make_the_same_files_as_one(tmp_path, texts, reference, silent):
    made = prepare(make_config(tmp_path / "cache", tmp_path / "run", path=texts, num_proc=3), silent)
    assert content(made.train[0].folder) == content(reference)


def test_without_file_locks_builders_meet_and_still_publish_one_folder(tmp_path, monkeypatch, silent):
    def no_locks(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cache_module.fcntl, "flock", no_locks)
    target = tmp_path / "folder"

    def build(work):
        (work / "a").write_text("x")
        if not target.exists():  # the other builder gets there first
            build_once(target, lambda other: (other / "a").write_text("x"), silent)

    assert build_once(target, build, silent) == target
    assert [path.name for path in target.iterdir()] == ["a"]


def test_a_builder_that_fails_leaves_its_lock_and_its_work_to_the_next(tmp_path, silent):
    def fail(work):
        (work / "piece").write_text("done")
        raise DataError("bad input")

    with pytest.raises(DataError, match="bad input"):
        build_once(tmp_path / "folder", fail, silent)
    seen = []
    build_once(tmp_path / "folder", lambda work: seen.append((work / "piece").read_text()), silent)
    assert seen == ["done"]


def test_what_is_prepared_is_not_made_again(tmp_path, texts, silent, monkeypatch):
    cfg = make_config(tmp_path / "cache", tmp_path / "run", path=texts)
    first = prepare(cfg, silent)
    monkeypatch.setattr(tokenise, "tokenise_piece", lambda *a: pytest.fail("tokenised again"))
    again = prepare(cfg, silent)
    assert again.train[0].folder == first.train[0].folder
    assert again.tokenizer.digest == first.tokenizer.digest


def test_whatever_changes_the_tokens_makes_a_folder_of_its_own(tmp_path, texts, silent):
    def folder(**fields):
        return prepare(make_config(tmp_path / "cache", tmp_path / "run", path=texts, **fields), silent).train[0].folder

    base = folder()
    changed = [folder(seed=1), folder(fim_rate=0.2), folder(validation_fraction=0.2), folder(vocab_size=300)]
    assert len({base, *changed}) == 5
    assert folder(fim_rate=0.0) == folder(fim_rate=0.0, seed=1)  # nothing in there hangs on the seed
    assert folder(seq_len=16, mask_documents=True, shuffle=False) == base
    path = texts / "001.txt"
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    assert folder() != base


def test_preparing_is_exact_about_what_it_wrote(tmp_path, texts, silent):
    cfg = make_config(tmp_path / "cache", tmp_path / "run", path=texts, fim_rate=0.3, validation_fraction=0.2)
    prepared = prepare(cfg, silent)
    (ready,) = prepared.train
    import datasets

    rows = {}
    for part in ("train", "validation"):
        files = sorted(ready.folder.glob(f"*.{part}.arrow"))
        found = [row for file in files for row in datasets.Dataset.from_file(str(file))]
        assert len(found) == ready.counts["documents"][part]
        assert sum(len(row["tokens"]) for row in found) == ready.counts["tokens"][part]
        rows |= {row["number"] >> 40: prepared.tokenizer.decode(row["tokens"]) for row in found}
    assert len(rows) == 150
    whole = [i for i in rows if not rows[i].startswith("<｜fim▁begin｜>")]
    assert len(rows) - len(whole) == ready.counts["fim"] > 15
    originals = {make_text(i) + "<｜end▁of▁sentence｜>" for i in range(150)}
    assert {rows[i] for i in whole} <= originals
    assert len({rows[i] for i in whole}) == len(whole)


def test_a_killed_tokenising_process_is_reported_with_the_knob(tmp_path, texts, silent, monkeypatch):
    environment = tokenise.Worker.__init__

    def doomed(self, job):
        environment(self, job)
        self._process.send_signal(signal.SIGKILL)

    monkeypatch.setattr(tokenise.Worker, "__init__", doomed)
    with pytest.raises(ResourceError, match=r"ended with code -9 .* lower data.num_proc"):
        prepare(make_config(tmp_path / "cache", tmp_path / "run", path=texts, num_proc=2), silent)


def test_an_error_in_a_process_arrives_as_itself(tmp_path, silent):
    folder = write_corpus(tmp_path / "in", 60)
    (folder / "030.txt").unlink(missing_ok=True)
    (folder / "031.txt").write_bytes(b"\xff")
    cfg = make_config(tmp_path / "cache", tmp_path / "run", path=folder, num_proc=2, bad_documents="stop")
    with pytest.raises(DataError, match=r"031.txt: invalid UTF-8: byte 0xff"):
        prepare(cfg, silent)


def test_a_full_disk_says_which_one_and_what_to_set(tmp_path, texts, silent, monkeypatch):
    def full(self, number, tokens):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tokenise.TokenWriter, "add", full)
    with pytest.raises(ResourceError, match=rf"no space left for {tmp_path / 'cache'}.*data.cache_dir"):
        prepare(make_config(tmp_path / "cache", tmp_path / "run", path=texts), silent)


def test_a_cache_that_cannot_be_written_says_so(tmp_path, texts, silent):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written .*data.cache_dir"):
        prepare(make_config(tmp_path / "file" / "cache", tmp_path / "run", path=texts), silent)


def test_a_damaged_tokenizer_in_the_cache_is_named(tmp_path, texts, silent):
    cfg = make_config(tmp_path / "cache", tmp_path / "run", path=texts)
    save_tokenizer(prepare(cfg, silent).tokenizer, tmp_path / "run" / "tokenizer")
    assert read_tokenizer(tmp_path / "run" / "tokenizer").eos == 1
    (tmp_path / "run" / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="holds no readable tokenizer"):
        read_tokenizer(tmp_path / "run" / "tokenizer")


def test_the_launch_script_prepares_and_summarises(tmp_path, texts):
    script = HERE.parents[1] / "launch" / "prepare_data.py"
    arguments = [
        "+config=tiny",
        f"data.sources=[{{path: {texts}}}]",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"run_dir={tmp_path / 'run'}",
        "data.num_proc=1",
        "data.seq_len=32",
    ]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "sequences of 32 tokens an epoch" in done.stdout
    counts = json.loads(next((tmp_path / "cache").glob("tokens/*/summary.json")).read_text())
    assert (sum(counts["documents"].values()), counts["bad"]) == (150, 0)
    assert f"{counts['tokens']['train']:,} tokens to train on" in done.stdout
    missing = subprocess.run(
        [sys.executable, script, "+config=tiny", "data.sources=[{path: /no/such}]", f"run_dir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert missing.returncode == 2
    assert "data.sources[0].path=/no/such: no such file or folder" in missing.stderr
