"""Where a weight's gradient goes: an FP32 buffer the optimizer owns, a queue that delays it, or plain autograd.

Rule, obeyed by every parameter of the model. A weight that carries ``main_grad`` (FP32, the weight's shape) has its
gradient written there: stored when ``grad_ready`` is False (first use in the optimizer step), added afterwards;
autograd then sees None and ``.grad`` stays empty. A weight without it gets an ordinary gradient from autograd.
With a queue, matrix gradients wait until the schedule flushes it (the W of zero-bubble pipelines, V3 3.2.1).
"""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

Write = Callable[[Tensor, bool], None]  # write(buffer, accumulate): add to or overwrite a buffer of the weight's shape


class WeightGradQueue:
    """Weight-gradient GEMMs waiting for their turn, first in, first out. One object per pipeline stage, not a global:
    backward runs on autograd's own threads on GPUs.

    A schedule that delays them (I now, W later) closes a batch after each I; `pop` runs the oldest batch. Where
    `deferring` is False gradients are made at once, as if there were no queue.
    """

    def __init__(self) -> None:
        self.deferring = True
        self._open: deque[Callable[[], None]] = deque()
        self._closed: deque[deque[Callable[[], None]]] = deque()

    def __len__(self) -> int:
        return len(self._open) + sum(map(len, self._closed))

    def put(self, work: Callable[[], None]) -> None:
        """Append one piece of work; it holds its operands until it has run."""
        self._open.append(work)

    def close(self) -> None:
        """End the batch: what was put since the last `close` waits for one `pop`."""
        self._closed.append(self._open)
        self._open = deque()

    def pop(self) -> None:
        """Run the oldest closed batch."""
        self._run(self._closed.popleft())

    def run_open(self) -> None:
        """Run what was put since the last `close`."""
        self._run(self._open)

    def flush(self) -> None:
        """Run everything that waits, in the order it came."""
        while self._closed:
            self.pop()
        self.run_open()

    @staticmethod
    def _run(works: deque[Callable[[], None]]) -> None:
        with torch.no_grad():
            while works:
                works.popleft()()


def deliver(weight: Tensor, write: Write, queue: WeightGradQueue | None = None) -> Tensor | None:
    """Bring a gradient to where `weight` wants it; the return value is what autograd gets.

    Whether to store or to add is decided when the work runs, so that delayed and immediate gradients of one weight
    (embedding and head are used by every prediction depth) mix in any order. In plain mode a delayed gradient is added
    to ``weight.grad`` when the queue is flushed.
    """
    if queue is not None and queue.deferring:
        queue.put(lambda: _finish(weight, write))
        return None
    if _has_buffer(weight):
        _finish(weight, write)
        return None
    return _plain(weight, write)


def _has_buffer(weight: Tensor) -> bool:
    return getattr(weight, "main_grad", None) is not None


def _finish(weight: Tensor, write: Write) -> None:
    if _has_buffer(weight):
        write(weight.main_grad, getattr(weight, "grad_ready", False))  # type: ignore[attr-defined]
        weight.grad_ready = True  # type: ignore[attr-defined]
    else:
        gradient = _plain(weight, write)
        weight.grad = gradient if weight.grad is None else weight.grad + gradient


def _plain(weight: Tensor, write: Write) -> Tensor:
    """The gradient as autograd wants it: summed in FP32 (FP64 for FP64 weights), then in the weight's format."""
    buffer = torch.empty(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
    write(buffer, False)
    return buffer.to(weight.dtype)


def deliver_value(weight: Tensor, gradient: Tensor) -> Tensor | None:
    """`deliver` for a gradient that already exists, such as a norm's."""

    def write(buffer: Tensor, accumulate: bool) -> None:
        if accumulate:
            buffer.add_(gradient)
        else:
            buffer.copy_(gradient)

    return deliver(weight, write)
