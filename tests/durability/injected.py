"""Faults put into a rank's process by a test: `kind:key=value,...`, several separated by spaces.

nan:rank=R,step=S         R's gradients of step S become NaN (step=0: of every step)
spike:samples=N           the step that begins with sample N has five times the loss
hang:rank=R,step=S        R sleeps for ever in step S
slow:rank=R,seconds=X     R takes X seconds longer a step
pause:seconds=X           every rank does: so that a test can aim
log:path=P                every rank appends {step, samples, sha of its tokens, pid} to P-<rank>
disk:rank=R,errno=E,from=A,to=B   R's writes of shards number A to B - 1 fail half-way with E
bug:rank=R,step=S         R raises KeyError in step S
build:seconds=X           building the data takes X seconds longer; run_dir/building appears before
"""

import hashlib
import json
import os
import signal
import time
from pathlib import Path

import torch

import deepv3.checkpoint.shards as shards
import deepv3.train.loop as loop
from deepv3.errors import EXIT_DONE  # noqa: F401 - preloads the package

torch.set_num_threads(1)


def inject(faults: str) -> None:
    """Put them in."""
    for fault in faults.split():
        kind, _, text = fault.partition(":")
        options = dict(pair.split("=") for pair in text.split(","))
        globals()[f"_{kind}"](**options)


def _mine(rank: str) -> bool:
    return int(os.environ["RANK"]) == int(rank)


def _before_step(act) -> None:
    real = loop.train_step

    def train_step(run, plan, batches, votes):
        return real(run, plan, act(run, plan, batches) or batches, votes)

    loop.train_step = train_step


def _nan(rank: str, step: str) -> None:
    def poison(run, plan, batches):
        if not _mine(rank) or int(step) not in (0, plan.step):
            return
        real = run.engine.reduce

        def reduce(chunk):
            run.engine.flat_groups[0].grad[0] = torch.nan
            run.engine.reduce = real
            real(chunk)

        run.engine.reduce = reduce

    _before_step(poison)


def _spike(samples: str) -> None:
    def scale(run, plan, batches):
        if run.at.samples != int(samples):
            return
        real = run.executor.run

        def spiked(*args, **kwargs):
            run.executor.run = real
            out = real(*args, **kwargs)
            out.loss_main = out.loss_main * 5
            return out

        run.executor.run = spiked

    _before_step(scale)


def _hang(rank: str, step: str) -> None:
    _before_step(lambda run, plan, batches: sleeping() if _mine(rank) and plan.step == int(step) else None)


def sleeping() -> None:
    """Where a hung rank is found."""
    time.sleep(1000)


def _slow(rank: str, seconds: str) -> None:
    def late(batches):
        for batch in batches:
            time.sleep(float(seconds))
            yield batch

    _before_step(lambda run, plan, batches: late(batches) if _mine(rank) else None)


def _pause(seconds: str) -> None:
    _before_step(lambda run, plan, batches: time.sleep(float(seconds)))


def _bug(rank: str, step: str) -> None:
    def raises(run, plan, batches):
        if _mine(rank) and plan.step == int(step):
            raise KeyError("a mistake of ours")

    _before_step(raises)


def _die(rank: str, step: str) -> None:
    def dies(run, plan, batches):
        if _mine(rank) and plan.step == int(step):
            time.sleep(1.5)  # the save before it is published by now
            os.kill(os.getpid(), signal.SIGKILL)

    _before_step(dies)


def _build(seconds: str) -> None:
    real = loop.build_data

    def build_data(cfg, grid):
        Path(cfg.run_dir, "building").touch()
        time.sleep(float(seconds))
        return real(cfg, grid)

    loop.build_data = build_data


def _log(path: str) -> None:
    def logged(run, plan, batches):
        first = run.at.samples
        for batch in batches:
            sha = hashlib.sha256(batch.tokens.numpy().tobytes()).hexdigest()[:16]
            with open(f"{path}-{os.environ['RANK']}", "a") as file:
                file.write(json.dumps({"step": plan.step, "samples": first, "sha": sha, "pid": os.getpid()}) + "\n")
            yield batch

    _before_step(logged)


def _disk(rank: str, errno: str, to: str, **first: str) -> None:
    real, count = shards.write, [0]

    def write(path, source):
        number, count[0] = count[0], count[0] + 1
        if _mine(rank) and int(first["from"]) <= number < int(to):
            path.write_bytes(b"half")
            raise OSError(int(errno), os.strerror(int(errno)), str(path))
        return real(path, source)

    shards.write = write
