"""PNG pictures of a run, drawn from its own files: loss curves and expert load per layer.

For README files, chats and terminals that show pictures; the page with all figures is report.py's. Drawn with the
object interface of matplotlib (no global state) and published by rename, so that a viewer never reads half a file.
"""

from pathlib import Path

from deepv3.train.jsonl import JsonLines
from deepv3.train.report_series import Series

LOSS_PNG = "loss.png"
LOAD_PNG = "expert_load.png"


def empty_figure(width: float, height: float):
    """A matplotlib figure of that many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def publish_png(figure, path: Path) -> None:
    """Write the figure so that a viewer sees the old picture or the new one."""
    beside = path.with_name("." + path.name)
    figure.savefig(beside, dpi=110, format="png")
    beside.replace(path)


def draw_losses(run_dir: Path, series: Series) -> Path | None:
    """run_dir/loss.png: training, MTP and validation loss, learning rate and MaxVio over tokens; None without rows.

    series: summary of run_dir/metrics.jsonl, as far as it has been read.
    """
    if not series.rows:
        return None
    checks = JsonLines(run_dir / "validation.jsonl").read()
    tokens = series.mean("tokens")
    figure = empty_figure(9, 7)
    loss, rate, balance = figure.subplots(3, 1, sharex=True, height_ratios=[4, 1, 1])
    loss.plot(tokens, series.mean("loss_main"), lw=0.8, label="train, next token")
    if series.total("loss_mtp"):
        loss.plot(tokens, series.mean("loss_mtp"), lw=0.8, label="train, MTP")
    if checks:
        loss.plot([c["tokens"] for c in checks], [c["val_loss"] for c in checks], "k.-", ms=5, label="validation")
    loss.set_ylabel("loss, nats per token")
    loss.legend()
    loss.grid(alpha=0.3)
    rate.plot(tokens, series.mean("lr"), lw=0.8)
    rate.set_ylabel("learning rate")
    balance.plot(tokens, series.mean("max_vio"), lw=0.8)
    balance.set_ylabel("MaxVio, worst layer")
    balance.set_xlabel("tokens seen")
    path = run_dir / LOSS_PNG
    publish_png(figure, path)
    return path


def draw_load(run_dir: Path) -> Path | None:
    """run_dir/expert_load.png: each expert's load over the mean, first and latest record; None without any."""
    records = JsonLines(run_dir / "expert_load.jsonl").read()
    if not records or not records[-1]["counts"]:
        return None
    figure = empty_figure(9, 0.9 + 0.32 * len(records[-1]["counts"]))
    for axis, record in zip(figure.subplots(1, 2, sharey=True), (records[0], records[-1])):
        ratio = [[c * len(layer) / max(1, sum(layer)) for c in layer] for layer in record["counts"]]
        image = axis.imshow(ratio, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
        axis.set_title(f"step {record['step']}")
        axis.set_xlabel("expert")
        axis.set_ylabel("MoE layer (MTP last)")
    figure.colorbar(image, ax=figure.axes, label="load / mean load")
    path = run_dir / LOAD_PNG
    publish_png(figure, path)
    return path
