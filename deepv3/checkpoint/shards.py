"""One rank's tensors in one safetensors file, written as a stream.

The library's own writer wants every tensor as bytes in memory at once. This one lays out the header first, then hashes
and writes a stream of blocks, which come from the tensors themselves, 64 MiB at a time and without a second copy of the
state (`Live`), or from the copy of them that training has left behind (snapshot.py). Reading is the library's, which
maps the file. Keys: ``<kind>/<global name>/<first element>`` for flat slices, ``<kind>/<name>`` else.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

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


class Source(Protocol):
    """A file's content. size: bytes."""

    @property
    def size(self) -> int: ...

    def blocks(self) -> Iterator[bytes | memoryview]:
        """The content from the first byte to the last."""


def write(path: Path, source: Source) -> Written:
    """Write a file and see it on the disk (fsync). Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for block in source.blocks():
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


def header(tensors: Iterable[tuple[str, Tensor]]) -> bytes:
    """What stands before the tensors' bytes: their keys, formats, shapes and places."""
    entries, end = {}, 0
    for key, tensor in tensors:
        begin, end = end, end + tensor.nbytes
        entries[key] = {"dtype": FORMATS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's bytes, [nbytes] uint8, as a view."""
    return tensor.detach().reshape(-1).view(torch.uint8)


class Live:
    """Contiguous tensors of any device as a file; they must not change until it is written."""

    def __init__(self, tensors: list[tuple[str, Tensor]]):
        self._header, self._tensors = header(tensors), [tensor for _, tensor in tensors]
        self.size = len(self._header) + sum(tensor.nbytes for tensor in self._tensors)

    def blocks(self) -> Iterator[bytes | memoryview]:
        """See Source. A block of a device tensor is good until the next one is asked for."""
        yield self._header
        on_device = any(tensor.is_cuda for tensor in self._tensors)
        staging = torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True) if on_device else torch.empty(0)
        for tensor in self._tensors:
            for part in as_bytes(tensor).split(BLOCK):
                host = staging[: part.numel()].copy_(part) if part.is_cuda else part
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
