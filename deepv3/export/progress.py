"""The bar of an export or import: on a terminal bytes written, speed and time left; elsewhere nothing."""

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


def progress_bar() -> Progress:
    """A bar on stderr that goes when it is done."""
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    disable = not console.is_terminal
    return Progress(TextColumn("{task.description}"), *columns, console=console, transient=True, disable=disable)
