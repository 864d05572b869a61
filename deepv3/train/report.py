"""run_dir/report.html, redrawn in the background while the run goes on, and the page that compares runs.

The run's own thread only asks; a background thread reads what metrics.jsonl gained, draws, and publishes by rename.
Drawing costs the training process some interpreter time, so the next redraw waits at least 50 times as long as the last
one took: two percent at most.
"""

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from deepv3.errors import ConfigError
from deepv3.train.plots import draw_load, draw_losses
from deepv3.train.report_compare import compare
from deepv3.train.report_page import Folder, page
from deepv3.train.report_series import Series

REPORT = "report.html"
PAUSE = 50.0  # times the seconds of the last redraw
AT_LEAST = 10.0  # seconds between redraws


def publish(path: Path, text: str) -> Path:
    """Write `text` so that a reader sees the old page or the new one."""
    beside = path.with_name("." + path.name)
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
    return path


def write_report(run_dir: Path, series: Series | None = None) -> Path:
    """Draw run_dir/report.html from the files in run_dir; returns its path."""
    return publish(run_dir / REPORT, page(Folder.read(run_dir, series)))


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Draw the page that compares runs. Raises ConfigError where `path` is the report of one of them."""
    if path.resolve() in [(run / REPORT).resolve() for run in run_dirs]:
        raise ConfigError(f"output = {path} is the report of one of the runs; give output=FILE.html elsewhere")
    return publish(path, compare([Folder.read(run) for run in run_dirs]))


class Reporter:
    """Redraws report and pictures of one run; a request while one is being drawn, or too soon after, is dropped."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self._series = Series(run_dir / "metrics.jsonl")
        self._thread: threading.Thread | None = None
        self._next = 0.0

    def _draw(self) -> list[Path]:
        began = time.monotonic()
        drawn: list[Path | None] = [write_report(self.run_dir, self._series)]
        drawn += [draw_losses(self.run_dir, self._series), draw_load(self.run_dir)]
        self._next = time.monotonic() + max(AT_LEAST, PAUSE * (time.monotonic() - began))
        return [path for path in drawn if path is not None]

    def _draw_safely(self) -> list[Path]:
        """Whatever goes wrong (a full disk, above all) spoils the picture and not the run, nor the cause of its end."""
        try:
            return self._draw()
        except Exception as error:
            print(f"report not written: {type(error).__name__}: {error}", file=sys.stderr)
            self._next = time.monotonic() + 60
            return []

    def refresh(self) -> None:
        """Start a redraw unless one is under way or was a moment ago."""
        if time.monotonic() >= self._next and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._draw_safely, daemon=True)
            self._thread.start()

    def close(self) -> list[Path]:
        """Wait, draw the final state, return what was drawn: the report first, then the pictures; empty on failure."""
        if self._thread is not None:
            self._thread.join()
        return self._draw_safely()
