"""Where a step's time goes: spans that never make the host wait for the device.

A span is two marks. On CUDA a mark is an event on the current stream, so a span around a wait shows how long the device
stood idle for it, not how long the host did; on the CPU it is the clock of the host. Spans nest, and the time of one is
its own, without the spans inside it, so that the parts of a step add up to no more than the step.

Names become row fields ``time_NAME`` in seconds of rank 0. A field that is absent is unknown and is not drawn:

=============== =====================================================================================================
compute         forward and backward, without what is nested in it
data            waiting for a micro-batch
comm_exposed    communication that the device waits for
comm_hidden     communication under computation; overlaps the others and is not part of their sum
bubble          a pipeline rank waiting for its turn
optimizer       gradient reduction not yet hidden, norm, AdamW, gather, biases, EMA
checkpoint      saving, between this step and the one before it
validation      validating, between this step and the one before it
=============== =====================================================================================================
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")

OVERLAPPED = frozenset({"comm_hidden"})  # runs beside its parent, so it takes no time away from it


@dataclass
class _Span:
    name: str
    parent: "_Span | None"
    start: Any
    end: Any = None


class Spans:
    """The spans of one step (or of one pause between steps) on this rank. One thread uses it."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._all: list[_Span] = []
        self._open: _Span | None = None

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, span: _Span) -> float:
        return span.start.elapsed_time(span.end) / 1e3 if self._cuda else span.end - span.start

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time the block under `name` (see the table above); several of one name add up."""
        span = _Span(name, self._open, self._mark())
        self._open = span
        try:
            yield
        finally:
            span.end = self._mark()
            self._open = span.parent
            self._all.append(span)

    def waiting(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """`items`, with the time each takes to come under `name`."""
        source = iter(items)
        while True:
            with self.span(name):
                item = next(source, _END)
            if item is _END:
                return
            yield item

    def fields(self) -> dict[str, float]:
        """``time_NAME`` -> seconds. On CUDA the device must have passed the last mark: read it after the figures."""
        own: dict[str, float] = defaultdict(float)
        for span in self._all:
            seconds = self._seconds(span)
            own[span.name] += seconds
            if span.parent is not None and span.name not in OVERLAPPED:
                own[span.parent.name] -= seconds
        return {f"time_{name}": max(0.0, seconds) for name, seconds in own.items()}


_END: Any = object()


class Pauses:
    """Host time of what happens between steps; the next step's row takes it."""

    def __init__(self) -> None:
        self._spans = Spans(torch.device("cpu"))

    def span(self, name: str) -> Any:
        """As Spans.span, always by the host's clock: between steps the host is what is waited for."""
        return self._spans.span(name)

    def take(self) -> dict[str, float]:
        """The fields since the last call."""
        fields = self._spans.fields()
        self._spans = Spans(torch.device("cpu"))
        return fields
