"""The rank grid and everything that is the same for all ranks of a process: groups, device, seeds, determinism.

    rank = pp_rank * DP + dp_rank        dp_rank = edp_rank * EP + ep_rank

so the pipeline is outermost and the ranks that share one set of experts are consecutive. Every process group is a slice
of the one array ``Grid.ranks[pp, edp, ep]``. For 8 ranks with pp_size 2 and ep_size 2, ``ranks`` is
[[[0 1] [2 3]] [[4 5] [6 7]]]; rank 5 then has zero [4 5 6 7], ep [4 5], edp [5 7], pp_act and pp_grad [1 5].

`mirrored` (bidirectional DualPipe): pipeline ranks r and PP-1-r hold the same two stages, so they share zero and edp.
The sum of the twin copies, sharding over 2 x DP and counting each element once in the norm follow from that alone.

Groups are made when first asked for. Making one is collective, so all ranks ask for the same names in the same order.
Host-side agreement (gathered objects, barriers) goes over a gloo group of its own and never waits for the device.
"""

import dataclasses
import datetime
import json
import os
import random
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from deepv3.config.schema import Config
from deepv3.errors import ConfigError

# A device collective that takes this long has lost a peer; a host one may wait for rank 0 to tokenise a corpus.
DEVICE_TIMEOUT = datetime.timedelta(minutes=30)
HOST_TIMEOUT = datetime.timedelta(hours=12)

GROUPS = ("world", "host", "pp_act", "pp_grad", "zero", "ep", "edp", "ends")


class Grid:
    """Where this rank stands, and the groups it belongs to.

    world: all ranks; host: the same over gloo; pp_act, pp_grad: the ranks of one pipeline, two communicators because an
    activation and a gradient may travel to the same peer in either order; zero: the data ranks of one stage, over which
    dense optimizer state is sharded; ep: the ranks that share one set of experts; edp: the ranks that hold the same
    experts, over which their optimizer state is sharded; ends: the data ranks of the first and the last stage together
    (of one stage elsewhere), which share the embedding where the last stage has MTP modules.
    Raises ConfigError where world_size != pp_size x dp_size, ep_size does not divide dp_size, or an odd number of
    stages is to be mirrored.
    """

    def __init__(self, world_size: int, rank: int, pp_size: int = 1, ep_size: int = 1, mirrored: bool = False):
        for name, size in (("pp_size", pp_size), ("ep_size", ep_size)):
            if size < 1:
                raise ConfigError(f"parallel.{name} = {size}: must be at least 1")
        if world_size % pp_size:
            raise ConfigError(
                f"{world_size} ranks cannot form pipelines of parallel.pp_size = {pp_size}: {world_size} % {pp_size} = "
                f"{world_size % pp_size}; start a multiple of {pp_size} ranks or change pp_size"
            )
        dp_size = world_size // pp_size
        if dp_size % ep_size:
            raise ConfigError(
                f"parallel.ep_size = {ep_size} does not divide the {dp_size} data ranks of a stage "
                f"({world_size} ranks / pp_size {pp_size}): {dp_size} % {ep_size} = {dp_size % ep_size}; change ep_size"
            )
        self.mirrored = mirrored and pp_size > 1
        if self.mirrored and pp_size % 2:
            raise ConfigError(
                f"dualpipe mirrors rank r on rank pp_size-1-r, so parallel.pp_size must be even: {pp_size} % 2 = 1; "
                f"take parallel.pp_size={pp_size - 1} or {pp_size + 1}, or parallel.schedule=dualpipev"
            )
        self.world_size, self.rank = world_size, rank
        self.pp_size, self.ep_size, self.dp_size, self.edp_size = pp_size, ep_size, dp_size, dp_size // ep_size
        self.ranks = np.arange(world_size).reshape(pp_size, self.edp_size, ep_size)
        self.pp_rank, self.dp_rank = divmod(rank, dp_size)
        self.edp_rank, self.ep_rank = divmod(self.dp_rank, ep_size)
        self._groups: dict[str, dist.ProcessGroup] = {}

    def __repr__(self) -> str:
        return f"Grid(rank {self.rank} of {self.world_size}: pp {self.pp_size} x dp {self.dp_size}, ep {self.ep_size})"

    @cached_property
    def device(self) -> torch.device:
        """This rank's device: the CUDA device of its local rank, else the CPU."""
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def first_copy(self) -> bool:
        """Whether this rank is the first of those that hold the same stages: it speaks for state that they all have."""
        return self.dp_rank == 0 and not (self.mirrored and self.pp_rank >= self.pp_size // 2)

    def slices(self, name: str) -> list[list[int]]:
        """All groups of one kind, a list of ranks each; they are disjoint and cover the world."""
        stages = self.ranks.reshape(self.pp_size, -1)
        if name in ("world", "host"):
            rows = self.ranks.reshape(1, -1)
        elif name in ("pp_act", "pp_grad"):
            rows = stages.T
        elif name == "zero":
            rows = self._twins(stages)
        elif name == "ep":
            rows = self.ranks.reshape(-1, self.ep_size)
        elif name == "edp":
            same_experts = self.ranks.transpose(0, 2, 1)  # [pp, ep, edp]
            rows = self._twins(same_experts).reshape(-1, self.edp_size * (1 + self.mirrored))
        else:
            assert name == "ends", name
            first, *middle = stages.tolist()
            return [first, *middle] if self.pp_size == 1 else [first + middle[-1], *middle[:-1]]
        return rows.tolist()

    def _twins(self, rows: np.ndarray) -> np.ndarray:
        """[pp, ...]: rows r and PP-1-r joined at their last dimension where the pipeline is mirrored."""
        if not self.mirrored:
            return rows
        half = self.pp_size // 2
        return np.concatenate([rows[:half], rows[: half - 1 : -1]], axis=-1)

    def members(self, name: str) -> list[int]:
        """Global ranks of this rank's group of that kind, ascending."""
        return next(row for row in self.slices(name) if self.rank in row)

    def group(self, name: str) -> dist.ProcessGroup:
        """This rank's process group of that kind. Collective over the world at the first call for a name."""
        if name not in self._groups:
            self._groups[name] = self._make(name)
        return self._groups[name]

    def _make(self, name: str) -> dist.ProcessGroup:
        if name not in ("host", "pp_grad"):  # these two exist to be communicators of their own
            if len(self.members(name)) == self.world_size:
                world = dist.group.WORLD
                assert world is not None, "init_distributed comes first"
                return world
            if name == "edp" and self.ep_size == 1:
                return self.group("zero")
        backend, timeout = ("gloo", HOST_TIMEOUT) if name == "host" else (None, DEVICE_TIMEOUT)
        mine: Any = None
        for row in self.slices(name):
            made = dist.new_group(row, timeout=timeout, backend=backend)
            if self.rank in row:
                mine = made
        return mine

    # -- host-side agreement -----------------------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """The JSON value of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [json.loads(json.dumps(value))]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        group = self.group("host")
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([data.numel()], dtype=torch.int64), group=group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: data.numel()] = data
        rows = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(rows, padded, group=group)
        return [json.loads(row[: int(size)].numpy().tobytes()) for row, size in zip(rows, sizes)]

    def barrier(self) -> None:
        """Wait for every rank's host thread; the device is not involved."""
        if self.world_size > 1:
            dist.barrier(group=self.group("host"))

    def sum_over_world(self, values: Tensor) -> Tensor:
        """Sum of a device tensor over all ranks, in place: what a stage does not know it brings as zeros."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.group("world"))
        return values


# -- start and end of a process ----------------------------------------------------------------------------------------


def init_distributed(cfg: Config) -> Grid:
    """Join the other ranks (or none), choose the device, seed, and check that all ranks run the same config.

    Reads torchrun's environment; without it the process is a world of one. gloo on the CPU, NCCL on CUDA.
    Raises ConfigError for an impossible grid, more local ranks than devices, or ranks whose configs differ.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    grid = Grid(
        world_size, rank, cfg.parallel.pp_size, cfg.parallel.ep_size, mirrored=cfg.parallel.schedule == "dualpipe"
    )
    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # DeepSpeed insists on it
    set_determinism(cfg.seed, cfg.train.deterministic)
    options: dict[str, Any] = {"backend": "gloo"}
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank} has no device: this node shows {torch.cuda.device_count()} CUDA devices; "
                "start at most that many processes a node (--nproc_per_node)"
            )
        torch.cuda.set_device(local_rank)
        options = {"backend": "nccl"}
        if world_size > 1:  # connects at once; alone, no communicator is ever made
            options["device_id"] = torch.device("cuda", local_rank)
    if not dist.is_initialized():
        if world_size == 1:
            options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            options |= {"store": _store_of_this_attempt(world_size), "rank": rank, "world_size": world_size}
        dist.init_process_group(timeout=DEVICE_TIMEOUT, **options)
    _require_same_config(cfg, grid)
    return grid


def _store_of_this_attempt(world_size: int) -> dist.Store:
    """torchrun's store, under a name of this attempt: it outlives a restart, and ranks would connect to dead ones'
    addresses (torch 2.13, `torchrun --standalone --max-restarts`)."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}-{world_size}"
    return dist.PrefixStore(attempt, dist.TCPStore(host, port, is_master=False, timeout=DEVICE_TIMEOUT))


def shutdown() -> None:
    """Leave the process groups; a later init_distributed starts anew."""
    if dist.is_initialized():
        dist.destroy_process_group()


def set_determinism(seed: int, deterministic: bool) -> None:
    """Seed every generator with the run's seed (weights and data draw from keyed ones) and set torch's switches."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries read the global generator
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # the call imports the compiler: a second
        torch.use_deterministic_algorithms(deterministic)
    # Filling uninitialised memory would be a second pass over every buffer, for nothing.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = deterministic


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """{'model.hidden_size': 7168, 'data.sources.0.path': ...}: every leaf of nested dictionaries and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    leaves = {k: v for key, below in inner for k, v in _leaves(below, f"{name}.{key}" if name else str(key)).items()}
    return leaves or {name: value}


def _require_same_config(cfg: Config, grid: Grid) -> None:
    first, *others = (_leaves(theirs) for theirs in grid.gather(dataclasses.asdict(cfg)))
    for rank, theirs in enumerate(others, start=1):
        names = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
        if names:
            lines = [f"  {n}: {first.get(n)!r} on rank 0, {theirs.get(n)!r} on rank {rank}" for n in names]
            raise ConfigError("ranks were started with different configs; start all alike:\n" + "\n".join(lines))
