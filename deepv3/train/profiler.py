"""A window of steps under the profiler, on request: logging.profile_steps=[first,last].

Into run_dir/profile/, for every rank of logging.profile_ranks, named by steps and rank: a chrome trace (open it in
ui.perfetto.dev), a table of the device's time by kernel, and with logging.profile_memory every allocation of the window
(open it in pytorch.org/memory_viz). The steps before and after run without the profiler; those inside are slower, and
the last one waits for the device.
"""

import time
from pathlib import Path

import torch

from deepv3.config.schema import LoggingConfig
from deepv3.dist import Grid
from deepv3.errors import ConfigError
from deepv3.train.events import EventLog
from deepv3.train.kernel_table import kernel_table

FOLDER = "profile"
ALLOCATIONS = 200_000  # newest allocator events kept, about 100 bytes each and their stacks


class Window:
    """The profiler of one run on this rank. Raises ConfigError for what this device cannot record."""

    def __init__(self, logging: LoggingConfig, run_dir: Path, grid: Grid):
        self.logging, self.run_dir, self.grid = logging, run_dir, grid
        self.cuda = grid.device.type == "cuda"
        self.profiler: torch.profiler.profile | None = None
        self._first = self._began = 0.0
        if logging.profile_memory and not self.cuda:
            raise ConfigError(
                f"logging.profile_memory = true on {grid.device}: only the CUDA allocator can record allocations; "
                "leave it false, logging.profile_steps alone counts the memory of each operator here"
            )
        beyond = [rank for rank in logging.profile_ranks if rank >= grid.world_size]
        if logging.profile_steps and beyond:
            raise ConfigError(
                f"logging.profile_ranks = {logging.profile_ranks} names rank {beyond[0]}, but the run has "
                f"{grid.world_size} rank(s), 0 to {grid.world_size - 1}"
            )
        self.done = not logging.profile_steps or grid.rank not in logging.profile_ranks

    def before(self, step: int) -> None:
        """Start recording if `step` is the first of the window (or inside it, after a resume)."""
        if self.done or self.profiler is not None:
            return
        first, last = self.logging.profile_steps
        if not first <= step <= last:
            return
        if self.logging.profile_memory:
            torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if self.cuda else []
        self.profiler = torch.profiler.profile(activities=activities, profile_memory=not self.cuda)
        self.profiler.start()
        self._first, self._began = step, time.perf_counter()

    def after(self, step: int) -> list[Path]:
        """End the window if `step` is its last; the files written, the table first."""
        if self.profiler is None or step < self.logging.profile_steps[1]:
            return []
        return self._write(step)

    def _write(self, step: int) -> list[Path]:
        assert self.profiler is not None
        if self.cuda:
            torch.cuda.synchronize(self.grid.device)
        steps = int(step - self._first + 1)
        wall = (time.perf_counter() - self._began) / steps * 1e3
        self.profiler.stop()
        folder = self.run_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{int(self._first)}-{step}-rank{self.grid.rank}"
        table, trace = folder / f"{name}.txt", folder / f"{name}.trace.json.gz"
        head = f"wall {wall:.1f} ms per step while profiling, {steps} step(s)\n"
        table.write_text(head + kernel_table(self.profiler.key_averages(), steps, self.cuda) + "\n", encoding="utf-8")
        self.profiler.export_chrome_trace(str(trace))
        written = [table, trace]
        if self.logging.profile_memory:
            written.append(folder / f"{name}.memory.pickle")
            torch.cuda.memory._dump_snapshot(str(written[-1]))
            torch.cuda.memory._record_memory_history(enabled=None)
        self.profiler, self.done = None, True
        EventLog(self.run_dir).add("profile", step, f"{table}: {wall:.1f} ms a step while profiling")
        return written

    def close(self, step: int) -> list[Path]:
        """Write what was recorded of a window that the run's end cut short."""
        return self._write(step) if self.profiler is not None else []
