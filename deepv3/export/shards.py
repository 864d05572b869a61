"""Safetensors shards of planned size, written piece by piece.

Method: every file's tensors, and so its header and all offsets, are known before the first byte, which makes writing a
seek and a write: host memory holds one tensor, never a file. (The library's own writer takes a whole file's tensors at
once and copies them.) Planning packs whole layers while they fit; a larger layer has files of its own and is cut only
between units, a unit being what must not part: one expert's matrices. MTP layers start a file of their own, because
readers that draft with them open only the files that hold them. All of it in one file where it fits.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deepv3.export.files import write_json
from deepv3.export.table import Entry

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4_500_000_000
FORMAT_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}


class Unit(NamedTuple):
    """What must stay in one file. entries: of the name table; layer: theirs; apart: whether it is an MTP layer.

    tensors: their dtype and shape by name (meta tensors).
    """

    entries: tuple[Entry, ...]
    layer: int
    apart: bool
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(t.nbytes for t in self.tensors.values())


def plan(units: Iterable[Unit], shard_bytes: int) -> list[tuple[str, list[Unit]]]:
    """Assign units, in order, to files of at most shard_bytes; a larger unit gets its own. Returns (file, units)."""
    units = list(units)
    if sum(unit.nbytes for unit in units) <= shard_bytes:
        return [(SINGLE, units)]
    layer_bytes: dict[int, int] = {}
    for unit in units:
        layer_bytes[unit.layer] = layer_bytes.get(unit.layer, 0) + unit.nbytes
    shards: list[list[Unit]] = []
    room, last = 0, None
    for unit in units:
        new_layer = last is None or unit.layer != last.layer
        starts_mtp = unit.apart and not (last is not None and last.apart)
        too_large = unit.nbytes > room or (new_layer and layer_bytes[unit.layer] > room)
        if starts_mtp or too_large:
            shards.append([])
            room = shard_bytes
        shards[-1].append(unit)
        room -= unit.nbytes
        last = unit
    return [(f"model-{n:05d}-of-{len(shards):05d}.safetensors", shard) for n, shard in enumerate(shards, 1)]


class ShardFile:
    """One safetensors file whose tensors may arrive in any order; a context manager that ends with fsync.

    tensors: dtype and shape by name, meta tensors will do. Wider dtypes lie first, which keeps every offset a multiple
    of its element size (readers view the mapped bytes in place).
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]):
        self._plan = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        self._offset: dict[str, int] = {}
        end = 0
        for name, tensor in self._plan.items():
            self._offset[name] = end
            end += tensor.nbytes
            offsets = [self._offset[name], end]
            dtype = FORMAT_NAMES[tensor.dtype]
            header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._missing = set(self._plan)
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._start + end)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, on the CPU, at its place."""
        planned = self._plan[name]
        assert tensor.dtype == planned.dtype and tensor.shape == planned.shape, f"{name}: not as planned"
        self._missing.remove(name)
        self._file.seek(self._start + self._offset[name])
        self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> "ShardFile":
        return self

    def __exit__(self, kind, value, traceback) -> None:
        try:
            if kind is None:
                assert not self._missing, f"never written: {sorted(self._missing)[:3]}"
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def write_index(folder: Path, shards: list[tuple[str, list[Unit]]]) -> None:
    """model.safetensors.index.json: the file of every tensor and the total size; a single file has none."""
    if len(shards) == 1:
        return
    weight_map = {name: file for file, units in shards for unit in units for name in unit.tensors}
    total = sum(unit.nbytes for _, units in shards for unit in units)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
