"""What happened to a run beside its steps: saves, skips, rewinds, restarts, alarms; one JSON object a line.

``run_dir/events.jsonl`` holds rows {time, step, kind, text} in the order they happened. Unlike metrics.jsonl it is
never cut on resume: a rewind is a fact even where the steps it undid are gone, so steps may go back between two rows.
"""

import json
import time
from pathlib import Path

from deepv3.errors import EXIT_RESTART

EVENTS = "events.jsonl"

# kind -> how the report names it. Another kind is written and shown all the same, under its own name.
KINDS = {
    "start": "start",
    "restart": "restart",
    "save": "checkpoint saved",
    "skip": "step skipped",
    "rewind": "rewind",
    "alarm": "alarm",
    "stop": "stop",
    "profile": "profile",
    "fail": "failed",
    "done": "done",
}


class EventLog:
    """Writer of run_dir/events.jsonl. Every rank may hold one; a row is one write to a file opened for appending."""

    def __init__(self, run_dir: Path):
        self.path = Path(run_dir) / EVENTS

    def add(self, kind: str, step: int, text: str) -> None:
        """Note that `kind` (see KINDS) happened after optimizer step `step`; text: one line for people.

        Called from the training loop's guards, so a full disk is not allowed to end the run here: the row is lost.
        """
        row = {"time": round(time.time(), 3), "step": int(step), "kind": kind, "text": " ".join(text.split())}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError:
            return


def read_events(run_dir: Path) -> list[dict]:
    """All whole rows in file order; a torn line (a kill in its write) and foreign lines are left out."""
    path = Path(run_dir) / EVENTS
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"time", "step", "kind", "text"} <= row.keys():
            rows.append(row)
    return rows


def note_end(run_dir: Path, step: int, error: BaseException | None) -> None:
    """Note how a run ended: done, stopped (may be restarted) or failed. A run that was done before stays as it is."""
    earlier = read_events(run_dir)
    if error is None and earlier and earlier[-1]["kind"] == "done":
        return
    if error is None:
        EventLog(run_dir).add("done", step, "the run reached its end")
    elif getattr(error, "exit_code", None) == EXIT_RESTART or isinstance(error, KeyboardInterrupt):
        EventLog(run_dir).add("stop", step, str(error) or type(error).__name__)
    else:
        EventLog(run_dir).add("fail", step, f"{type(error).__name__}: {error}")
