"""How much of a step's communication computation hides, and how long a rank waits for its turn.

Pieces and waits leave intervals: computation, communication (dispatch and combine), waiting (for a tensor of another
pipeline rank). On CUDA their ends are events on the stream that runs them and nothing waits for the device; on the CPU
they are the host's clock, and nothing overlaps. Read after the step is over.
"""

import time
from collections.abc import Iterable
from typing import Any

import torch

COMPUTE, COMMUNICATION, WAITING = "compute", "communication", "waiting"
Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points as disjoint intervals, ascending."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """Sum of lengths."""
    return sum(end - start for start, end in intervals)


def common(a: list[Interval], b: list[Interval]) -> float:
    """Length of what two unions share."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


class Timeline:
    """The intervals of one step on one rank."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []
        self._origin = self.mark()

    def mark(self) -> Any:
        """Now, on the current stream."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, kind: str, start: Any, end: Any) -> None:
        """An interval between two marks of one stream."""
        self._marks.append((kind, start, end))

    def _seconds(self, mark: Any) -> float:
        return self._origin.elapsed_time(mark) / 1e3 if self._cuda else mark - self._origin

    def fields(self) -> dict[str, float]:
        """time_comm_hidden, time_comm_exposed (dispatch and combine) and time_bubble, seconds."""
        spans: dict[str, list[Interval]] = {COMPUTE: [], COMMUNICATION: [], WAITING: []}
        for kind, start, end in self._marks:
            spans[kind].append((self._seconds(start), self._seconds(end)))
        compute, comm = union(spans[COMPUTE]), union(spans[COMMUNICATION])
        hidden = common(compute, comm)
        return {
            "time_comm_hidden": hidden,
            "time_comm_exposed": length(comm) - hidden,
            "time_bubble": length(union(spans[WAITING])),
        }
