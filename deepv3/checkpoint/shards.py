"""One rank's tensors in one safetensors file, written as a stream.

The library's own writer wants every tensor as bytes in memory at once. This one lays out the header first, then copies,
hashes and writes 64 MiB at a time, so that a GPU rank needs no second copy of its state on the host. Reading is the
library's, which maps the file. Keys: ``<kind>/<global name>/<first element>`` for flat slices, ``<kind>/<name>`` else.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepv3.errors import CheckpointError

BLOCK = 1 << 26
FORMATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int64: "I64"}


class Written(NamedTuple):
    """A finished file: its size in bytes and the SHA-256 of its content."""

    size: int
    sha256: str


def size_of(tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Bytes that `write` will put on the disk."""
    tensors = list(tensors)
    return len(_header(tensors)) + sum(tensor.nbytes for _, tensor in tensors)


@torch.no_grad()
def write(path: Path, tensors: list[tuple[str, Tensor]]) -> Written:
    """Write contiguous tensors of any device and see them on the disk (fsync). Raises OSError."""
    digest, size = hashlib.sha256(), 0
    staging = torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True) if any(t.is_cuda for _, t in tensors) else None
    with open(path, "wb") as file:
        for block in _blocks(tensors, staging):
            file.write(block)
            digest.update(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(path: Path) -> None:
    """See a folder's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header(tensors: list[tuple[str, Tensor]]) -> bytes:
    entries, end = {}, 0
    for key, tensor in tensors:
        begin, end = end, end + tensor.nbytes
        entries[key] = {"dtype": FORMATS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _blocks(tensors: list[tuple[str, Tensor]], staging: Tensor | None) -> Iterator[bytes | memoryview]:
    yield _header(tensors)
    for _, tensor in tensors:
        for part in tensor.detach().reshape(-1).view(torch.uint8).split(BLOCK):
            if part.is_cuda:
                assert staging is not None
                host = staging[: part.numel()]
                host.copy_(part)
            else:
                host = part
            yield host.numpy().data


class Opened:
    """A shard mapped for reading. Raises CheckpointError, naming the file, where its content is no safetensors."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            self.keys = set(self._file.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None

    def read(self, key: str, lo: int = 0, hi: int | None = None) -> Tensor:
        """Elements [lo, hi) of a flat tensor, or the whole of any. Raises CheckpointError where they are not there."""
        if key not in self.keys:
            raise CheckpointError(f"{self.path}: has no tensor {key}")
        found = self._file.get_slice(key)[lo:hi] if hi is not None else self._file.get_tensor(key)
        if hi is not None and found.shape != (hi - lo,):
            raise CheckpointError(f"{self.path}: {key} has no elements {lo} to {hi}")
        return found
