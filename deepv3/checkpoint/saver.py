"""A run's checkpoints, written while training goes on.

`start` waits for the save before it, copies this rank's state (snapshot.py) and returns; a thread then carries out the
collective act of write.py over a gloo group of its own, so that it and the training never wait for each other's
collectives. What the thread meets is raised by `wait`, on all ranks alike. `save` stops training until all is on the
disk and needs no copy: for the last save of a process.

Given up: a save that is still being written when the next is due holds training up (it is counted in the stall).
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepv3.checkpoint import shards
from deepv3.checkpoint.snapshot import Snapshot
from deepv3.checkpoint.state import State, collect, generators, persistent_buffers, set_generators
from deepv3.checkpoint.store import path_of
from deepv3.checkpoint.write import manifest_of, write
from deepv3.config.schema import Config
from deepv3.dist import Grid
from deepv3.optim.ema import WeightAverage
from deepv3.optim.engine import Engine


class Saved(NamedTuple):
    """A published checkpoint. size: bytes over all ranks; stall: seconds that training waited on this rank; seconds:
    from then until it was published."""

    step: int
    path: Path
    size: int
    stall: float
    seconds: float


class Saver:
    """Saves the state of one run on this rank. All ranks call the same methods in the same order."""

    def __init__(
        self,
        run_dir: Path,
        engine: Engine,
        model: nn.Module,
        average: WeightAverage | None,
        grid: Grid,
        cfg: Config,
    ):
        self.run_dir, self.engine, self.model, self.average = Path(run_dir), engine, model, average
        self.grid, self.cfg = grid, cfg
        self.line = Grid(grid.world_size, grid.rank)  # has groups of its own, and so a gloo group for the thread
        if grid.world_size > 1:
            self.line.group("host")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future | None = None
        self._snapshot = Snapshot()
        self._buffers: dict[str, Tensor] = {}
        self._held: State | None = None

    # -- saving ------------------------------------------------------------------------------------------------------

    def start(self, step: int, client: dict[str, Any]) -> Saved | None:
        """Copy the state after `step` and begin to write it. Returns the save before it, as `wait`."""
        began = time.perf_counter()
        before = self.wait()
        self.hold(client)
        stall = time.perf_counter() - began
        assert self._held is not None
        self._writing = self._thread.submit(self._write, step, self._held, self._snapshot, stall)
        return before

    def save(self, step: int, client: dict[str, Any]) -> Saved:
        """Write the state after `step` and return when it is published. Raises as store.save."""
        self.wait()
        began = time.perf_counter()
        state = collect(self.engine, self.model, self.average, self.grid, client)
        done = self._write(step, state, shards.Live(state.tensors), 0.0)
        return done._replace(stall=time.perf_counter() - began)

    def _write(self, step: int, state: State, source: shards.Source, stall: float) -> Saved:
        began = time.perf_counter()
        if self.grid.device.type == "cuda":
            torch.cuda.set_device(self.grid.device)  # a thread starts on device 0
        content = manifest_of(step, state, self.grid, self.cfg)
        final = path_of(self.run_dir, step)
        size = write(final, source, content, state.part, self.line, self.cfg)
        return Saved(step, final, size, stall, time.perf_counter() - began)

    @property
    def failed(self) -> bool:
        """Whether the save under way has failed; does not wait. Ranks learn of it at different times."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def finished(self) -> Saved | None:
        """The save under way, once, if it is done and good; does not wait."""
        if self._writing is None or not self._writing.done() or self.failed:
            return None
        return self.wait()

    def wait(self) -> Saved | None:
        """Return once nothing is being written: the save that was, None if there was none. Raises what it met."""
        writing, self._writing = self._writing, None
        return writing.result() if writing is not None else None

    # -- winding back ------------------------------------------------------------------------------------------------

    def hold(self, client: dict[str, Any]) -> None:
        """Copy the state without writing it, so that `put_back` returns to it. Nothing may be being written."""
        assert self._writing is None, "the copy is being written: wait first"
        self._held = collect(self.engine, self.model, self.average, self.grid, client)
        copied = self._snapshot.take(self._held.tensors)
        if copied is not None:
            self.engine.hold(copied)
        self._buffers = {name: buffer.clone() for name, buffer in persistent_buffers(self.model).items()}

    @torch.no_grad()
    def put_back(self) -> dict[str, Any] | None:
        """Return engine, model, average and generators to the copy of the last `start` or `hold`; its `client`.

        None, and nothing done, where there is no copy yet. The copy stays. Call `wait` first.
        """
        if self._held is None:
            return None
        live = collect(self.engine, self.model, self.average, self.grid, {})
        self._snapshot.put_back(live.tensors)
        kept = dict(live.tensors)
        set_generators({key: kept[key] for key, _ in generators()})
        for name, buffer in persistent_buffers(self.model).items():
            buffer.copy_(self._buffers[name])
        self.engine.refresh_weights()
        self.engine.set_counters(**self._held.counters)
        return self._held.part["client"]

    def close(self) -> None:
        """End the thread once what it is writing is done, good or bad."""
        self._thread.shutdown(wait=True)
