"""Whole training runs on real processes that a test may kill at any instant, without paying torch's import each time.

A fork server imports the product once; every rank is then forked from it, takes torchrun's environment, and calls what
launch/pretrain.py calls, so a rank is a process with its own pid, files and sockets, and SIGKILL is SIGKILL. The test
plays torchrun's part: it starts ranks and starts them again. Two things are left out that cost more than such a run:
composing the config in every rank, and drawing pictures.

    job = start(run_dir, corpus, "train.steps=6", world=2, fault="hang:rank=1,step=3")
    codes = job.wait()
"""

import faulthandler
import json
import multiprocessing as mp
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepv3.config import cli
from deepv3.config.compose import compose
from deepv3.config.schema import Config

PRELOAD = ["deepv3.train.entry", "deepv3.config.cli", "injected"]
EXACT = ("loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm", "lr", "max_vio", "router_bias_max", "tokens")
SMALL = (
    "+config=tiny", "data.validation_fraction=0.2", "data.seq_len=32", "data.num_proc=1", "model.num_hidden_layers=2",
    "model.hidden_size=32", "model.vocab_size=512", "model.intermediate_size=48", "model.moe_intermediate_size=16",
    "train.micro_batch_size=2", "train.global_batch_size=4", "train.eval_every=0", "train.finish=[]",
    "logging.wandb=disabled", "logging.plot_every=1000000", "logging.progress=false", "model.n_routed_experts=8",
)  # fmt: skip


def make_corpus(folder: Path) -> Path:
    """Forty small files of Python."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(40):
        lines = [f"def function_{number}_{i}(a, b):\n    return a * {i * number} + b\n" for i in range(30)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


@dataclass
class Job:
    """Ranks of one attempt."""

    run_dir: Path
    ranks: list[Any] = field(default_factory=list)
    log: Path = Path()

    def kill(self, rank: int | None = None, number: int = signal.SIGKILL) -> None:
        """Send a signal to one rank or to all."""
        for process in self.ranks if rank is None else [self.ranks[rank]]:
            with suppress(ProcessLookupError, AttributeError):
                os.kill(process.pid, number)

    def wait(self, seconds: float = 60.0) -> list[int]:
        """Exit codes by rank. Fails, with every rank's stacks, where one does not end in time."""
        hung = self.join(seconds)
        if hung:
            self.kill(number=signal.SIGUSR2)
            time.sleep(1.0)
        self.kill()
        for process in self.ranks:
            process.join()
        assert not hung, f"ranks {hung} did not end within {seconds} s:\n{self.output()}"
        return [process.exitcode for process in self.ranks]

    def join(self, seconds: float) -> list[int]:
        """Wait for all ranks to end by themselves; those that have not after `seconds`."""
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        return [rank for rank, process in enumerate(self.ranks) if process.exitcode is None]

    def output(self) -> str:
        """What the ranks wrote to stdout and stderr."""
        return "\n".join(f"--- {p.name}\n{p.read_text()}" for p in sorted(self.log.glob("rank-*.txt")))

    def step(self) -> int:
        """The last finished step."""
        return (rows(self.run_dir) or [{"step": 0}])[-1]["step"]


def rows(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The rows of a run's file; a torn last line is left out."""
    path = run_dir / name
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def ended(run_dir: Path) -> dict:
    """exit.json."""
    return json.loads((run_dir / "exit.json").read_text())


def start(run_dir: Path, corpus: Path, *overrides: str, world: int = 1, fault: str = "") -> Job:
    """Start a run's ranks; see injected.py for faults."""
    context = mp.get_context("forkserver")
    if str(Path(__file__).parent) not in sys.path:
        sys.path.insert(0, str(Path(__file__).parent))
    context.set_forkserver_preload(PRELOAD)
    arguments = [*SMALL, f"run_dir={run_dir}", f"data.sources=[{{path: {corpus}}}]"]
    arguments += [f"data.cache_dir={corpus.parent}/cache", *overrides]
    cfg = compose(arguments)
    job = Job(run_dir, log=corpus.parent / f"log-{run_dir.name}")
    job.log.mkdir(exist_ok=True)
    port = _free_port()
    for rank in range(world):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": port}
        out = job.log / f"rank-{rank}.txt"
        process = context.Process(target=_rank, args=(environment, cfg, fault, out), daemon=True)
        process.start()
        job.ranks.append(process)
    return job


def _rank(environment: dict, cfg: Config, fault: str, out: Path) -> None:
    os.environ.update({key: str(value) for key, value in environment.items()})
    descriptor = os.open(out, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.register(signal.SIGUSR2, file=descriptor)
    import injected

    from deepv3.train import report
    from deepv3.train.entry import pretrain

    report.Reporter._draw = lambda self: [self.run_dir / report.REPORT]
    injected.inject(fault)
    cli.leave(cli.guarded(lambda: pretrain(cfg, time.time(), lambda *_: None), Path(cfg.run_dir)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def samples(path: Path) -> dict[int, list[str]]:
    """step -> hashes of the micro-batches that a rank trained it on, of the last attempt that came so far.

    A step is repeated after a kill; each attempt must draw the same.
    """
    attempts: dict[int, list[list[str]]] = {}
    before = None
    for row in [json.loads(line) for line in path.read_text().splitlines()]:
        if before != (row["step"], row["pid"]):
            attempts.setdefault(row["step"], []).append([])
        attempts[row["step"]][-1].append(row["sha"])
        before = row["step"], row["pid"]
    for step, tries in attempts.items():
        longest = max(tries, key=len)
        assert all(tried == longest[: len(tried)] for tried in tries), f"step {step} drew other samples after a restart"
    return {step: max(tries, key=len) for step, tries in attempts.items()}
