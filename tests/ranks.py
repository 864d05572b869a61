"""N gloo ranks for tests: one pool of warm worker processes, made at first use and shared by the whole test session.

    results = ranks.run(2, function, arguments...)      # function(arguments...) on each rank; the results by rank

A rank finds torchrun's environment and calls deepv3.dist.init_distributed itself. A worker imports torch and DeepSpeed
once, not for every test. `function` and its arguments are pickled, so it stands at the top level of a module. Where a
rank fails, the test gets its traceback; where one hangs, every rank's stack, and the pool is made anew.
"""

import atexit
import faulthandler
import multiprocessing as mp
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PATIENCE = 120  # seconds until a job counts as hung
GRACE = 3  # seconds for the others after the first rank has failed


@dataclass
class Worker:
    """A process that runs jobs, and the file its stacks are dumped to."""

    process: Any
    pipe: Connection
    stacks: Path


class RankFailed(AssertionError):
    """A rank raised or hung; the message holds the tracebacks."""


_workers: list[Worker] = []


def run(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on `count` ranks at once. Raises RankFailed."""
    if not all(worker.process.is_alive() for worker in _workers):
        close()  # someone has ended one: a job cannot go on without it, the next can start anew
    while len(_workers) < count:
        _workers.append(_start(len(_workers)))
    job = pickle.dumps((function, arguments))
    port = _free_port()
    for rank, worker in enumerate(_workers[:count]):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
        environment["MASTER_PORT"] = port
        worker.pipe.send((sys.path, {key: str(value) for key, value in environment.items()}, job))
    results, failures = _collect(_workers[:count])
    if failures:
        raise RankFailed("\n".join(f"--- rank {rank} ---\n{text}" for rank, text in sorted(failures.items())))
    return [pickle.loads(results[rank]) for rank in range(count)]


def _collect(workers: list[Worker]) -> tuple[dict[int, bytes], dict[int, str]]:
    rank_of = {worker.pipe: rank for rank, worker in enumerate(workers)}
    results: dict[int, bytes] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + PATIENCE
    waiting = dict(rank_of)
    while waiting and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(waiting), timeout=left):
            rank = waiting.pop(pipe)
            try:
                good, value = pipe.recv()
            except EOFError:
                good, value = False, "the process died"
            if good:
                results[rank] = value
            else:
                failures[rank] = value
                deadline = min(deadline, time.monotonic() + GRACE)
    if waiting or any(text == "the process died" for text in failures.values()):
        for rank in waiting.values():
            os.kill(workers[rank].process.pid, signal.SIGUSR1)
        time.sleep(0.2)
        for rank in waiting.values():
            failures.setdefault(rank, "still running:\n" + workers[rank].stacks.read_text())
        close()
    return results, failures


def close() -> None:
    """End the workers; the next `run` starts new ones."""
    for worker in _workers:
        worker.process.kill()
        worker.process.join()
        worker.stacks.unlink(missing_ok=True)
    _workers.clear()


atexit.register(close)


def _start(number: int) -> Worker:
    stacks = Path(tempfile.gettempdir()) / f"ranks-{os.getpid()}-{number}-{random.randrange(1 << 30)}.txt"
    ours, theirs = mp.Pipe()
    process = mp.get_context("spawn").Process(target=_serve, args=(theirs, stacks), daemon=True)
    process.start()
    theirs.close()
    return Worker(process, ours, stacks)


def _serve(pipe: Connection, stacks: Path) -> None:
    """The worker's loop."""
    with open(stacks, "w") as dump:
        faulthandler.register(signal.SIGUSR1, file=dump)
        os.environ["OMP_NUM_THREADS"] = "1"
        import torch

        torch.set_num_threads(1)
        import deepv3.optim.engine  # noqa: F401 - the slow import
        from deepv3 import dist

        while True:
            try:
                path, environment, job = pipe.recv()
            except EOFError:
                return
            sys.path[:] = path
            os.environ.update(environment)
            try:
                function, arguments = pickle.loads(job)
                outcome = True, pickle.dumps(function(*arguments))
            except Exception:
                outcome = False, traceback.format_exc()
            finally:
                dist.shutdown()
            pipe.send(outcome)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
