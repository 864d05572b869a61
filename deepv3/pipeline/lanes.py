"""Where pieces run: on CUDA, those that only move tokens on a stream of their own, while another micro-batch computes.

Order between pieces of one walk is kept by events; weight gradients and everything between walks stay on the compute
stream. Memory that crosses between the streams is told to the allocator by the pieces themselves (`stage.Cut`).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from deepv3.pipeline.overlap import On, Walk
from deepv3.pipeline.stage import COMBINE, DISPATCH, Pieces


class Lanes:
    """The streams of a rank; on the CPU there is one lane, and pieces run in the order of the list."""

    def __init__(self, device: torch.device) -> None:
        self._comm = torch.cuda.Stream(device) if device.type == "cuda" else None

    def walk(self, pieces: Pieces, side: str) -> Walk:
        """A walk over a stage's pieces, each in its lane. It starts after what the compute stream has to do now."""
        return Walk(pieces, side, self._on() if self._comm is not None else _plain)

    def _on(self) -> On:
        comm, compute = self._comm, torch.cuda.current_stream()
        assert comm is not None
        last: list[torch.cuda.Event] = [compute.record_event()]

        @contextmanager
        def on(kind: str, side: str) -> Iterator[None]:
            stream = comm if kind in (DISPATCH, COMBINE) else compute
            stream.wait_event(last[0])
            with torch.cuda.stream(stream):
                yield
            last[0] = stream.record_event()

        return on

    def join(self) -> None:
        """Let the compute stream wait for all that moves."""
        if self._comm is not None:
            torch.cuda.current_stream().wait_stream(self._comm)


def _plain(kind: str, side: str) -> AbstractContextManager:
    return nullcontext()
