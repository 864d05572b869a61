"""The collective act of writing one checkpoint: a hidden folder, a shard per rank, the manifest, one rename.

    folder    rank 0 makes .step-N.<token>.partial; the first rank of each node that does not see it makes its own
    space     each file system has room for the shards that will lie on it, or nothing is written
    shards    every rank writes its own and sees it on the disk
    publish   manifest and rename, on each file system; then older checkpoints go

A kill at any instant leaves the whole checkpoint or a hidden folder that nobody reads. Each act is agreed on: where one
rank fails, all raise, and the hidden folders go. The token is new each time, so a straggler of a killed attempt cannot
write into the folder of the next one, and network file systems have no stale entry for it.

With run_dir on a disk of each node, a checkpoint is spread over the nodes' folders: see docs/reliability.md.
"""

import os
import platform
import shutil
import time
from dataclasses import asdict
from logging import getLogger
from pathlib import Path
from typing import Any

import torch

import deepv3
from deepv3.checkpoint import manifest as manifests
from deepv3.checkpoint import publish, shards
from deepv3.checkpoint.agree import agree
from deepv3.checkpoint.manifest import Manifest, Shard
from deepv3.checkpoint.state import State
from deepv3.config.compose import config_hash
from deepv3.config.schema import Config
from deepv3.dist import Grid
from deepv3.errors import CheckpointError

log = getLogger(__name__)


def write(final: Path, source: shards.Source, content: Manifest, part: dict[str, Any], grid: Grid, cfg: Config) -> int:
    """Write and publish `final`; collective over the ranks of `grid`. Returns the bytes of all shards.

    source: this rank's shard; content: the manifest but for its shards, shapes and clients, which come from every
    rank's `part` (state.py). Raises ResourceError where a disk does not suffice, CheckpointError where a rank cannot
    write; then nothing was published and the older checkpoints stand.
    """
    hidden, chiefs = _folder(final, grid)
    chief = grid.rank in chiefs
    shard = hidden / shard_name(grid.rank)
    try:
        _require_space(hidden, source.size, chiefs, grid)
        written = agree(grid, f"write {shard}", lambda: [*shards.write(shard, source), part])
        _complete(content, written)
        agree(grid, f"publish {final}", lambda: publish.publish(hidden, final, content) if chief else None)
    except BaseException:
        if chief:
            shutil.rmtree(hidden, ignore_errors=True)
        raise
    if chief:
        try:
            publish.retain(final, cfg.checkpoint.keep, cfg.checkpoint.keep_every)
        except OSError as error:
            log.warning("older checkpoints in %s could not be removed: %s", final.parent, error)
    return sum(size for size, *_ in written)


def shard_name(rank: int) -> str:
    """Name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def manifest_of(step: int, state: State, grid: Grid, cfg: Config) -> Manifest:
    """The part of a manifest that every rank knows."""
    return Manifest(
        step=step,
        grid={"world_size": grid.world_size, "pp_size": grid.pp_size, "ep_size": grid.ep_size},
        kinds=[*manifests.STATE, *(["ema"] if state.averaged else [])],
        shapes={},
        shards=[],
        config=asdict(cfg),
        config_hash=config_hash(cfg),
        counters=state.counters,
        clients=[],
        versions={"deepv3": deepv3.__version__, "torch": torch.__version__, "python": platform.python_version()},
    )


def _complete(content: Manifest, written: list) -> None:
    """written: [size, sha256, part] of each rank. Clients that are all alike are stored once."""
    for rank, (size, digest, part) in enumerate(written):
        content.shards.append(Shard(shard_name(rank), size, digest, part["slices"], part["buffers"]))
        content.shapes |= part["shapes"]
    clients = [part["client"] for *_, part in written]
    content.clients = clients[:1] if all(client == clients[0] for client in clients) else clients


def _folder(final: Path, grid: Grid) -> tuple[Path, list[int]]:
    """The hidden folder as this rank sees it, and the ranks that made one: rank 0 and those of further disks."""
    token = grid.gather(f"{time.time_ns():x}")[0]
    hidden = final.with_name(f".{final.name}.{token}.partial")
    what = f"make a folder for {final}"
    agree(grid, what, lambda: publish.prepare(hidden) if grid.rank == 0 else None)
    first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"

    def another_disk() -> bool:
        if grid.rank == 0 or not first_of_node or hidden.is_dir():
            return grid.rank == 0
        publish.prepare(hidden)
        return True

    return hidden, [rank for rank, made in enumerate(agree(grid, what, another_disk)) if made]


def _require_space(hidden: Path, size: int, chiefs: list[int], grid: Grid) -> None:
    def look() -> int:
        if not hidden.is_dir():
            raise CheckpointError(
                f"{hidden.parent} is not there: run_dir lies on a file system that all ranks share, or on one of each "
                "node that its ranks share"
            )
        return size

    sizes = agree(grid, f"look at the disk of {hidden.parent}", look)
    # the ranks of a node are consecutive, so a rank writes to the disk of the nearest chief at or below it
    last = next((chief for chief in chiefs if chief > grid.rank), grid.world_size)
    needed = sum(sizes[grid.rank : last]) if grid.rank in chiefs else 0
    agree(grid, f"look at the disk of {hidden.parent}", lambda: publish.require_space(hidden, needed))
