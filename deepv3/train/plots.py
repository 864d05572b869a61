"""PNG pictures of a run, drawn from its own files: loss curves and expert load per layer.

Drawn with matplotlib's object interface (no global state), in a background thread so that training does not wait, and
published by rename so that a viewer never reads half a file.
"""

import threading
from pathlib import Path

from deepv3.train.metrics import JsonLines

LOSS_PNG = "loss.png"
LOAD_PNG = "expert_load.png"


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _publish(figure, path: Path) -> None:
    beside = path.with_name("." + path.name)
    figure.savefig(beside, dpi=110, format="png")
    beside.replace(path)


def draw_losses(run_dir: Path) -> Path | None:
    """run_dir/loss.png: training, MTP and validation loss, learning rate and MaxVio over tokens; None without rows."""
    rows = JsonLines(run_dir / "metrics.jsonl").read()
    if not rows:
        return None
    checks = JsonLines(run_dir / "validation.jsonl").read()
    tokens = [row["tokens"] for row in rows]
    figure = _figure(9, 7)
    loss, rate, balance = figure.subplots(3, 1, sharex=True, height_ratios=[4, 1, 1])
    loss.plot(tokens, [row["loss_main"] for row in rows], lw=0.8, label="train, next token")
    if any(row["loss_mtp"] for row in rows):
        loss.plot(tokens, [row["loss_mtp"] for row in rows], lw=0.8, label="train, MTP")
    if checks:
        loss.plot([c["tokens"] for c in checks], [c["val_loss"] for c in checks], "k.-", ms=5, label="validation")
    loss.set_ylabel("loss, nats per token")
    loss.legend()
    loss.grid(alpha=0.3)
    rate.plot(tokens, [row["lr"] for row in rows], lw=0.8)
    rate.set_ylabel("learning rate")
    balance.plot(tokens, [row["max_vio"] for row in rows], lw=0.8)
    balance.set_ylabel("MaxVio, worst layer")
    balance.set_xlabel("tokens seen")
    path = run_dir / LOSS_PNG
    _publish(figure, path)
    return path


def draw_load(run_dir: Path) -> Path | None:
    """run_dir/expert_load.png: each expert's load over the mean, sorted, first and latest record; None without any."""
    records = JsonLines(run_dir / "expert_load.jsonl").read()
    if not records or not records[-1]["counts"]:
        return None
    figure = _figure(9, 0.9 + 0.32 * len(records[-1]["counts"]))
    for axis, record in zip(figure.subplots(1, 2, sharey=True), (records[0], records[-1])):
        ratio = [[c * len(layer) / max(1, sum(layer)) for c in layer] for layer in record["counts"]]
        image = axis.imshow(ratio, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
        axis.set_title(f"step {record['step']}")
        axis.set_xlabel("expert")
        axis.set_ylabel("MoE layer (MTP last)")
    figure.colorbar(image, ax=figure.axes, label="load / mean load")
    path = run_dir / LOAD_PNG
    _publish(figure, path)
    return path


class Plotter:
    """Redraws the pictures in the background; a request while one is being drawn is dropped."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self._thread: threading.Thread | None = None

    def _draw(self) -> None:
        draw_losses(self.run_dir)
        draw_load(self.run_dir)

    def refresh(self) -> None:
        """Start a redraw unless one is under way."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._draw, daemon=True)
            self._thread.start()

    def close(self) -> list[Path]:
        """Wait, draw the final state, return the pictures' paths."""
        if self._thread is not None:
            self._thread.join()
        return [path for path in (draw_losses(self.run_dir), draw_load(self.run_dir)) if path is not None]
