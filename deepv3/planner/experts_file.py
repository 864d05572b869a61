"""A placement on disk: our JSON, which docs/redundant-experts.md describes key by key, and SGLang's.

Both are checked before either is written, written beside their place and renamed, and never replace a file that is
not a placement.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepv3.errors import ConfigError
from deepv3.planner import experts
from deepv3.planner.experts import Layout
from deepv3.planner.experts_load import Loads

MARK, SGLANG_MARK = "phy2log", "physical_to_logical_map"


@dataclass(frozen=True)
class Placement:
    """All layers of a model on one layout."""

    layout: Layout
    loads: Loads
    weights: list[list[float]]  # [layers, layout.experts]: the loads, and the shared expert's last where it is placed
    placed: list[list[int]]  # [layers, slots], the expert in each slot
    shared: bool  # expert number loads.experts is the shared one

    def ratios(self) -> dict[str, list[float] | None]:
        """Largest over mean rank load per layer. before: routed experts alone, in order, no redundancy; naive:
        in_order; after: the placement; after_global: the same slots balanced without regard to nodes, None where
        that is what ``after`` does."""
        layout, ranks = self.layout, self.layout.ranks
        free = Layout(layout.experts, layout.slots, ranks)
        plain = experts.in_order(layout)

        def of(placements: list[list[int]]) -> list[float]:
            return [experts.over_mean(experts.rank_loads(p, w, ranks)) for p, w in zip(placements, self.weights)]

        return {
            "before": [experts.without_redundancy(row, ranks) for row in self.loads.counts],
            "naive": of([plain] * len(self.placed)),
            "after": of(self.placed),
            "after_global": of([experts.balance(w, free) for w in self.weights]) if layout.islands > 1 else None,
        }

    def copies(self, row: int) -> dict[int, int]:
        """Experts of a layer with more than one copy and their copies, most first."""
        counts = experts.counts_of(range(self.layout.experts), self.placed[row])
        return {e: n for e, n in sorted(enumerate(counts), key=lambda pair: -pair[1]) if n > 1}


def place(loads: Loads, layout: Layout, shared_load: float | None) -> Placement:
    """Every layer balanced. shared_load: tokens of the shared expert per routed token, None where it is not placed.

    Raises ConfigError for impossible sizes, before any layer is touched.
    """
    layout.check()
    weights = [[*row, sum(row) * shared_load] if shared_load is not None else row for row in loads.counts]
    placed = [experts.balance(row, layout) for row in weights]
    return Placement(layout, loads, weights, placed, shared_load is not None)


def document(placement: Placement) -> dict[str, Any]:
    """What an engine reads, as plain values."""
    layout, loads = placement.layout, placement.loads
    held = [experts.slots_of_experts(placed, layout.experts) for placed in placement.placed]
    widest = max(len(slots) for layer in held for slots in layer)
    return {
        "version": 1,
        "experts": loads.experts,
        "redundant": layout.slots - loads.experts,
        "shared_expert": loads.experts if placement.shared else None,
        "slots": layout.slots,
        "ranks": layout.ranks,
        "slots_per_rank": layout.slots_per_rank,
        "nodes": layout.nodes,
        "groups": layout.groups,
        "method": "hierarchical" if layout.islands > 1 else "global",
        "layers": loads.layers,
        "phy2log": placement.placed,
        "log2phy": [[slots + [-1] * (widest - len(slots)) for slots in layer] for layer in held],
        "logcnt": [[len(slots) for slots in layer] for layer in held],
        "max_over_mean": {name: _figures(values) for name, values in placement.ratios().items() if values},
        "loads_from": {"file": str(loads.file), "steps": loads.steps},
    }


def _figures(values: list[float]) -> dict[str, Any]:
    rounded = [round(v, 6) for v in values]
    return {"mean": round(sum(values) / len(values), 6), "worst": max(rounded), "layers": rounded}


def sglang_document(placement: Placement) -> dict[str, Any]:
    """The file of SGLang's --init-expert-location: one row per main layer, dense ones (never read) in order.

    Start it with --ep-num-redundant-experts = redundant and as many ranks. MTP's layers have no place in it.
    """
    model, layout = placement.loads.model, placement.layout
    if model is None:
        raise ConfigError(f"sglang needs the number of layers: no config.yaml beside {placement.loads.file}")
    if placement.shared:
        raise ConfigError("sglang places routed experts only; shared=false leaves the shared expert to the engine")
    rows = dict(zip(placement.loads.layers, placement.placed))
    dense = [slot % layout.experts for slot in range(layout.slots)]
    return {SGLANG_MARK: [rows.get(layer, dense) for layer in range(model.num_hidden_layers)]}


def publish(files: Mapping[Path, dict[str, Any]]) -> None:
    """Write JSON files whole or not at all. files: path -> content. Raises ConfigError where one cannot be."""
    for path in files:
        if path.exists() and not _ours(path):
            raise ConfigError(f"{path} exists and is not a placement; it is left alone, give another path")
    beside = {path: path.with_name(f".{path.name}") for path in files}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            beside[path].write_text(json.dumps(content) + "\n", encoding="utf-8")
        for path in files:
            beside[path].replace(path)
    except OSError as error:
        for temporary in beside.values():
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written ({error}); give another path, save=PATH or sglang=PATH") from None


def _ours(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and bool({MARK, SGLANG_MARK} & content.keys())
