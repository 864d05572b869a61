"""Several runs in one page: a table of results, what their configs differ in, and their curves upon each other.

A sweep's folder stands for its jobs. Curves are drawn over tokens, because runs may differ in batch size.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from deepv3.errors import DataError
from deepv3.train.report_chart import Chart, Line, draw, si
from deepv3.train.report_html import document, links, note, section, table, tag
from deepv3.train.report_page import Folder

IGNORED = ("run_dir",)  # differs by definition
BEST = {"loss, last 5 %": min, "validation": min, "best validation": min, "tokens/s/device": max}
CURVES = (
    ("loss_main", "Training loss", "nats per token"), ("grad_norm", "Gradient norm", "before clipping"),
    ("max_vio", "MaxVio, worst layer", ""), ("tokens_per_second", "Throughput", "tokens / s"),
    ("lr", "Learning rate", ""),
)  # fmt: skip


def find_runs(paths: Sequence[str]) -> list[Path]:
    """The run folders that are meant. Raises DataError for a path that holds neither a run nor runs."""
    found: list[Path] = []
    for path in map(Path, paths):
        if (path / "metrics.jsonl").exists():
            found.append(path)
            continue
        inside = sorted(p.parent for p in path.glob("*/metrics.jsonl"))
        if not inside:
            raise DataError(f"{path} holds no metrics.jsonl and no folder that does; runs=[A,B] takes run folders")
        found += sorted(inside, key=lambda p: (int(p.name.split("-")[0]) if p.name[0].isdigit() else 0, p.name))
    return list(dict.fromkeys(found))


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """{'model.hidden_size': 128, ...}; lists are values."""
    if not isinstance(node, dict):
        return {prefix[:-1]: node}
    return {k: v for key, inner in node.items() for k, v in flatten(inner, f"{prefix}{key}.").items()}


def differences(configs: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Fields in which the configs are not all equal -> each config's value as text."""
    flat = [flatten(config) for config in configs]
    keys = dict.fromkeys(key for config in flat for key in config if key not in IGNORED)
    values = {key: ["–" if config.get(key) is None else str(config[key]) for config in flat] for key in keys}
    return {key: texts for key, texts in values.items() if len(set(texts)) > 1}


def names(runs: Sequence[Folder]) -> list[str]:
    """The folders' own names, with as many parents as it takes to tell them apart."""
    paths = [run.path.resolve().parts for run in runs]
    for depth in range(1, max(map(len, paths)) + 1):
        short = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(short)) == len(short):
            return short
    return ["/".join(parts) for parts in paths]


def results(run: Folder) -> dict[str, float | None]:
    """The figures of the table; None where the run has not got them."""
    series, last = run.series, run.series.last
    checks = [row["val_loss"] for row in run.validation]
    rate = series.mean("tokens_per_second_per_gpu")
    tail = series.mean("loss_main")[-max(1, len(series.steps) // 20) :]
    return {
        "step": last.get("step"),
        "tokens": last.get("tokens"),
        "loss, last 5 %": float(np.nanmean(tail)) if len(tail) else None,
        "validation": checks[-1] if checks else None,
        "best validation": min(checks, default=None),
        "tokens/s/device": float(np.nanmedian(rate)) if len(rate) else None,
        "MFU": last.get("mfu") or None,
        "peak GiB": last.get("memory_gib"),
        "MaxVio": last.get("max_vio") if last.get("max_vio_layers") else None,
        "skipped": series.total("skipped"),
        "hours": _hours(run),
    }


def _hours(run: Folder) -> float | None:
    """Time in steps alone: mean step over buckets, times rows."""
    seconds = run.series.mean("step_seconds")
    return float(np.nanmean(seconds)) * run.series.rows / 3600 if len(seconds) else None


def _results_table(runs: Sequence[Folder], labels: Sequence[str]) -> str:
    figures = [results(run) for run in runs]
    best = {}
    for name, choose in BEST.items():
        known = {value for figure in figures if (value := figure[name]) is not None}
        best[name] = choose(known) if len(known) > 1 else None
    rows = []
    for i, (run, label, figure) in enumerate(zip(runs, labels, figures)):
        cells = [tag("span", run.state()[0], cls=f"state {run.state()[0]}")]
        for name, value in figure.items():
            text = f"{value:,.0f}" if name in ("step", "skipped") and value is not None else si(value)
            cells.append(tag("td", text, cls="best") if value is not None and value == best.get(name) else text)
        rows.append([tag("span", tag("i"), escape(label), cls=f"key c{i % 8}"), *cells])
    return table("Results; the best of a column is green", ["run", "state", *figures[0]], rows, cls="runs")


def _config_table(runs: Sequence[Folder], labels: Sequence[str]) -> str:
    differing = differences([run.config for run in runs])
    if not differing:
        return note("The configs are equal, but for run_dir.")
    rows = []
    for key, values in differing.items():
        counts = Counter(values).most_common()
        usual = counts[0][0] if len(runs) > 2 and counts[0][1] > 1 else None
        cells = [escape(v) if v == usual else tag("td", escape(v), cls="differs") for v in values]
        rows.append([escape(key), *cells])
    return table("Fields that differ; marked where a run leaves the usual value", ["field", *labels], rows, cls="runs")


def _curve(runs: Sequence[Folder], labels: Sequence[str], field: str, title: str, unit: str) -> str:
    lines = [
        Line(label, run.series.mean("tokens"), run.series.mean(field))
        for run, label in zip(runs, labels)
        if run.series.rows
    ]
    highest = [float(np.nanmax(line.y)) for line in lines if np.isfinite(line.y).any()]
    middle = statistics.median(float(np.nanmedian(line.y)) for line in lines) if highest else 1.0
    log = field == "grad_norm" and bool(highest) and max(highest) > 20 * middle
    wide = field == "loss_main"
    unit = f"{unit}, over tokens".removeprefix(", ")
    return draw(Chart(field, title, unit, lines, log=log, zero=field != "loss_main", wide=wide, x_unit="tokens"))


def compare(runs: Sequence[Folder]) -> str:
    """The page."""
    labels = names(runs)
    checks = []
    for run, label in zip(runs, labels):
        points = np.array([[row["tokens"], row["val_loss"]] for row in run.validation], dtype=float).reshape(-1, 2)
        checks.append(Line(label, points[:, 0], points[:, 1], dots=len(points) <= 60))
    curves = [_curve(runs, labels, *curve) for curve in CURVES]
    curves.insert(
        1, draw(Chart("val_loss", "Validation loss", "nats per token, over tokens", checks, wide=True, x_unit="tokens"))
    )
    body = {
        "Results": _results_table(runs, labels),
        "Differences": _config_table(runs, labels),
        "Curves": tag("div", *curves, cls="figures") if any(curves) else "",
    }
    header = tag("header", tag("p", "deepv3", cls="over"), tag("h1", f"{len(runs)} runs compared"))
    return document(
        f"{len(runs)} runs · deepv3",
        header + links(body) + tag("main", *(section(name, inner) for name, inner in body.items())) + tag("footer"),
    )
