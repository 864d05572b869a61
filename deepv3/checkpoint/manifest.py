"""What a checkpoint is: a folder of shards, and a manifest that names, places and proves every tensor in them.

    step-00000123/manifest.json          JSON; carries the SHA-256 of its own content
                  rank-00000.safetensors one per rank, see shards.py

A parameter is not stored whole. Each rank writes the slices it owns of the flattened global tensor, so that any other
layout can put the tensor together: kinds ``master`` (FP32), ``exp_avg`` and ``exp_avg_sq`` (storage format) and, if
averaging is on, ``ema`` (FP32). Buffers (router biases) are written whole by one rank. Low-precision weights are not
stored: they are the masters, rounded.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from deepv3.errors import CheckpointError

NAME = "manifest.json"
FORMAT = "deepv3-checkpoint"
VERSION = 1
STATE = ("master", "exp_avg", "exp_avg_sq")
SHARD = re.compile(r"rank-\d{5,}\.safetensors")
STEP = re.compile(r"step-(\d{8,})")
LEAST_BYTES = 8  # of an element of a parameter: an FP32 master and two BF16 moments


@dataclass
class Shard:
    """One file. slices: (parameter, first, end) of each flat slice in it; buffers: names of those stored whole."""

    name: str
    size: int
    sha256: str
    slices: list[tuple[str, int, int]]
    buffers: list[str]


@dataclass
class Manifest:
    """All of a checkpoint but its tensors.

    step: finished optimizer steps; kinds: what is stored of every parameter; shapes: global shapes of the parameters;
    config: the run's, resolved; counters: the engine's; clients: the training loop's own state on each rank, JSON.
    """

    step: int
    grid: dict[str, int]
    kinds: list[str]
    shapes: dict[str, list[int]]
    shards: list[Shard]
    config: dict[str, Any]
    config_hash: str
    counters: dict[str, int]
    clients: list[dict[str, Any]]
    versions: dict[str, str]

    def to_json(self) -> str:
        """The file's text."""
        content = json.loads(json.dumps(asdict(self)))  # as it will be read: keys are strings, tuples lists
        return json.dumps({"format": FORMAT, "version": VERSION, "sha256": _digest(content), "content": content})


def key(kind: str, name: str, first: int) -> str:
    """Key of a slice inside its shard."""
    return f"{kind}/{name}/{first}"


def folder_name(step: int) -> str:
    """Name of a step's checkpoint."""
    return f"step-{step:08d}"


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint. Raises CheckpointError, naming file and reason, where it is missing or damaged."""
    path = folder / NAME
    try:
        outer = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing, so {folder} is no complete checkpoint") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(outer, dict) or outer.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is not a manifest of ours (format {FORMAT})")
    if outer.get("version") != VERSION:
        raise CheckpointError(f"{path}: version {outer.get('version')}, this program reads {VERSION}")
    content = outer.get("content")
    if not isinstance(content, dict) or outer.get("sha256") != _digest(content):
        raise CheckpointError(f"{path}: content does not match its SHA-256; the file was damaged or edited")
    try:
        manifest = _typed(content, Manifest, "content")
        _check(manifest)
    except ValueError as error:
        raise CheckpointError(f"{path}: does not follow the format: {error}") from None
    return manifest


def missing_slices(manifest: Manifest) -> Iterable[str]:
    """Every gap and overlap in the parameters' slices, in words; nothing for a sound manifest."""
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in manifest.shapes}
    for shard in manifest.shards:
        for name, first, end in shard.slices:
            spans[name].append((first, end))
    for name, shape in manifest.shapes.items():
        at = 0
        for first, end in sorted(spans[name]):
            if first != at:
                how = "twice" if first < at else "nowhere"
                yield f"{name}: elements {min(at, first)} to {max(at, first)} are stored {how}"
            at = max(at, end)
        if at != math.prod(shape):
            yield f"{name}: slices end at element {at}, the tensor has {math.prod(shape)}"


def _typed(value: Any, hint: Any, where: str) -> Any:
    """A JSON value as what a type hint says, through dataclasses, lists, dictionaries and tuples. Raises ValueError."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        if not isinstance(value, dict) or value.keys() != hints.keys():
            raise ValueError(f"{where} does not have the fields {', '.join(hints)}")
        return kind(**{name: _typed(value[name], hints[name], f"{where}.{name}") for name in hints})  # type: ignore
    if kind is Any:
        return value
    if kind is tuple and isinstance(value, list) and len(value) == len(inner):
        return tuple(_typed(item, one, where) for item, one in zip(value, inner))
    if kind is list and isinstance(value, list):
        return [_typed(item, inner[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if kind is dict and isinstance(value, dict):
        return {name: _typed(item, inner[1], f"{where}.{name}") for name, item in value.items()}
    if kind in (tuple, list, dict) or type(value) is not kind:
        raise ValueError(f"{where} is {type(value).__name__}, not {getattr(kind, '__name__', kind)}")
    return value


def _check(manifest: Manifest) -> None:
    """Names stay inside the folder, every parameter is whole, and no shard promises more than it holds. Raises
    ValueError."""
    if manifest.step < 0 or manifest.kinds[: len(STATE)] != list(STATE) or len(set(manifest.kinds)) > len(STATE) + 1:
        raise ValueError(f"step {manifest.step} with kinds {manifest.kinds}")
    if manifest.grid.keys() != {"world_size", "pp_size", "ep_size"} or min(manifest.grid.values()) < 1:
        raise ValueError(f"grid {manifest.grid}")
    if manifest.counters.keys() != {"applied_steps", "skipped_steps"} or not manifest.clients:
        raise ValueError(f"counters {manifest.counters}, {len(manifest.clients)} clients")
    if any(not 0 <= count < 2**63 for count in (manifest.step, *manifest.counters.values())):
        raise ValueError(f"step {manifest.step}, counters {manifest.counters}")
    for shard in manifest.shards:
        if not SHARD.fullmatch(shard.name):
            raise ValueError(f"{shard.name!r} is no shard's name")
        elements = sum(end - first for _, first, end in shard.slices)
        if any(not 0 <= first < end for _, first, end in shard.slices) or elements * LEAST_BYTES > shard.size:
            raise ValueError(f"{shard.name} of {shard.size} bytes cannot hold its {elements} elements")
    if any(name not in manifest.shapes for shard in manifest.shards for name, *_ in shard.slices):
        raise ValueError("a slice of a parameter without a shape")
    if any(size < 0 for shape in manifest.shapes.values() for size in shape):
        raise ValueError("a shape with a negative size")
    for problem in missing_slices(manifest):
        raise ValueError(problem)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
