"""A layout tried on paper with the real modules: every distinct role's stages built on the meta device, lists proved.

Ranks of one pipeline position hold the same shapes, so a role is a position; positions with equal shapes are one role.
Weights, gradients, masters and moments are counted from the built parameters and the shards' sizes, everything else is
the planner's estimate. No process group, no data, no device memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from deepv3.config.schema import Config
from deepv3.dist import Grid
from deepv3.model.dispatch import LocalDispatch
from deepv3.model.transformer import DTYPES, Transformer
from deepv3.optim.flat import WIDE
from deepv3.pipeline.build import Placement
from deepv3.pipeline.check import check
from deepv3.pipeline.lower import lower
from deepv3.pipeline.schedule import make_schedule
from deepv3.planner.calibration import Calibration
from deepv3.planner.layout import Layout
from deepv3.planner.memory import Memory

GIB = 2**30
STATE = ("weights", "gradients", "master", "moments")


class _Share(LocalDispatch):
    """Holds the first of `ep_size` equal shares of the experts; never dispatches."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.ep_size = ep_size

    def held(self, n_routed_experts: int) -> range:
        return range(n_routed_experts // self.ep_size)


@dataclass(frozen=True)
class Role:
    """Pipeline positions with equal stages. stages: as layout text; parameters: per rank; built, planned: bytes."""

    positions: tuple[int, ...]
    ranks: int
    stages: str
    parameters: int
    built: dict[str, float]
    planned: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes: what was built, and the planner's estimate of what has no modules."""
        return sum(self.built.values()) + sum(size for part, size in self.planned.items() if part not in STATE)


def _state_bytes(model: Transformer, cfg: Config, grid: Grid, placement: Placement) -> dict[str, float]:
    """Bytes of a rank's state, counted parameter by parameter."""
    found = dict.fromkeys(STATE, 0.0)
    sharing = {"zero": grid.dp_size * (1 + grid.mirrored), "ends": 2 * grid.dp_size}
    sharing["edp"] = sharing["zero"] // grid.ep_size
    moment = 2 if cfg.optim.moment_dtype == "bfloat16" else 4
    for name, param in model.named_parameters():
        own = param.numel() / sharing[placement.owner_of(name, grid.mirrored)]
        found["weights"] += param.numel() * param.element_size()
        found["gradients"] += param.numel() * 4
        found["master"] += 0 if param.dtype in WIDE else own * 4
        found["moments"] += own * 2 * moment
    return found


def _position(cfg: Config, ranks: int, position: int, memory: Memory) -> Role:
    grid = Grid(
        ranks, position * (ranks // cfg.parallel.pp_size), cfg.parallel.pp_size, cfg.parallel.ep_size,
        mirrored=cfg.parallel.schedule == "dualpipe",
    )  # fmt: skip
    placement = Placement.of(cfg, grid)
    model = Transformer(
        cfg.model,
        cfg.train.recompute,
        device="meta",
        dtype=DTYPES["fp32" if cfg.precision.name == "fp32" else "bf16"],
        dispatcher=_Share(grid.ep_size),
        parts=[(placement.specs[stage], None) for stage in placement.held],
    )
    stages = " + ".join(f"{stage}:{placement.specs[stage]}" for stage in placement.held)
    count = sum(param.numel() for param in model.parameters())
    planned = memory.rank(position).parts
    return Role((position,), grid.dp_size, stages, count, _state_bytes(model, cfg, grid, placement), planned)


def roles(cfg: Config) -> list[Role]:
    """All distinct roles of the cluster's ranks. Raises ConfigError or ScheduleError for a layout that cannot run."""
    layout = Layout.of(cfg)
    memory = Memory(layout, Calibration())
    found: dict[tuple, Role] = {}
    for position in range(cfg.parallel.pp_size):
        role = _position(cfg, layout.cluster.count, position, memory)
        shape = role.stages.replace(":", " ").split()[1::3]
        key = (tuple(shape), role.parameters, tuple(role.built.values()), tuple(role.planned.values()))
        old = found.get(key)
        if old is not None:
            role = replace(old, positions=(*old.positions, position), ranks=old.ranks + role.ranks)
        found[key] = role
    return list(found.values())


def prove(cfg: Config) -> str:
    """Make, complete and check the lists of a full batch; one line that says what was proved."""
    layout = Layout.of(cfg)
    schedule = lower(make_schedule(layout.schedule, layout.pp, layout.micro_batches, cfg.parallel.strict))
    check(schedule)
    steps = sum(map(len, schedule.actions))
    notes = "".join(f"; {note}" for note in schedule.notes)
    done = f"{steps:,} actions and transfers of {schedule.ranks} ranks proved"
    return f"{schedule.name}, {schedule.micro_batches} micro-batches: {done}{notes}"


def table(cfg: Config) -> Iterator[str]:
    """The roles as lines of a markdown table."""
    parts = ("activations", "transfers", "dispatch", "workspace")
    layout = Layout.of(cfg)
    yield f"{layout.cluster.count} ranks: pp {layout.pp} x dp {layout.dp}, ep {layout.ep}"
    yield prove(cfg)
    yield f"| positions | ranks | stages | M parameters | {' | '.join((*STATE, *parts))} | GiB in all |"
    yield "|---" * (len(STATE) + len(parts) + 5) + "|"
    for role in roles(cfg):
        sizes = [role.built[part] for part in STATE] + [role.planned.get(part, 0.0) for part in parts]
        positions = ", ".join(map(str, role.positions))
        cells = " | ".join(f"{size / GIB:.2f}" for size in sizes)
        yield (
            f"| {positions} | {role.ranks} | {role.stages} | {role.parameters / 1e6:,.1f} | {cells} "
            f"| {role.total / GIB:.1f} |"
        )


def main(cfg: Config) -> None:
    """Print the table for the cluster that the config names."""
    torch.set_grad_enabled(False)
    for line in table(cfg):
        print(line)
