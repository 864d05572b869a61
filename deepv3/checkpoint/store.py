"""Checkpoints of a run: saved by all ranks together, published by one rename, verified before they are read.

`save` writes straight from the state while training waits; saver.py writes from a copy while training goes on; both do
it by write.py. Loading: slices are read by global name and range, so the layout that wrote them does not matter.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepv3.checkpoint import manifest as manifests
from deepv3.checkpoint import shards
from deepv3.checkpoint.agree import agree
from deepv3.checkpoint.find import FOLDER, check_run_folder, choose, newest, other_checkpoints, problems
from deepv3.checkpoint.reader import Reader, read_tensors
from deepv3.checkpoint.state import collect, persistent_buffers, set_generators
from deepv3.checkpoint.write import manifest_of, write
from deepv3.config.schema import Config
from deepv3.dist import Grid
from deepv3.errors import CheckpointError
from deepv3.optim.ema import WeightAverage
from deepv3.optim.engine import Engine

__all__ = ["Reader", "check_run_folder", "choose", "load", "newest", "persistent_buffers", "read_tensors", "save"]


def path_of(run_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return Path(run_dir) / FOLDER / manifests.folder_name(step)


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

    client: this rank's loop state, JSON. Afterwards cfg.checkpoint says which older checkpoints are left. Raises
    ResourceError where the disk does not suffice, CheckpointError where a rank cannot write; then nothing was published
    and the older checkpoints stand.
    """
    state = collect(engine, model, average, grid, client)
    final = path_of(run_dir, step)
    write(final, shards.Live(state.tensors), manifest_of(step, state, grid, cfg), state.part, grid, cfg)
    return final


def load(path: Path, engine: Engine, model: nn.Module, average: WeightAverage | None, grid: Grid) -> dict[str, Any]:
    """Put a checkpoint's state into engine, model buffers and average, from any layout; collective. Returns `client`.

    The weights are derived from the masters; an average that was not stored starts from them. On the world size that
    saved, each rank gets its own client and random generators back; on another, all get rank 0's client. Raises
    CheckpointError on all ranks, naming file and reason, where anything is missing, damaged or of another shape.
    """
    path = Path(path)
    wrong = problems(path, grid)
    if wrong:
        raise CheckpointError("; ".join(wrong) + f". {other_checkpoints(path)}")
    reader = Reader(path, complete=False)
    held = sum(grid.gather(sum(fragment.hi - fragment.lo for fragment in engine.fragments())))
    stored = sum(math.prod(shape) for shape in reader.shapes.values())
    elsewhere = _buffers_of_other_disks(reader, list(persistent_buffers(model)), grid)
    agree(grid, f"read {path}", lambda: _fill(reader, engine, model, average, elsewhere))
    if held != stored:
        here = grid.gather([name for name, _ in model.named_parameters()])
        surplus = reader.shapes.keys() - {name for names in here for name in names}
        raise CheckpointError(
            f"{path}: holds {stored} parameters, this model {held}; it has no {', '.join(sorted(surplus)[:5])}; "
            "set the fields of `model` to the checkpoint's"
        )
    engine.refresh_weights()
    engine.set_counters(**reader.manifest.counters)
    if average is not None and "ema" not in reader.manifest.kinds:
        average.reset()
    if reader.manifest.grid["world_size"] == grid.world_size:
        set_generators({f"rng/{kind}": reader.generator_state(grid.rank, kind) for kind in ("cpu", "cuda")})
    clients = reader.manifest.clients
    return clients[grid.rank] if len(clients) == grid.world_size else clients[0]


@torch.no_grad()
def _fill(
    reader: Reader, engine: Engine, model: nn.Module, average: WeightAverage | None, elsewhere: dict[str, Tensor]
) -> None:
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
        value = elsewhere[name] if name in elsewhere else reader.buffer(name)
        if value.shape != buffer.shape:
            raise CheckpointError(
                f"{reader.folder}: buffer {name} is {list(value.shape)}, this model's is {list(buffer.shape)}"
            )
        buffer.copy_(value)


def _buffers_of_other_disks(reader: Reader, names: list[str], grid: Grid) -> dict[str, Tensor]:
    """Buffers that this rank needs and whose shard lies on another node's disk: small, and stored by one rank only."""
    mine = [name for name in names if not reader.sees(name)]
    asked = sorted({name for absent in grid.gather(mine) for name in absent})
    if not asked:
        return {}
    seen = grid.gather([name for name in asked if reader.sees(name)])
    giver = {name: next((rank for rank, there in enumerate(seen) if name in there), None) for name in asked}

    def give() -> dict[str, list]:
        return {name: reader.buffer(name).tolist() for name, rank in giver.items() if rank == grid.rank}

    given = agree(grid, f"read the buffers of {reader.folder}", give)
    return {name: torch.tensor(values) for found in given for name, values in found.items() if name in mine}
