"""Where pieces run: on CUDA, those that only move tokens on a stream of their own, while another micro-batch computes.

Order between pieces of one walk is kept by events; weight gradients and everything between walks stay on the compute
stream. Memory that crosses between the streams is told to the allocator by the pieces themselves (`stage.Cut`). Every
piece leaves its interval in the step's timeline.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch

from deepv3.pipeline.overlap import Walk
from deepv3.pipeline.stage import COMBINE, DISPATCH, Pieces
from deepv3.pipeline.timeline import COMMUNICATION, COMPUTE, Timeline


class Lanes:
    """The streams of a rank; on the CPU there is one lane, and pieces run in the order of the list."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._comm = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self.timeline = Timeline(device)

    def take_timeline(self) -> Timeline:
        """The intervals since the last call."""
        timeline, self.timeline = self.timeline, Timeline(self._device)
        return timeline

    def walk(self, pieces: Pieces) -> Walk:
        """A walk over a stage's pieces, each in its lane. It starts after what the compute stream has to do now."""
        last: list[torch.cuda.Event] = []
        if self._comm is not None:
            last.append(torch.cuda.current_stream().record_event())

        @contextmanager
        def on(kind: str) -> Iterator[None]:
            moving = kind in (DISPATCH, COMBINE)
            stream = None
            if self._comm is not None:
                stream = self._comm if moving else torch.cuda.current_stream()
                stream.wait_event(last[0])
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                start = self.timeline.mark()
                yield
                self.timeline.add(COMMUNICATION if moving else COMPUTE, start, self.timeline.mark())
            if stream is not None:
                last[0] = stream.record_event()

        return Walk(pieces, on)

    def timed(self, work: Callable[[], None], kind: str = COMPUTE) -> None:
        """Run something on the compute stream, with its interval."""
        start = self.timeline.mark()
        work()
        self.timeline.add(kind, start, self.timeline.mark())

    def join(self) -> None:
        """Let the compute stream wait for all that moves."""
        if self._comm is not None:
            torch.cuda.current_stream().wait_stream(self._comm)
