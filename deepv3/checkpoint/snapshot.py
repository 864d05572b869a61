"""One copy in host memory of what a rank saves, laid out as its file: training goes on while it is written.

`take` copies; on CUDA onto page-locked memory and on a stream of its own, so the host goes on at once and the device's
next optimizer step waits for the copy alone (`Engine.hold`). The memory is kept and used again: state bytes once per
rank, never twice. The copy stays until the next `take`, so a run can also be wound back to it (`put_back`).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from deepv3.checkpoint import shards
from deepv3.errors import ResourceError

CHUNK = 1 << 30  # bytes; page-locked memory comes in powers of two, so only the last chunk wastes any


class Snapshot:
    """A copy of tensors, and a shards.Source. One per rank, for the same tensors each time but for small ones."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._header = b""
        self._places: list[tuple[str, int, int]] = []  # (key, first byte, bytes)
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self._header) + self._bytes

    @property
    def _bytes(self) -> int:
        return sum(count for *_, count in self._places)

    @torch.no_grad()
    def take(self, tensors: list[tuple[str, Tensor]]) -> torch.cuda.Event | None:
        """Copy contiguous tensors; what was held before is gone. Returns what a change of a CUDA tensor must wait for.

        Raises ResourceError where the host has no memory for the copy.
        """
        self._header, self._places, at = shards.header(tensors), [], 0
        for key, tensor in tensors:
            self._places.append((key, at, tensor.nbytes))
            at += tensor.nbytes
        on_device = any(tensor.is_cuda for _, tensor in tensors)
        self._make_room(at, on_device)
        if not on_device:
            self._copy(tensors)
            return None
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._copy(tensors)
            self._copied = torch.cuda.Event()
            self._copied.record()
        return self._copied

    def _make_room(self, size: int, pinned: bool) -> None:
        have = sum(chunk.numel() for chunk in self._chunks)
        try:
            while have < size:
                self._chunks.append(torch.empty(min(CHUNK, size - have), dtype=torch.uint8, pin_memory=pinned))
                have += self._chunks[-1].numel()
        except RuntimeError as error:
            raise ResourceError(
                f"no host memory for a copy of this rank's state, {size / 2**30:.2f} GiB, {have / 2**30:.2f} GiB of it "
                f"taken ({error}); set checkpoint.asynchronous=false, which stops training while it writes, and "
                "train.spike=warn"
            ) from None

    def _copy(self, tensors: list[tuple[str, Tensor]]) -> None:
        for (_, first, _), (_, tensor) in zip(self._places, tensors):
            source = shards.as_bytes(tensor)
            for host, begin, end in self._spans(first, source.numel()):
                host.copy_(source[begin:end], non_blocking=True)

    def _spans(self, first: int, count: int) -> Iterator[tuple[Tensor, int, int]]:
        """The host memory of bytes [first, first + count), piece by piece: (piece, its begin, its end) within them."""
        base = 0
        for chunk in self._chunks:
            lo, hi = max(first, base), min(first + count, base + chunk.numel())
            if lo < hi:
                yield chunk[lo - base : hi - base], lo - first, hi - first
            base += chunk.numel()

    def blocks(self) -> Iterator[bytes | memoryview]:
        """See shards.Source; waits for the copy."""
        self.wait()
        yield self._header
        for piece, *_ in self._spans(0, self._bytes):
            for part in piece.split(shards.BLOCK):
                yield part.numpy().data

    def wait(self) -> None:
        """Return once the copy is complete."""
        if self._copied is not None:
            self._copied.synchronize()

    @torch.no_grad()
    def put_back(self, tensors: list[tuple[str, Tensor]]) -> None:
        """Copy everything back into the tensors that were taken, of the same keys and sizes."""
        self.wait()
        assert [(key, tensor.nbytes) for key, tensor in tensors] == [(key, n) for key, _, n in self._places]
        for (_, first, _), (_, tensor) in zip(self._places, tensors):
            target = shards.as_bytes(tensor)
            for host, begin, end in self._spans(first, target.numel()):
                target[begin:end].copy_(host)
