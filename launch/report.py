"""Draws reports: ``python launch/report.py runs=[A]`` rebuilds A/report.html; runs=[A,B,...] compares runs in one page.

A folder that holds run folders (a sweep's) stands for all of them. output=FILE names the page of a comparison; without
it the page is report.html of the folder that the runs share. Reads the run folders' files alone and changes none.
"""

import os
import sys
from pathlib import Path

from deepv3.config.cli import guarded
from deepv3.errors import ConfigError
from deepv3.train.report import write_comparison, write_report
from deepv3.train.report_compare import find_runs


def read(arguments: list[str]) -> tuple[list[str], Path | None]:
    """(runs, output). Raises ConfigError for another key or no run at all."""
    runs: list[str] = []
    output = None
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "runs":
            runs = [part.strip().strip("'\"") for part in value.strip("[]").split(",") if part.strip()]
        elif key == "output" and value:
            output = Path(value)
        else:
            raise ConfigError(f"{argument!r} is neither runs=[A,B,...] nor output=FILE.html")
    if not runs:
        raise ConfigError("runs is empty; python launch/report.py runs=[runs/tiny] or runs=[A,B]")
    return runs, output


def main() -> None:
    """Write the page and say where it lies."""
    given, output = read(sys.argv[1:])
    runs = find_runs(given)
    if len(runs) == 1 and output is None:
        print(f"report       {write_report(runs[0])}")
        return
    shared = Path(os.path.commonpath([run.resolve() for run in runs]))
    target = output or (shared.parent if len(runs) == 1 else shared) / "report.html"
    print(f"comparison   {write_comparison(runs, target)}")


if __name__ == "__main__":
    sys.exit(guarded(main))
