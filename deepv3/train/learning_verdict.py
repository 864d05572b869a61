"""Does FP8 learn like BF16: the curves of several runs, one number each, the criterion, a table and a picture.

A run's number is the mean training loss over the last quarter of the steps that all runs were to make. A run that did
not get there, or has a loss that is no number in it, has none and is shown as it ended. The criterion: FP8 and BF16 of
the same seed, which read the same tokens in the same order, differ by less than BOUND (relative; the largest of the
seeds), and by less than BF16's seeds differ from each other.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from deepv3.train.jsonl import JsonLines, finite
from deepv3.train.plots import empty_figure, publish_png

BOUND = 0.0025
REFERENCE, TRIED = "bf16", "fp8"
COLOURS = {"bf16": ("tab:blue", "tab:cyan"), "fp8": ("tab:red", "tab:orange"), "block": ("0.35", "0.6")}


@dataclass
class Curve:
    """One run as its folder tells it. losses: of steps 1, 2, ...; NaN where it is none. end: how the run ended."""

    name: str
    losses: np.ndarray
    end: str
    tokens_per_second: float
    largest_norm: float
    skipped: int

    @property
    def recipe(self) -> str:
        """bf16 of bf16-1."""
        return self.name.rpartition("-")[0]

    @property
    def seed(self) -> int:
        """1 of bf16-1."""
        return int(self.name.rpartition("-")[2])

    def last_quarter(self, steps: int) -> float | None:
        """Mean loss over the last quarter of `steps` steps; None where the run has not got all of them."""
        tail = self.losses[steps - max(1, steps // 4) : steps]
        if len(self.losses) < steps or not np.isfinite(tail).all():
            return None
        return float(tail.mean())


def read_curve(name: str, run_dir: Path, end: str) -> Curve:
    """The run in run_dir."""
    rows = JsonLines(run_dir / "metrics.jsonl").read()

    def column(key: str) -> np.ndarray:
        return np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=float)

    norms = column("grad_norm")
    return Curve(
        name,
        column("loss_main"),
        end,
        median(row.get("tokens_per_second") or 0.0 for row in rows) if rows else 0.0,
        float(np.nanmax(norms)) if np.isfinite(norms).any() else float("nan"),
        sum(bool(row.get("skipped")) for row in rows),
    )


@dataclass
class Verdict:
    """gaps: seed -> relative difference of FP8 to BF16; spread: between BF16's seeds, relative; None: not known.

    met: whether the criterion holds; None where a run that it needs is missing.
    """

    steps: int
    means: dict[str, float | None]
    gaps: dict[int, float]
    spread: float | None
    met: bool | None

    def text(self) -> str:
        """The verdict in words."""
        if not self.gaps:
            return "no seed has both a BF16 and an FP8 run with a last quarter: nothing to compare"
        gaps = ", ".join(f"{gap:+.3%} (seed {seed})" for seed, gap in self.gaps.items())
        said = f"FP8 to BF16, mean loss of the last quarter: {gaps}; bound {BOUND:.2%}"
        if self.spread is None:
            return f"{said}; spread of BF16's seeds not known"
        answer = {True: "met", False: "NOT met", None: "not decided: runs are missing"}[self.met]
        return f"{said}, BF16's seeds differ by {self.spread:.3%}: {answer}"


def judge(curves: list[Curve], steps: int) -> Verdict:
    """The criterion over the runs that are there. steps: of each run."""
    means = {curve.name: curve.last_quarter(steps) for curve in curves}
    found = {(curve.recipe, curve.seed): mean for curve in curves if (mean := means[curve.name]) is not None}
    base = {seed: mean for (recipe, seed), mean in found.items() if recipe == REFERENCE}
    gaps = {seed: found[TRIED, seed] / mean - 1 for seed, mean in base.items() if (TRIED, seed) in found}
    spread = (max(base.values()) - min(base.values())) / min(base.values()) if len(base) > 1 else None
    wanted = sum(curve.recipe == TRIED for curve in curves)
    largest = max(map(abs, gaps.values()), default=0.0)
    if largest >= BOUND or (spread is not None and largest > spread):
        met: bool | None = False
    else:
        met = None if spread is None or not gaps or len(gaps) < wanted else True
    return Verdict(steps, means, gaps, spread, met)


def table(curves: list[Curve], verdict: Verdict) -> str:
    """A markdown table, one row a run."""
    lines = [
        "| run | last quarter, nats a token | to BF16 of its seed | steps | tokens/s, median | largest gradient norm "
        "| skipped | end |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for curve in curves:
        mean, base = verdict.means[curve.name], verdict.means.get(f"{REFERENCE}-{curve.seed}")
        gap = f"{mean / base - 1:+.3%}" if mean and base and curve.recipe != REFERENCE else ""
        lines.append(
            f"| {curve.name} | {'none' if mean is None else f'{mean:.5f}'} | {gap} | {len(curve.losses):,} "
            f"| {curve.tokens_per_second:,.0f} | {curve.largest_norm:.2f} | {curve.skipped} | {curve.end} |"
        )
    return "\n".join([*lines, "", verdict.text()])


def as_json(curves: list[Curve], verdict: Verdict, facts: dict[str, Any]) -> dict[str, Any]:
    """Everything as JSON values; the loss of every step with five decimals, null where it is no number."""
    runs = [
        {**vars(curve), "recipe": curve.recipe, "seed": curve.seed, "losses": np.round(curve.losses, 5).tolist()}
        for curve in curves
    ]
    return finite(facts | {"bound": BOUND, "verdict": vars(verdict) | {"text": verdict.text()}, "runs": runs})


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over `width` neighbours, only where all of them are there; index i stands for values[i : i + width]."""
    if len(values) < width:
        return np.zeros(0)
    return np.convolve(values, np.ones(width) / width, mode="valid")


def draw(curves: list[Curve], verdict: Verdict, tokens_per_step: int, path: Path) -> Path:
    """The PNG: smoothed training loss; below it each run's difference to BF16 of its seed, and BF16's to its first."""
    width = max(1, verdict.steps // 40)
    figure = empty_figure(9, 8)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    bases = {curve.seed: curve for curve in reversed(curves) if curve.recipe == REFERENCE}
    first = next((curve for curve in curves if curve.recipe == REFERENCE), None)
    reach = [4 * BOUND * 100]
    for curve in curves:
        tone = COLOURS[curve.recipe][(curve.seed - 1) % 2]
        line = smooth(curve.losses, width)
        top.plot(_millions(line, width, tokens_per_step), line, color=tone, lw=1.0, label=curve.name)
        base = first if curve.recipe == REFERENCE else bases.get(curve.seed)
        if base is None or base is curve:
            continue
        both = min(len(curve.losses), len(base.losses))
        gap = smooth(curve.losses[:both] - base.losses[:both], width) / smooth(base.losses[:both], width) * 100
        pale = 0.45 if curve.recipe == REFERENCE else 1.0  # other data: mostly the noise of the batches
        label = f"{curve.name} to {base.name}"
        below.plot(_millions(gap, width, tokens_per_step), gap, color=tone, lw=1.0, alpha=pale, label=label)
        if curve.recipe == TRIED:
            reach += (1.2 * np.abs(gap[np.isfinite(gap)][len(gap) // 10 :])).tolist()
    losses = np.concatenate([curve.losses[len(curve.losses) // 20 :] for curve in curves if curve.recipe != "block"])
    losses = losses[np.isfinite(losses)]
    if len(losses):  # the first steps, from ln(vocabulary) down, would flatten all that follows
        top.set_ylim(losses.min() * 0.98, np.quantile(losses, 0.995) * 1.02)
    below.set_ylim(-max(reach), max(reach))
    end = verdict.steps * tokens_per_step / 1e6
    below.axhspan(-BOUND * 100, BOUND * 100, color="tab:green", alpha=0.12, lw=0)
    below.axvspan(0.75 * end, end, color="0.93", lw=0)
    top.set_ylabel(f"training loss, nats a token\n(mean over {width} steps)")
    below.set_ylabel("difference, %")
    below.set_xlabel("tokens, millions; grey: the last quarter, green: the bound")
    for axis in (top, below):
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.suptitle(verdict.text().replace("; bound", "\nbound"), fontsize=9)
    publish_png(figure, path)
    return path


def _millions(line: np.ndarray, width: int, tokens_per_step: int) -> np.ndarray:
    """Tokens, in millions, at the middle of each mean."""
    return (np.arange(len(line)) + (width + 1) / 2) * tokens_per_step / 1e6
