"""Data files damaged at random: each is read, or its bad documents are named and left out, or a DataError stops the run
before the first step; the cache never keeps anything of a damaged file that a sound one would get."""

import json
import logging
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mutate import damaged, odd_value, trials

from deepv3.config.schema import Config, SourceConfig
from deepv3.data.loader import build_data
from deepv3.data.tokenizer import save_tokenizer, train
from deepv3.dist import Grid
from deepv3.errors import DataError

CASES = range(120)
MANY = range(9000, 9400)
TEXTS = [f"def function_{n}(a, b):\n    return a * {n} + b\n" * 6 for n in range(24)]


def _table() -> pa.Table:
    return pa.table({"text": TEXTS, "number": list(range(len(TEXTS)))})


def _write(kind: str, folder: Path) -> Path:
    path = folder / f"data.{kind}"
    if kind == "parquet":
        pq.write_table(_table(), path, row_group_size=7)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(TEXTS)))
    else:
        path.write_text("\n".join(TEXTS))
    return path


def _odd_document(draw: random.Random) -> bytes:
    """A line that is no document, or one nobody expected."""
    return draw.choice((
        lambda: b"x" * 3_000_000,
        lambda: b"\xff\xfe\x00text",
        lambda: "\u2028\u0000\ud7ff".encode(),
        lambda: json.dumps({"text": odd_value(draw)}, default=str).encode(),
        lambda: json.dumps(odd_value(draw), default=str).encode(),
        lambda: b'{"text": "' + b"a" * 200_000,
        lambda: b"[" * 5000,
        lambda: b'{"text": "\\ud800 alone"}',
        lambda: b"\r\r\n",
        lambda: json.dumps({"text": "\U0001f600" * 2000}).encode(),
    ))()  # fmt: skip


class Bench:
    """Sound files of each kind, and a run's data over a damaged copy."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.good = {kind: _write(kind, folder).read_bytes() for kind in ("parquet", "jsonl", "txt")}
        save_tokenizer(train(iter(TEXTS), 300), folder / "tokenizer")

    def config(self, source: Path, stop: bool, streaming: bool, cache: str) -> Config:
        cfg = Config(run_dir=str(self.folder / "run"))
        cfg.model.vocab_size, cfg.model.num_nextn_predict_layers = 512, 1
        cfg.data.seq_len, cfg.data.num_proc, cfg.data.validation_fraction = 16, 1, 0.0
        cfg.data.tokenizer, cfg.data.cache_dir = str(self.folder / "tokenizer"), str(self.folder / cache)
        cfg.data.bad_documents = "stop" if stop else "skip"
        cfg.data.sources = [SourceConfig(path=str(source), streaming=streaming)]
        cfg.train.global_batch_size, cfg.train.eval_every = 4, 0
        return cfg

    def read(self, cfg: Config) -> list:
        """Two batches of the run's data."""
        data = build_data(cfg, Grid(1, 0))
        try:
            return [batch.tokens.tolist() for batch in data.train.micro_batches(0, 8, 4)]
        finally:
            data.close()

    def case(self, draw: random.Random) -> str:
        kind = draw.choice(list(self.good))
        source = self.folder / "source"
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir()
        content = self.good[kind]
        if kind != "parquet" and draw.random() < 0.5:
            lines = content.split(b"\n")
            lines[draw.randrange(len(lines))] = _odd_document(draw)
            content = b"\n".join(lines)
        else:
            content = damaged(content, draw)
        file = source / f"data.{kind}"
        file.write_bytes(content)
        cache = f"cache-{draw.randrange(10**9)}"
        stop, streaming = draw.random() < 0.3, draw.random() < 0.3
        if streaming:  # a stream of a few bytes is read again and again: right, but slow
            (source / f"sound.{kind}").write_bytes(self.good[kind])
        try:
            rows = self.read(self.config(source if streaming else file, stop, streaming, cache))
            assert all(0 <= token < 512 for batch in rows for row in batch for token in row)
            return "works"
        except DataError:
            if draw.random() < 0.2:
                self.nothing_of_it_stays(file, kind, cache)
            raise
        finally:
            shutil.rmtree(self.folder / cache, ignore_errors=True)

    def nothing_of_it_stays(self, file: Path, kind: str, cache: str) -> None:
        """Once the file is mended, the same cache gives what a new one gives."""
        file.write_bytes(self.good[kind])
        after = self.read(self.config(file, True, False, cache))
        fresh = self.read(self.config(file, True, False, cache + "-fresh"))
        shutil.rmtree(self.folder / f"{cache}-fresh")
        assert after == fresh


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    logging.disable(logging.CRITICAL)
    yield Bench(tmp_path_factory.mktemp("data"))
    logging.disable(logging.NOTSET)


def test_no_damaged_file_ends_in_a_foreign_error(bench):
    outcomes = trials(CASES, bench.case)
    assert outcomes["DataError"] > 10 and outcomes["works"] > 30


@pytest.mark.slow
def test_four_hundred_damaged_files(bench):
    assert sum(trials(MANY, bench.case).values()) == len(MANY)
