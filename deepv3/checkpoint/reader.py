"""Tensors out of a checkpoint, whole or in part, for any layout and for no layout at all (export).

A reader knows from the manifest which shard holds which elements; shards are mapped when first needed and only the
bytes asked for are read.
"""

import bisect
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from deepv3.checkpoint import manifest as manifests
from deepv3.checkpoint.shards import Opened, sha256
from deepv3.errors import CheckpointError

_proven: set[tuple] = set()  # shards whose hash this process has already seen to be right


class Reader:
    """Random access to a checkpoint. Raises CheckpointError where it is incomplete: missing or of another size.

    shapes: global shape of every parameter; buffers: names of those stored whole. complete: whether every shard is
    looked for at once; else each one when it is read, for a rank that needs a few of thousands.
    """

    def __init__(self, folder: str | Path, complete: bool = True):
        self.folder = Path(folder)
        self.manifest = manifests.read(self.folder)
        self.shapes = {name: tuple(shape) for name, shape in self.manifest.shapes.items()}
        self._shards = {shard.name: shard for shard in self.manifest.shards}
        self._where: dict[str, list[tuple[int, int, str]]] = {name: [] for name in self.shapes}
        self._buffers: dict[str, str] = {}
        self._opened: dict[str, Opened] = {}
        for shard in self.manifest.shards:
            for name, first, end in shard.slices:
                self._where[name].append((first, end, shard.name))
            self._buffers |= dict.fromkeys(shard.buffers, shard.name)
            if complete:
                _require_size(self.folder / shard.name, shard.size)
        for places in self._where.values():
            places.sort()

    @property
    def buffers(self) -> list[str]:
        """Names of the buffers."""
        return list(self._buffers)

    def verify(self, part: int = 0, parts: int = 1) -> tuple[list[str], list[str]]:
        """What is wrong with every parts-th shard, beginning with `part`, in words, and which of them are not there."""
        problems, absent = [], []
        for shard in self.manifest.shards[part::parts]:
            if (self.folder / shard.name).exists():
                problems.append(self.look_at(shard.name))
            else:
                absent.append(shard.name)
        return [problem for problem in problems if problem], absent

    def look_at(self, name: str) -> str | None:
        """What is wrong with a shard, in words: its size and hash against the manifest's."""
        shard, path = self._shards[name], self.folder / name
        try:
            stat = path.stat()
            seen = (path.resolve(), stat.st_size, stat.st_mtime_ns, shard.sha256)
            if seen in _proven:
                return None
            _require_size(path, shard.size)
            if sha256(path) != shard.sha256:
                return f"{path}: content does not match its SHA-256 in the manifest: damaged"
            _proven.add(seen)
        except CheckpointError as error:
            return str(error)
        except OSError as error:
            return f"{path}: cannot be read: {error.strerror or error}"
        return None

    def read_flat(self, kind: str, name: str, lo: int, hi: int, out: Tensor) -> None:
        """Elements [lo, hi) of a parameter's flattened tensor into `out` [hi - lo], of any device and format."""
        places = self._where[name]
        at = bisect.bisect_right(places, lo, key=lambda place: place[0]) - 1
        while lo < hi:  # the manifest has no gaps
            first, end, shard = places[at]
            stop = min(hi, end)
            piece = self._open(shard).read(manifests.key(kind, name, first), lo - first, stop - first)
            out[: stop - lo].copy_(piece)
            out, lo, at = out[stop - lo :], stop, at + 1

    def read(self, name: str, kind: str = "master", index: int | None = None) -> Tensor:
        """A parameter as an FP32 host tensor of its global shape; index: only that entry of the leading dimension.

        kind: master, exp_avg, exp_avg_sq or ema. Raises CheckpointError for a name or kind that is not stored.
        """
        if name not in self.shapes:
            raise CheckpointError(f"{self.folder}: holds no parameter {name}")
        if kind not in self.manifest.kinds:
            hint = "; the run had no weight average (optim.ema_decay = 0)" if kind == "ema" else ""
            raise CheckpointError(f"{self.folder}: stores {', '.join(self.manifest.kinds)}, not {kind}{hint}")
        shape = self.shapes[name]
        lo, hi = 0, math.prod(shape)
        if index is not None:
            shape = shape[1:]
            lo, hi = index * math.prod(shape), (index + 1) * math.prod(shape)
        out = torch.empty(hi - lo)
        self.read_flat(kind, name, lo, hi, out)
        return out.view(shape)

    def buffer(self, name: str) -> Tensor:
        """A buffer, whole."""
        if name not in self._buffers:
            raise CheckpointError(f"{self.folder}: holds no buffer {name}")
        return self._open(self._buffers[name]).read(f"buffer/{name}")

    def sees(self, name: str) -> bool:
        """Whether a buffer's shard is on this disk; True for a buffer that is stored nowhere."""
        return name not in self._buffers or (self.folder / self._buffers[name]).exists()

    def generator_state(self, rank: int, kind: str) -> Tensor | None:
        """State of a rank's random generator, cpu or cuda; None where it was not stored."""
        shard = self._open(self.manifest.shards[rank].name)
        return shard.read(f"rng/{kind}") if f"rng/{kind}" in shard.keys else None

    def _open(self, name: str) -> Opened:
        if name not in self._opened:
            _require_size(self.folder / name, self._shards[name].size)
            self._opened[name] = Opened(self.folder / name)
        return self._opened[name]


def read_tensors(folder: str | Path, names: Iterable[str], ema: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Whole FP32 parameters one after the other, masters or their average; one is in memory at a time."""
    reader = Reader(folder)
    for name in names:
        yield name, reader.read(name, "ema" if ema else "master")


def _require_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; the checkpoint is incomplete") from None
    if found != size:
        raise CheckpointError(f"{path}: has {found} bytes, its manifest says {size}; the checkpoint is incomplete")
