"""Layouts for a cluster: every grid, schedule, recompute, precision and micro-batch, a reason for each that is out.

1. Enumerate. 2. Refuse what cannot run or does not fit, first reason only. 3. Sort the rest by a lower bound on the
step (the busiest rank's own work) and simulate in that order, each only if neither that bound nor a tighter one (the
lists without messages) exceeds the tenth-best time found: what is left out cannot be among the ten.
"""

import math
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepv3.config.schema import Config
from deepv3.errors import ConfigError
from deepv3.planner.calibration import Calibration
from deepv3.planner.hardware import GIB
from deepv3.planner.layout import Layout
from deepv3.planner.memory import Memory
from deepv3.planner.simulate import Simulator

SCHEDULES = ("1f1b", "zb1p", "dualpipe", "dualpipev")
RECOMPUTE = ("none", "selective", "full")
PRECISIONS = ("bf16", "fp8")
MICRO = (1, 2, 4, 8)
KEPT = 10


def _divisors(value: int) -> list[int]:
    return [d for d in range(1, value + 1) if value % d == 0]


def candidates(layout: Layout) -> Iterator[Layout]:
    """Every combination; impossible ones included, so that each gets its reason."""
    count, m = layout.cluster.count, layout.m
    precisions = ("fp32",) if layout.precision == "fp32" else PRECISIONS
    for pp in (d for d in _divisors(count) if d <= m.num_hidden_layers):
        schedules = SCHEDULES if pp > 1 else ("1f1b", "dualpipev")  # one rank pairs its two stages, or runs one by one
        for ep in (d for d in _divisors(m.n_routed_experts) if d <= count // pp):
            for schedule in schedules:
                for micro in MICRO:
                    for recompute in RECOMPUTE:
                        for precision in precisions:
                            yield replace(
                                layout, pp=pp, ep=ep, schedule=schedule, micro=micro, recompute=recompute,
                                precision=precision, split="",
                            )  # fmt: skip


def objection(layout: Layout, cal: Calibration) -> str:
    """The first reason against a layout, without its numbers so that equal reasons gather; empty if there is none."""
    if layout.dp % layout.ep:
        return "parallel.ep_size does not divide the data ranks"
    if layout.batch % (layout.dp * layout.micro):
        return "the batch does not divide over data ranks and micro-batches"
    if layout.stages > layout.m.num_hidden_layers:
        return "more stages than layers"
    if layout.schedule == "dualpipe" and layout.pp % 2:
        return "dualpipe needs an even parallel.pp_size"
    if layout.schedule.startswith("dualpipe") and layout.micro_batches < 2 * layout.pp:
        return "too few micro-batches for DualPipe to overlap fully"
    if layout.ep > layout.cluster.node and layout.ep % layout.cluster.node:
        return "expert groups straddle nodes"
    if max(rank.needed for rank in Memory(layout, cal).ranks()) > layout.cluster.device.memory:
        return "does not fit in memory"
    return ""


def text(layout: Layout) -> str:
    """A layout in a line."""
    return (
        f"pp {layout.pp} ep {layout.ep} dp {layout.dp} {layout.schedule} mbs {layout.micro} {layout.recompute} "
        f"{layout.precision}"
    )


def search(cfg: Config, cal: Calibration) -> dict[str, Any]:
    """Rank the layouts of a configuration's model and batch on its cluster.

    Returns {tried, ranked: [rows, fastest first], reasons: {reason: [texts]}}. Raises ConfigError if nothing is left.
    """
    base, tried = Layout.of(cfg), 0
    reasons: dict[str, list[str]] = defaultdict(list)
    possible: list[tuple[float, int, Simulator]] = []
    for layout in candidates(base):
        tried += 1
        reason = objection(layout, cal)
        if reason:
            reasons[reason].append(text(layout))
        else:
            simulator = Simulator(layout, cal)
            possible.append((simulator.bound(), tried, simulator))
    ranked: list[dict[str, Any]] = []
    for bound, _, simulator in sorted(possible, key=lambda entry: entry[:2]):
        worst = ranked[KEPT - 1]["step_seconds"] if len(ranked) >= KEPT else math.inf
        if bound >= worst or simulator.tight_bound() >= worst:
            reasons["slower than the ten best"].append(text(simulator.layout))
            continue
        ranked = sorted([*ranked, _row(simulator, cal)], key=lambda row: row["step_seconds"])
    reasons["slower than the ten best"] += [row["text"] for row in ranked[KEPT:]]
    del ranked[KEPT:]
    if not ranked:
        listed = "; ".join(f"{reason}: {len(rows)}" for reason, rows in reasons.items())
        raise ConfigError(
            f"none of {tried} layouts runs {base.m.num_hidden_layers} layers on {base.cluster.count} x "
            f"{base.cluster.device.name} ({listed}); take more or larger devices, or another train.global_batch_size"
        )
    return {"tried": tried, "ranked": ranked, "reasons": {reason: rows for reason, rows in reasons.items() if rows}}


def _row(simulator: Simulator, cal: Calibration) -> dict[str, Any]:
    step, layout = simulator.step(), simulator.layout
    return {
        "text": text(layout), "step_seconds": step.seconds,
        "tokens_per_second_per_gpu": step.tokens_per_second_per_gpu, "bubble_share": step.bubble / step.seconds,
        "gib": max(rank.total for rank in Memory(layout, cal).ranks()) / GIB,
        "pp_size": layout.pp, "ep_size": layout.ep, "schedule": layout.schedule, "micro_batch_size": layout.micro,
        "recompute": layout.recompute, "precision": layout.precision,
    }  # fmt: skip


def save_preset(found: dict[str, Any], path: Path) -> None:
    """Write the best layout as a file of configs/parallel/; what lies outside that group stands in its comment."""
    if path.suffix != ".yaml" or not path.parent.is_dir():
        raise ConfigError(f"save = {path}: give NAME.yaml in an existing folder, such as configs/parallel/mine.yaml")
    best = found["ranked"][0]
    lines = (
        f"# Fastest of {found['tried']} layouts on paper: {best['tokens_per_second_per_gpu']:,.0f} tokens/s a device.",
        f"# Goes with train.micro_batch_size={best['micro_batch_size']} train.recompute={best['recompute']} "
        f"precision={best['precision']}",
        f"pp_size: {best['pp_size']}",
        f"ep_size: {best['ep_size']}",
        f"schedule: {best['schedule']}",
    )
    beside = path.with_name(f".{path.name}")
    beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(beside, path)
