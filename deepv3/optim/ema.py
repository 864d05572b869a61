"""Exponential moving average of the FP32 master weights, kept in host memory (V3 3.2.3: early estimate of the quality
after learning-rate decay).

    average = average + (1 - decay) * (master - average)        once per optimizer step, by each rank for its shards

The step pays for one copy to the host, on a stream of its own; a thread folds it in while training goes on. The next
step waits (on the device) for the copy, the next `update` (on the host) for the fold. Host memory: 8 bytes an element.
"""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from deepv3.optim.engine import Engine
from deepv3.optim.flat import Fragment

CHUNK = 1 << 28  # elements; pinned memory comes in powers of two, so only a master's last chunk wastes any


class WeightAverage:
    """The average of an engine's masters. Starts as a copy of them."""

    def __init__(self, engine: Engine, decay: float):
        self.engine, self.decay = engine, decay
        self._averages = [torch.empty_like(master, device="cpu") for master in engine.masters()]
        self._chunks = [chunk for average in self._averages for chunk in average.split(CHUNK)]
        self._sources = [chunk for master in engine.masters() for chunk in master.split(CHUNK)]
        pinned = self._sources[0].is_cuda
        self._staging = [torch.empty_like(chunk, pin_memory=pinned) for chunk in self._chunks]
        self._stream = torch.cuda.Stream() if pinned else None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="weight-average")
        self._fold: Future | None = None
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the masters as they are."""
        self.wait()
        for average, master in zip(self._averages, self.engine.masters()):
            average.copy_(master)

    def update(self) -> None:
        """Fold in the masters as the last enqueued step leaves them. Returns once the copy is enqueued."""
        self.wait()
        copied = self._copy()
        self._fold = self._worker.submit(self._fold_in, copied)

    def wait(self) -> None:
        """Return once every update is in the average; raises what its thread raised."""
        if self._fold is not None:
            self._fold.result()
            self._fold = None

    def view(self, fragment: Fragment) -> Tensor:
        """The average of one of the engine's fragments, [hi - lo] on the host. Call `wait` first."""
        return self._averages[fragment.group].narrow(0, fragment.start, fragment.hi - fragment.lo)

    @torch.no_grad()
    def _copy(self) -> torch.cuda.Event | None:
        if self._stream is None:
            for target, source in zip(self._staging, self._sources):
                target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for target, source in zip(self._staging, self._sources):
                target.copy_(source, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self.engine.hold(copied)
        return copied

    @torch.no_grad()
    def _fold_in(self, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        for average, staged in zip(self._chunks, self._staging):
            average.lerp_(staged, 1.0 - self.decay)
