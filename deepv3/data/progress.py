"""The progress bar of tokenising; where there is no terminal, a line now and then."""

import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_SECONDS = 30.0


class Bar:
    """Bytes read of all, tokens written, bad documents, time left. ``with Bar(bytes, say) as bar: bar.add(...)``."""

    def __init__(self, total: int, say):
        console = Console(stderr=True)
        self._say, self._total, self._plain = say, total, not console.is_terminal
        self._done = self._tokens = self._bad = 0
        self._said = time.monotonic()
        columns = (BarColumn(), DownloadColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=self._plain)
        self._task = self._progress.add_task("", total=total, note="")

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def add(self, done: int, tokens: int, bad: int) -> None:
        """Count a finished piece."""
        self._done, self._tokens, self._bad = self._done + done, self._tokens + tokens, self._bad + bad
        note = f"{self._tokens:,} tokens" + (f", {self._bad:,} bad documents" if self._bad else "")
        self._progress.update(self._task, completed=self._done, note=note)
        if self._plain and time.monotonic() - self._said > PLAIN_EVERY_SECONDS:
            self._said = time.monotonic()
            self._say(f"  {self._done / max(1, self._total):.0%}, {note}")
