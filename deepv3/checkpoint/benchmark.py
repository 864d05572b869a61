"""Rates of saving and loading against the disk's own: ``python -m deepv3.checkpoint.benchmark folder=DIR gib=1``.

One rank, a state of `gib` GiB (FP32 masters, BF16 moments) in one parameter group. Each line is the median of `rounds`,
with the smallest and the largest; the plain write is the same number of bytes with one fsync, the plain read follows a
request to drop the file from the page cache.
"""

import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from deepv3.checkpoint import reader, store
from deepv3.checkpoint.saver import Saver
from deepv3.config.cli import guarded
from deepv3.config.compose import from_arguments
from deepv3.config.schema import Config
from deepv3.dist import Grid
from deepv3.optim.flat import Fragment


@dataclass
class Arguments:
    """folder: on the disk to be measured; gib: of state; rounds: of each measurement."""

    folder: str = "checkpoint-benchmark"
    gib: float = 1.0
    rounds: int = 5


class OneRank:
    """What a checkpoint asks of an engine, over one flat parameter."""

    def __init__(self, elements: int):
        self.master = torch.randn(elements)
        self.moments = [torch.zeros(elements, dtype=torch.bfloat16) for _ in range(2)]

    def fragments(self) -> list[Fragment]:
        n = self.master.numel()
        return [Fragment("weight", (n,), 0, n, 0, 0, self.master, *self.moments)]

    def masters(self) -> list[Tensor]:
        return [self.master]

    def counters(self) -> dict[str, int]:
        return {"applied_steps": 0, "skipped_steps": 0}

    def set_counters(self, **counters: int) -> None:
        pass

    def refresh_weights(self) -> None:
        pass


def _forget(path: Path) -> None:
    """Drop a file from the page cache, where the system allows it, and from the hashes already seen."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    reader._proven.clear()


def _line(name: str, size: int, seconds: list[float]) -> str:
    rates = [size / s / 1e9 for s in seconds]
    return (
        f"{name:34s} {statistics.median(seconds):8.3f} s  {statistics.median(rates):6.2f} GB/s "
        f"({min(rates):.2f} - {max(rates):.2f})"
    )


def _timed(act: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    before()
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def measure(arguments: Arguments) -> None:
    """Print the lines."""
    folder = Path(arguments.folder)
    engine, model, grid, cfg = OneRank(int(arguments.gib * 2**30 / 8)), nn.Module(), Grid(1, 0), Config()
    cfg.checkpoint.keep = 1
    saver = Saver(folder, engine, model, None, grid, cfg)  # type: ignore[arg-type]
    rounds = range(arguments.rounds)
    try:
        folder.mkdir(parents=True)
        size = saver.save(1, {}).size
        shard = store.path_of(folder, 1) / "rank-00000.safetensors"
        plain, data = folder / "plain", shard.read_bytes()

        def write() -> None:
            with open(plain, "wb") as file:
                file.write(data)
                os.fsync(file.fileno())

        print(_line("plain write and fsync", size, [_timed(write) for _ in rounds]))
        print(_line("save, training waits", size, [saver.save(1, {}).stall for _ in rounds]))
        stalls, behind = [], []
        for _ in range(arguments.rounds + 1):  # the first one takes the memory
            saver.start(1, {})
            saved = saver.wait()
            assert saved is not None
            stalls.append(saved.stall)
            behind.append(saved.seconds)
        print(_line("save in the background: stall", size, stalls[1:]))
        print(_line("save in the background: behind", size, behind[1:]))
        print(_line("plain read", size, [_timed(plain.read_bytes, lambda: _forget(plain)) for _ in rounds]))
        path = shard.parent
        loads = [_timed(lambda: store.load(path, engine, model, None, grid), lambda: _forget(shard)) for _ in rounds]  # type: ignore[arg-type]
        print(_line("load, hash verified", size, loads))
    finally:
        saver.close()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(guarded(lambda: measure(from_arguments(sys.argv[1:], Arguments))))
