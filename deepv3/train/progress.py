"""The one calm live line of a run: step, loss, tokens/s, expert balance, time left; plain lines without a terminal."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

PLAIN_EVERY_SECONDS = 10.0


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class LiveLine:
    """Rank 0's console. `fraction` is the share of the run that is done."""

    def __init__(self, enabled: bool):
        self.console = Console(file=sys.stdout, highlight=False)
        self.enabled = enabled
        self._live = enabled and self.console.is_terminal
        self._last_plain = 0.0
        self._seconds = 0.0
        self._start_fraction: float | None = None
        self._bar: Progress | None = None

    def say(self, text: str) -> None:
        """A line that stays, above the live one."""
        self.console.print(text, soft_wrap=True)

    def update(self, row: dict, fraction: float, val_loss: float | None) -> None:
        """Show one step's row."""
        if not self.enabled:
            return
        text = (
            f"step {row['step']}  loss {row['loss_main']:.3f}"
            + (f"  val {val_loss:.3f}" if val_loss is not None else "")
            + f"  {row['tokens_per_second']:,.0f} tok/s  MaxVio {row['max_vio']:.2f}  ETA {self._eta(row, fraction)}"
        )
        if self._live:
            self._bar_update(text, fraction)
        elif time.monotonic() - self._last_plain > PLAIN_EVERY_SECONDS or fraction >= 1:
            self._last_plain = time.monotonic()
            print(f"{fraction:6.1%}  {text}", flush=True)

    def _eta(self, row: dict, fraction: float) -> str:
        if self._start_fraction is None:  # the first step carries compilation and does not predict the rest
            self._start_fraction = fraction
            return "..."
        self._seconds += row["step_seconds"]
        done = fraction - self._start_fraction
        return duration(self._seconds * (1 - fraction) / done) if done > 0 else "..."

    def _bar_update(self, text: str, fraction: float) -> None:
        if self._bar is None:
            self._bar = Progress(
                BarColumn(24), TextColumn("{task.percentage:5.1f}%"), TextColumn("{task.description}"),
                console=self.console, refresh_per_second=4,
            )  # fmt: skip
            self._task = self._bar.add_task(text, total=1.0)
            self._bar.start()
        self._bar.update(self._task, completed=fraction, description=text)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
