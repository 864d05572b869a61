"""From a config and a rank's place in the grid to what the rank runs: its part of the model and an executor over it."""

import os
from dataclasses import dataclass

from deepv3.config.schema import Config
from deepv3.config.validate import ramp_sizes
from deepv3.dist import Grid
from deepv3.model.node_exchange import make_dispatch
from deepv3.model.symmetric import Extent
from deepv3.model.transformer import DTYPES, Transformer
from deepv3.pipeline.executor import Executor
from deepv3.pipeline.layout import StageSpec, embedding_ranks, format_layout, place
from deepv3.pipeline.plain import PlainExecutor
from deepv3.pipeline.replay import Replay, records
from deepv3.pipeline.schedule import Schedule, make_schedule, micro_batches
from deepv3.pipeline.stage import Stage
from deepv3.precision.recipe import recipe_of
from deepv3.precision.wgrad import WeightGradQueue

EMBEDDING = "embed_tokens.weight"
SHARED = -1  # the chunk of what several of a rank's chunks use; reduced last


@dataclass(frozen=True)
class Placement:
    """Which stages exist and which of them are here. specs: of all stages; held: numbers of this rank's, ascending.

    notes: how steps of this run differ from the full schedule, by their number of micro-batches.
    """

    specs: tuple[StageSpec, ...]
    held: tuple[int, ...]
    embedding_ranks: tuple[int, ...]
    notes: tuple[str, ...]

    @staticmethod
    def of(cfg: Config, grid: Grid) -> "Placement":
        """Raises ConfigError for stages that the model cannot fill, ScheduleError for counts that strict refuses."""
        parallel, train = cfg.parallel, cfg.train
        sizes = [train.global_batch_size] if train.global_batch_size else []
        if not sizes and train.batch_ramp is not None:
            sizes = list(ramp_sizes(train.batch_ramp))
        made: list[Schedule] = []
        for size in sizes:
            count = micro_batches(size, grid.dp_size, train.micro_batch_size, grid.pp_size)
            made.append(make_schedule(parallel.schedule, grid.pp_size, count, parallel.strict))
        specs = place(cfg.model, made[0].stages, parallel.layout)
        notes = dict.fromkeys(note for schedule in made for note in schedule.notes)
        return Placement(specs, made[0].chunks(grid.pp_rank), embedding_ranks(made[0], specs), tuple(notes))

    def chunk_of(self, name: str) -> int:
        """The chunk (number among this rank's stages) of a parameter, SHARED if two use it."""
        here = [self.specs[stage] for stage in self.held]
        if name == EMBEDDING:
            users = [chunk for chunk, spec in enumerate(here) if spec.embedding or spec.mtp]
            return users[0] if len(users) == 1 else SHARED
        head, *rest = name.split(".")
        if head == "layers":
            return next(chunk for chunk, spec in enumerate(here) if int(rest[0]) in spec.layers)
        return next(chunk for chunk, spec in enumerate(here) if spec.head)

    def owner_of(self, name: str, mirrored: bool) -> str:
        """The Grid group whose ranks hold the same parameter."""
        if name == EMBEDDING and len(self.embedding_ranks) > 1 and not mirrored:
            return "ends"
        return "edp" if ".experts." in name else "zero"

    def describe(self, cfg: Config, grid: Grid) -> list[str]:
        """What a run says of its pipeline at the start; nothing where there is none."""
        if len(self.specs) == 1:
            return []
        shape = f"pp {grid.pp_size} x dp {grid.dp_size}, ep {grid.ep_size}; stages {format_layout(self.specs)}"
        more = [f"... and {len(self.notes) - 3} more of the batch ramp"] if len(self.notes) > 3 else []
        return [f"pipeline {cfg.parallel.schedule}, {shape}", *(f"  {note}" for note in [*self.notes[:3], *more])]


def ranks_per_node(cfg: Config, grid: Grid) -> int:
    """Consecutive ranks that share a fast network: as configured, else as torchrun started them."""
    return cfg.parallel.ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", grid.world_size))


def _shared_extent(cfg: Config) -> Extent | None:
    """What a dispatch may hold, where it is to go through shared memory."""
    if cfg.parallel.dispatcher != "symmetric":
        return None
    tokens = cfg.train.micro_batch_size * cfg.data.seq_len
    return Extent(tokens, cfg.model.hidden_size, cfg.model.num_experts_per_tok, DTYPES[cfg.precision.name])


def build_pipeline(cfg: Config, grid: Grid, placement: Placement) -> tuple[Transformer, Executor | PlainExecutor]:
    """This rank's part of the model, with its initial weights, and what runs it."""
    queues = [WeightGradQueue() for _ in placement.held]
    parts = [(placement.specs[stage], queue) for stage, queue in zip(placement.held, queues)]
    whole, full, recipe = len(placement.specs) == 1, cfg.train.recompute == "full", recipe_of(cfg)
    model = Transformer(
        cfg.model,
        cfg.train.recompute,
        cfg.train.loss_chunk,
        device=grid.device,
        dtype=DTYPES[cfg.precision.name],
        dispatcher=make_dispatch(
            grid, cfg.model.n_routed_experts, ranks_per_node(cfg, grid), full, recipe, _shared_extent(cfg)
        ),
        parts=() if whole else parts,
        recipe=recipe,
    )
    model.init_weights(cfg.seed)
    if whole:
        return model, PlainExecutor(
            model, grid.device, Replay(model, grid.device) if records(cfg, grid.device) else None
        )
    stages = {number: Stage(model, spec, queue, grid.device) for number, (spec, queue) in zip(placement.held, parts)}
    return model, Executor(model, stages, cfg, grid)
