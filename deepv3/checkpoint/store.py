"""Checkpoints of a run: saved by all ranks together, published by one rename, verified before they are read.

Saving: rank 0 makes a hidden folder; every rank writes its shard there and sees it on the disk; rank 0 adds the
manifest and renames the folder. A kill at any instant leaves the whole checkpoint or a hidden folder that nobody reads.
Each act is agreed on: where one rank fails, all raise, and the hidden folder goes.

Loading: slices are read by global name and range, so the layout that wrote them does not matter.
"""

import math
import platform
import shutil
from dataclasses import asdict
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import deepv3
from deepv3.checkpoint import manifest as manifests
from deepv3.checkpoint import publish, shards
from deepv3.checkpoint.agree import agree
from deepv3.checkpoint.find import FOLDER, check_run_folder, choose, newest, problems
from deepv3.checkpoint.manifest import Manifest, Shard
from deepv3.checkpoint.reader import Reader, read_tensors
from deepv3.config.compose import config_hash
from deepv3.config.schema import Config
from deepv3.dist import Grid
from deepv3.errors import CheckpointError
from deepv3.optim.ema import WeightAverage
from deepv3.optim.engine import Engine

__all__ = ["Reader", "check_run_folder", "choose", "load", "newest", "read_tensors", "save"]
log = getLogger(__name__)


def save(
    run_dir: Path,
    step: int,
    engine: Engine,
    model: nn.Module,
    average: WeightAverage | None,
    grid: Grid,
    cfg: Config,
    client: dict[str, Any],
) -> Path:
    """Write and publish run_dir/checkpoints/step-<step>; collective. Returns its path.

    client: this rank's loop state, JSON. Afterwards the newest cfg.checkpoint.keep checkpoints are left. Raises
    ResourceError where the disk does not suffice, CheckpointError where a rank cannot write; then nothing was published
    and the older checkpoints stand.
    """
    final = Path(run_dir) / FOLDER / manifests.folder_name(step)
    if average is not None:
        average.wait()
    tensors, slices, shapes = _collect(engine, average)
    buffers = persistent_buffers(model) if grid.dp_rank == 0 else {}
    tensors += [(f"buffer/{name}", buffer) for name, buffer in buffers.items()] + _generators()
    part = {"slices": slices, "buffers": list(buffers), "shapes": shapes, "client": client}
    chief = grid.rank == 0
    hidden = Path(agree(grid, f"make a folder for {final}", lambda: str(publish.prepare(final)) if chief else None)[0])
    shard = hidden / f"rank-{grid.rank:05d}.safetensors"
    try:
        needed = sum(grid.gather(shards.size_of(tensors)))
        agree(grid, f"look at the disk of {final}", lambda: publish.require_space(hidden, needed) if chief else None)
        written = agree(grid, f"write {shard}", lambda: [*shards.write(shard, tensors), part])
        content = _manifest(step, grid, cfg, engine.counters(), average is not None, written)
        agree(grid, f"publish {final}", lambda: publish.publish(hidden, final, content) if chief else None)
    except BaseException:
        if chief:
            shutil.rmtree(hidden, ignore_errors=True)
        raise
    if chief:
        try:
            publish.retain(final, cfg.checkpoint.keep)
        except OSError as error:
            log.warning("older checkpoints in %s could not be removed: %s", final.parent, error)
    return final


def _collect(engine: Engine, average: WeightAverage | None) -> tuple[list[tuple[str, Tensor]], list, dict[str, list]]:
    tensors: list[tuple[str, Tensor]] = []
    slices, shapes = [], {}
    for fragment in engine.fragments():
        kinds = {kind: getattr(fragment, kind) for kind in manifests.STATE}
        if average is not None:
            kinds["ema"] = average.view(fragment)
        tensors += [(manifests.key(kind, fragment.name, fragment.lo), tensor) for kind, tensor in kinds.items()]
        slices.append((fragment.name, fragment.lo, fragment.hi))
        shapes[fragment.name] = list(fragment.shape)
    return tensors, slices, shapes


def _generators() -> list[tuple[str, Tensor]]:
    states = [("rng/cpu", torch.get_rng_state())]
    return states + ([("rng/cuda", torch.cuda.get_rng_state())] if torch.cuda.is_available() else [])


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that are state (router biases), not derived (rope tables)."""
    stored = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def _manifest(step: int, grid: Grid, cfg: Config, counters: dict, averaged: bool, written: list) -> Manifest:
    """written: [size, sha256, part] of each rank, as `save` gathers them."""
    files = [
        Shard(f"rank-{rank:05d}.safetensors", size, digest, part["slices"], part["buffers"])
        for rank, (size, digest, part) in enumerate(written)
    ]
    return Manifest(
        step=step,
        grid={"world_size": grid.world_size, "pp_size": grid.pp_size, "ep_size": grid.ep_size},
        kinds=[*manifests.STATE, *(["ema"] if averaged else [])],
        shapes={name: shape for *_, part in written for name, shape in part["shapes"].items()},
        shards=files,
        config=asdict(cfg),
        config_hash=config_hash(cfg),
        counters=counters,
        clients=[part["client"] for *_, part in written],
        versions={"deepv3": deepv3.__version__, "torch": torch.__version__, "python": platform.python_version()},
    )


def load(path: Path, engine: Engine, model: nn.Module, average: WeightAverage | None, grid: Grid) -> dict[str, Any]:
    """Put a checkpoint's state into engine, model buffers and average, from any layout; collective. Returns `client`.

    The weights are derived from the masters; an average that was not stored starts from them. On the world size that
    saved, each rank gets its own client and random generators back; on another, all get rank 0's client. Raises
    CheckpointError on all ranks, naming file and reason, where anything is missing, damaged or of another shape.
    """
    path = Path(path)
    wrong = problems(path, grid)
    if wrong:
        raise CheckpointError("; ".join(wrong) + f". Give train.resume another checkpoint of {path.parent}")
    reader = Reader(path)
    held = sum(grid.gather(sum(fragment.hi - fragment.lo for fragment in engine.fragments())))
    stored = sum(math.prod(shape) for shape in reader.shapes.values())
    agree(grid, f"read {path}", lambda: _fill(reader, engine, model, average))
    if held != stored:
        surplus = reader.shapes.keys() - dict(model.named_parameters())
        raise CheckpointError(
            f"{path}: holds {stored} parameters, this model {held}; it has no {', '.join(sorted(surplus)[:5])}; "
            "set the fields of `model` to the checkpoint's"
        )
    engine.refresh_weights()
    engine.set_counters(**reader.manifest.counters)
    if average is not None and "ema" not in reader.manifest.kinds:
        average.reset()
    if reader.manifest.grid["world_size"] == grid.world_size:
        _restore_generators(reader, grid.rank)
    clients = reader.manifest.clients
    return clients[grid.rank] if len(clients) == grid.world_size else clients[0]


@torch.no_grad()
def _fill(reader: Reader, engine: Engine, model: nn.Module, average: WeightAverage | None) -> None:
    mine = engine.fragments()
    for name, shape in {fragment.name: fragment.shape for fragment in mine}.items():
        stored = reader.shapes.get(name)
        if stored != shape:
            raise CheckpointError(
                f"{reader.folder}: {name} is {list(stored) if stored else 'absent'}, this model's is {list(shape)}; "
                "set the fields of `model` to the checkpoint's"
            )
    for fragment in mine:
        for kind in manifests.STATE:
            reader.read_flat(kind, fragment.name, fragment.lo, fragment.hi, getattr(fragment, kind))
        if average is not None and "ema" in reader.manifest.kinds:
            reader.read_flat("ema", fragment.name, fragment.lo, fragment.hi, average.view(fragment))
    for name, buffer in persistent_buffers(model).items():
        value = reader.buffer(name)
        if value.shape != buffer.shape:
            raise CheckpointError(
                f"{reader.folder}: buffer {name} is {list(value.shape)}, this model's is {list(buffer.shape)}"
            )
        buffer.copy_(value)


def _restore_generators(reader: Reader, rank: int) -> None:
    cpu, cuda = (reader.generator_state(rank, kind) for kind in ("cpu", "cuda"))
    if cpu is not None:
        torch.set_rng_state(cpu)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
