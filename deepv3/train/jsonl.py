"""Append-only files of one JSON object a line with a ``step``: whole lines only, cut on resume, thinned if asked."""

import json
import math
from pathlib import Path
from typing import Any


def finite(row: Any) -> Any:
    """The row with NaN and infinities as null, which JSON can hold."""
    if isinstance(row, dict):
        return {k: finite(v) for k, v in row.items()}
    if isinstance(row, list):
        return [finite(v) for v in row]
    return None if isinstance(row, float) and not math.isfinite(row) else row


class JsonLines:
    """An append-only file of one JSON object a line with a ``step`` key."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, row: dict) -> None:
        """Write one whole line; a line is complete or absent for every reader."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(row)) + "\n")

    def read(self) -> list[dict]:
        """All whole rows; a torn last line (a kill in its write) is left out."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def cut(self, step: int) -> None:
        """Drop rows after `step`, by writing the kept ones beside and renaming."""
        if self.path.exists():
            self._replace([row for row in self.read() if row["step"] <= step])

    def thin(self, rows: int) -> None:
        """Keep about `rows` rows, evenly spaced over the steps, always the first and the last."""
        old = self.read()
        if len(old) <= rows:
            return
        apart = (old[-1]["step"] - old[0]["step"]) / (rows - 1)
        kept = old[:1]
        for row in old[1:-1]:
            if row["step"] - kept[-1]["step"] >= apart:
                kept.append(row)
        self._replace([*kept, old[-1]])

    def _replace(self, rows: list[dict]) -> None:
        beside = self.path.with_name("." + self.path.name)
        beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        beside.replace(self.path)
