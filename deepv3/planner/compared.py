"""A plan beside the run it was for: throughput and memory of a run folder's metrics against the planned ones."""

import json
from pathlib import Path
from statistics import median
from typing import Any

from deepv3.errors import DataError
from deepv3.planner.hardware import GIB
from deepv3.planner.plan import Plan

SETTLING = 10
"""First steps left out: compilation, autotuning, caches."""
NEEDED = ("tokens_per_second_per_gpu", "memory_gib", "step_seconds")


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines][SETTLING:]
    except (OSError, ValueError) as error:
        raise DataError(
            f"measured = {run_dir}: {path.name} cannot be read ({error}); give the folder of a run"
        ) from None
    if not rows or any(row.get(name) is None for row in rows for name in NEEDED):
        raise DataError(
            f"measured = {run_dir}: {len(lines)} steps; more than {SETTLING} are needed, each with {', '.join(NEEDED)}"
        )
    return rows


def compare(plan: Plan, run_dir: Path) -> dict[str, Any]:
    """Medians after the first steps, the largest memory, and the plan's relative errors.

    Memory is what torch allocates, so the plan's part for CUDA, NCCL and slack is left out. Raises DataError.
    """
    rows = _rows(run_dir)
    rate, seconds = (median(row[name] for row in rows) for name in (NEEDED[0], NEEDED[2]))
    memory = max(row["memory_gib"] for row in rows)
    planned = (max(rank.total for rank in plan.ranks) - plan.cal.workspace.value) / GIB
    return {
        "steps": len(rows),
        "tokens_per_second_per_gpu": rate,
        "step_seconds": seconds,
        "memory_gib": memory,
        "planned_memory_gib": planned,
        "throughput_error": plan.step.tokens_per_second_per_gpu / rate - 1.0 if rate else None,
        "memory_error": planned / memory - 1.0 if memory else None,
    }
