"""``python launch/plan.py experts=RUN_DIR replicas=32 [...]``: where a run's experts should lie at inference.

Reads the run's expert loads, places the experts, prints what it gains and who lies where, writes the placement.
``main`` takes the command line's keys; USAGE lists them.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deepv3.config.schema import knob
from deepv3.config.typed import build
from deepv3.errors import EXIT_DONE, ConfigError
from deepv3.planner import experts_load
from deepv3.planner.experts import Layout, over_mean, rank_loads
from deepv3.planner.experts_file import Placement, document, place, publish, sglang_document

USAGE = """usage: python launch/plan.py experts=RUN_DIR [replicas=N] [key=value]

  experts=PATH      a run folder (its expert_load.jsonl), or a file of such lines
  deployment=none   prefill | decode | decode_2025: the report's sizes; any key below overrides them
  replicas=N        redundant experts per layer, over all ranks; default 0 where ranks is given
  ranks=N           GPUs that share a layer's experts; default: as many as divide experts and replicas
  nodes=N           default: nodes of 8 ranks
  groups=N          groups that stay on a node; default: the run's n_group
  shared=false      true places the shared expert too, as one that every token chooses (needs the run's config.yaml)
  last=8            records of loads that are averaged
  layer=N           the layer whose placement is printed; default: the fullest one
  save=PATH         default: expert_placement.json beside the loads
  sglang=PATH       also writes SGLang's --init-expert-location
  json=false        true prints the placement file instead of tables"""

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Deployment:
    """Sizes that the report tells of. replicas counts the slots beyond one per routed expert, the shared one's too."""

    replicas: int
    ranks: int
    nodes: int
    shared: bool


DEPLOYMENTS = {
    "none": None,
    "prefill": Deployment(32, 32, 4, False),  # V3 3.4.1: 4 nodes, 8 experts and 1 redundant one on each GPU
    "decode": Deployment(64, 320, 40, True),  # V3 3.4.2: one expert a GPU, 64 GPUs for redundant and shared ones
    "decode_2025": Deployment(32, 144, 18, False),  # open-infra-index day 6: 18 nodes, 2 routed experts on each GPU
}


@dataclass
class Arguments:
    """The command line."""

    experts: str = knob("", "Run folder or file of loads.")
    deployment: str = knob("none", "none | prefill | decode | decode_2025.")
    replicas: Optional[int] = knob(None, "Redundant experts per layer.")
    ranks: Optional[int] = knob(None, "GPUs that share a layer's experts.")
    nodes: Optional[int] = knob(None, "Nodes of these GPUs.")
    groups: Optional[int] = knob(None, "Groups of experts that stay on a node.")
    shared: Optional[bool] = knob(None, "Place the shared expert too.")
    last: int = knob(8, "Records averaged.")
    layer: Optional[int] = knob(None, "Layer whose placement is printed.")
    save: str = knob("", "Placement file.")
    sglang: str = knob("", "Placement file of SGLang.")
    json: bool = knob(False, "Print JSON.")


def main(overrides: Mapping[str, str]) -> int:
    """Plan, print, write. overrides: key -> text of its value. Raises ConfigError or DataError; returns EXIT_DONE."""
    args = build(Arguments, dict(overrides))
    if not args.experts:
        raise ConfigError(f"experts is needed\n{USAGE}")
    placement = plan(args)
    row = shown_row(placement, args.layer)
    content = document(placement)
    target = Path(args.save) if args.save else placement.loads.file.parent / "expert_placement.json"
    files = {target: content}
    if args.sglang:
        files[Path(args.sglang)] = sglang_document(placement)
    publish(files)
    if args.json:
        print(json.dumps(content))
        return EXIT_DONE
    console = Console()
    console = console if console.is_terminal else Console(width=120)  # a file has no width of its own
    console.print(headline(placement), layers_table(placement), placement_table(placement, row))
    console.print(escape(f"written: {', '.join(map(str, files))}"), soft_wrap=True)
    return EXIT_DONE


def plan(args: Arguments) -> Placement:
    """The placement that the arguments ask for. Raises ConfigError and DataError."""
    if args.deployment not in DEPLOYMENTS:
        raise ConfigError(f"deployment = {args.deployment!r} is none of {', '.join(DEPLOYMENTS)}")
    told = DEPLOYMENTS[args.deployment]
    loads = experts_load.read(Path(args.experts), args.last)
    shared = _first(args.shared, told and told.shared, False)
    if args.replicas is None and args.ranks is None and told is None:
        raise ConfigError(f"replicas is needed, or ranks, or a deployment\n{USAGE}")
    replicas = _first(args.replicas, told and told.replicas, 0)
    ranks = _first(args.ranks, told and told.ranks, math.gcd(loads.experts, replicas))
    nodes = _first(args.nodes, told and told.nodes, ranks // GPUS_PER_NODE if ranks % GPUS_PER_NODE == 0 else 1)
    groups = _first(args.groups, loads.model.n_group if loads.model and not shared else 1)
    layout = Layout(loads.experts + shared, loads.experts + replicas, ranks, nodes, groups)
    return place(loads, layout, _shared_load(loads) if shared else None)


def _first(*values):
    """The first that is given."""
    return next(value for value in values if value is not None)


def _shared_load(loads: experts_load.Loads) -> float:
    """Every token chooses the shared expert and num_experts_per_tok routed ones (V3 3.4.2)."""
    if loads.model is None:
        raise ConfigError(f"shared=true needs num_experts_per_tok: no config.yaml beside {loads.file}")
    return 1.0 / loads.model.num_experts_per_tok


def shown_row(placement: Placement, layer: int | None) -> int:
    """Row of the layer to print: the one asked for, else the one whose fullest rank is fullest."""
    layers = placement.loads.layers
    if layer is None:
        after = placement.ratios()["after"] or []
        return after.index(max(after))
    if layer not in layers:
        raise ConfigError(f"layer = {layer} has no experts; those that have: {layers[0]} to {layers[-1]}")
    return layers.index(layer)


def headline(placement: Placement) -> str:
    """Sizes, method and source in words."""
    layout, loads = placement.layout, placement.loads
    how = "whole groups on nodes" if layout.islands > 1 else "without regard to nodes"
    why = f"{layout.groups} groups % {layout.nodes} nodes = {layout.groups % layout.nodes}"
    nodes = f"{layout.nodes} nodes, {how} ({why})" if layout.nodes > 1 else "one node"
    spare = f"{layout.slots - loads.experts} redundant{' and shared' if placement.shared else ''}"
    return escape(
        f"{loads.experts} experts + {spare} = {layout.slots} slots on {layout.ranks} ranks, "
        f"{layout.slots_per_rank} each; {nodes}.\n"
        f"Loads: mean of the last {len(loads.steps)} of {loads.file}, up to step {loads.steps[-1]}."
    )


def layers_table(placement: Placement) -> Table:
    """Largest over mean rank load per layer, before and after, with the experts that get copies."""
    ratios = {name: values for name, values in placement.ratios().items() if values}
    titles = {"before": "no copies", "naive": "in order", "after": "placed", "after_global": "any node"}
    table = Table(title="Fullest rank over the mean rank", title_justify="left", show_footer=True)
    table.add_column("layer", "mean\nworst", justify="right")
    table.add_column("hottest expert", justify="right")
    for name, values in ratios.items():
        footer = f"{sum(values) / len(values):.3f}\n{max(values):.3f}"
        table.add_column(titles[name], footer, justify="right")
    table.add_column("experts x copies", overflow="fold")
    for row, layer in enumerate(placement.loads.layers):
        counts = placement.loads.counts[row]
        hottest = f"{counts.index(max(counts))}: {over_mean(counts):.2f}"
        copies = [f"{_name(placement, expert)}x{n}" for expert, n in placement.copies(row).items()]
        more = f" and {len(copies) - 8} more" if len(copies) > 8 else ""
        cells = [f"{values[row]:.3f}" for values in ratios.values()]
        table.add_row(_layer(placement, layer), hottest, *cells, " ".join(copies[:8]) + more)
    return table


def placement_table(placement: Placement, row: int) -> Table:
    """Who lies where in one layer: a row per node, its ranks' experts; * marks an expert with several copies."""
    layout, placed = placement.layout, placement.placed[row]
    loads = rank_loads(placed, placement.weights[row], layout.ranks)
    mean = sum(loads) / len(loads) or 1.0
    several = placement.copies(row)
    layer = _layer(placement, placement.loads.layers[row])
    table = Table(title=f"Layer {layer}: experts by rank, * has copies", title_justify="left", show_lines=True)
    table.add_column("node", justify="right")
    table.add_column("ranks")
    table.add_column("load / mean")
    table.add_column("experts, rank | rank | ...", overflow="fold")
    per_node, room = layout.ranks // layout.nodes, layout.slots_per_rank
    for node in range(layout.nodes):
        ranks = range(node * per_node, (node + 1) * per_node)
        inside = [loads[r] / mean for r in ranks]
        cells = [placed[r * room : (r + 1) * room] for r in ranks]
        text = " | ".join(" ".join(_name(placement, e) + "*" * (e in several) for e in cell) for cell in cells)
        table.add_row(str(node), f"{ranks[0]}-{ranks[-1]}", f"{min(inside):.3f}-{max(inside):.3f}", text)
    return table


def _name(placement: Placement, expert: int) -> str:
    return "shared" if placement.shared and expert == placement.loads.experts else str(expert)


def _layer(placement: Placement, layer: int) -> str:
    model = placement.loads.model
    return f"{layer} (MTP)" if model and layer >= model.num_hidden_layers else str(layer)
