"""Tokenising one piece of a source into Arrow files, and the processes that do it side by side.

A finished piece is ``00012.train.arrow``, ``00012.validation.arrow`` (each only if it has documents) and, written
last, ``00012.json`` with its counts: whoever finds the json may rely on the piece. The content is a function of the
job, so it does not matter which process makes a piece, or how often.

Workers are plain child processes that take piece numbers on stdin and answer with a line of JSON: they import neither
torch nor the training script, and they end when their stdin closes, so a killed parent leaves none behind.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter

from deepv3.data.cache import published, write_json
from deepv3.data.corpus import Source
from deepv3.data.encoding import PARTS, Encoder, Rules
from deepv3.data.tokenizer import read_tokenizer
from deepv3.errors import DataError, ResourceError

BATCH_TOKENS = 1 << 23  # of one Arrow record batch: what a worker holds before it writes
BAD_LISTED = 1000  # bad documents named per piece; all are counted

Summary = dict[str, Any]


@dataclass
class Job:
    """What to do with a source. tokenizer: folder written by save_tokenizer. stop: data.bad_documents=stop."""

    source: Source
    tokenizer: str
    rules: Rules
    folder: str
    cache_dir: str
    stop: bool

    @cached_property
    def encoder(self) -> Encoder:
        """Loaded by the process that tokenises, never sent."""
        return Encoder(read_tokenizer(Path(self.tokenizer)), self.rules)


class TokenWriter:
    """Writes documents as rows {number: int64, tokens: list<uint16 or int32>} to an Arrow file, published at close."""

    def __init__(self, path: Path, vocabulary: int):
        self.dtype = np.uint16 if vocabulary <= 1 << 16 else np.int32
        items = datasets.Value("uint16" if self.dtype == np.uint16 else "int32")
        self._features = datasets.Features({"number": datasets.Value("int64"), "tokens": datasets.List(items)})
        self._stack = ExitStack()
        file = self._stack.enter_context(published(path))
        self._writer = ArrowWriter(features=self._features, stream=pa.PythonFile(file, "w"))
        self._numbers: list[int] = []
        self._tokens: list[np.ndarray] = []
        self._held = 0

    def add(self, number: int, tokens: np.ndarray) -> None:
        """One document."""
        self._numbers.append(number)
        self._tokens.append(tokens.astype(self.dtype))
        self._held += len(tokens)
        if self._held >= BATCH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        lengths = [len(tokens) for tokens in self._tokens]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        lists = pa.ListArray.from_arrays(offsets, np.concatenate(self._tokens))
        table = pa.table({"number": pa.array(self._numbers, pa.int64()), "tokens": lists})
        self._writer.write_table(table, writer_batch_size=len(self._numbers))
        self._numbers, self._tokens, self._held = [], [], 0

    def close(self) -> None:
        """Write what is held and publish."""
        if self._numbers:
            self._flush()
        self._writer.finalize(close_stream=False)
        self._stack.close()

    def abandon(self) -> None:
        """Leave no file."""
        self._stack.__exit__(*sys.exc_info())


def tokenise_piece(job: Job, piece: int) -> Summary:
    """Write one piece, return its counts: documents and tokens by part, bad (listed), empty, fim, bytes of text.

    Raises DataError at the first bad document if the job says stop.
    """
    folder, encoder = Path(job.folder), job.encoder
    writers: dict[str, TokenWriter] = {}
    count: Counter = Counter()
    documents, tokens = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    bad: list[tuple[str, str]] = []
    try:
        for document in job.source.documents(Path(job.cache_dir), piece):
            number, text = document["number"], document["text"]
            if document["error"]:
                if job.stop:
                    raise bad_document(job.source.label, document)
                count["bad"] += 1
                bad.append((document["name"], document["error"]))
                continue
            if not text:
                count["empty"] += 1
                continue
            part = encoder.part(number)
            if part not in writers:
                writers[part] = TokenWriter(token_file(folder, piece, part), encoder.tokenizer.size)
            ids = encoder.encode(number, text)
            writers[part].add(number, ids)
            documents[part] += 1
            tokens[part] += len(ids)
            count["fim"] += encoder.rewritten(number)
            count["bytes"] += len(text.encode())
        for writer in writers.values():
            writer.close()
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    counts = {key: count[key] for key in ("bad", "empty", "fim", "bytes")}
    summary = {"documents": documents, "tokens": tokens, **counts, "bad_documents": bad[:BAD_LISTED]}
    write_json(summary_file(folder, piece), summary)
    return summary


def bad_document(label: str, document: dict) -> DataError:
    """The error that data.bad_documents=stop asks for."""
    return DataError(
        f"{label}: bad document {document['name']}: {document['error']}. Mend or remove it, or set "
        "data.bad_documents=skip to go on without it"
    )


def token_file(folder: Path, piece: int, part: str) -> Path:
    """Where a piece's tokens of one part lie."""
    return folder / f"{piece:05d}.{part}.arrow"


def summary_file(folder: Path, piece: int) -> Path:
    """Where a finished piece's counts lie."""
    return folder / f"{piece:05d}.json"


# -- several processes -------------------------------------------------------------------------------------------------


def tokenise(job: Job, pieces: list[int], processes: int) -> Iterator[tuple[int, Summary]]:
    """Tokenise ``pieces`` on that many processes; yields (piece, counts) as they finish. One process: this one.

    Raises the first error a worker meets, ResourceError if one is killed.
    """
    processes = min(processes, len(pieces))
    if processes <= 1:
        for piece in pieces:
            yield piece, tokenise_piece(job, piece)
        return
    with ThreadPoolExecutor(processes) as threads, ExitStack() as stack:  # left in reverse: workers die, threads end
        workers = [stack.enter_context(Worker(job)) for _ in range(processes)]
        left = iter(pieces)
        busy = {threads.submit(worker.do, next(left)): worker for worker in workers}
        while busy:
            for done in wait(busy, return_when=FIRST_COMPLETED).done:
                worker = busy.pop(done)
                yield done.result()
                for piece in islice(left, 1):
                    busy[threads.submit(worker.do, piece)] = worker


class Worker:
    """A child process that tokenises pieces of one job."""

    def __init__(self, job: Job):
        paths = os.pathsep.join(path for path in sys.path if path)
        # One thread each, and no torch, which datasets would import for seconds and not use.
        environment = os.environ | {"PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false", "USE_TORCH": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "deepv3.data.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._first = pickle.dumps(job)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        with suppress(OSError):
            self._process.stdin.close()

    def do(self, piece: int) -> tuple[int, Summary]:
        """Have one piece tokenised; waits for it."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(self._first + f"{piece}\n".encode())
            self._process.stdin.flush()
            self._first = b""
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer.endswith(b"\n"):
            raise ResourceError(
                f"a tokenising process ended with code {self._process.wait()} while it did piece {piece}; if it was "
                "killed for memory, lower data.num_proc"
            )
        result = json.loads(answer)
        if "error" not in result:
            return piece, result
        if result["error"] == "DataError":
            raise DataError(result["text"])
        if result["errno"] is not None:
            raise OSError(result["errno"], result["text"])
        raise RuntimeError(f"tokenising piece {piece} failed:\n{result['text']}")


def serve() -> None:
    """The child's side: a pickled job, then piece numbers, one a line, until stdin closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too and ends its workers
    requests = sys.stdin.buffer
    job = pickle.load(requests)
    for line in requests:
        try:
            answer = tokenise_piece(job, int(line))
        except DataError as error:
            answer = {"error": "DataError", "text": str(error)}
        except OSError as error:
            answer = {"error": "OSError", "errno": error.errno, "text": error.strerror or str(error)}
        except Exception:
            answer = {"error": "bug", "errno": None, "text": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)
