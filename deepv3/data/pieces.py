"""Cutting files into pieces: about 256 a source, between 1 and 256 MiB, whatever the number of readers.

Cutting opens every file that has a footer or a header, so a damaged file or a missing field is known before any work.
"""

import json
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from deepv3.data.reading import PLACE_BITS, Piece, open_arrow, open_lines

PIECES = 256  # aimed at: enough for even work and fine resuming
MIN_BYTES = 1 << 20
MAX_BYTES = 256 << 20
PROBE_LINES = 100  # of a jsonl file, one of which must have the field

NO_FIELD = "has no field"


class Unreadable(Exception):
    """A file that is not what its format says; the message is the reason."""


def cut(form: str, files: list[tuple[str, int]], field: str) -> tuple[list[Piece], list[tuple[str, str]]]:
    """(pieces in the order of the files, (path, reason) of the files that cannot be opened). files: (path, bytes)."""
    target = min(max(sum(size for _, size in files) // PIECES, MIN_BYTES), MAX_BYTES)
    if form == "text":
        return list(_cut_text(files, target)), []
    cutter = {"jsonl": _cut_jsonl, "parquet": _cut_parquet, "arrow": _cut_arrow}[form]
    pieces, damaged = [], []
    for i, (path, size) in enumerate(files):
        try:
            for start, stop, weight in cutter(path, size, field, target):
                pieces.append(Piece(form, i, (path,), start, stop, weight))
        except (Unreadable, OSError, EOFError, pa.ArrowException) as error:
            damaged.append((path, " ".join(str(error).split())[:300] or type(error).__name__))
    return pieces, damaged


def _cut_text(files: list[tuple[str, int]], target: int) -> Iterator[Piece]:
    first = held = 0
    for i, (_, size) in enumerate(files):
        held += size
        if held >= target or i == len(files) - 1:
            yield Piece("text", first, tuple(path for path, _ in files[first : i + 1]), 0, 1, held)
            first, held = i + 1, 0


def _cut_jsonl(path: str, size: int, field: str, target: int) -> Iterator[tuple[int, int, int]]:
    if not size:
        raise Unreadable("is empty")
    _probe_lines(path, field)
    if not path.endswith((".jsonl", ".json", ".ndjson")):  # compressed: cannot be entered in the middle
        yield 0, 1 << PLACE_BITS, size
        return
    for start in range(0, size, target):
        stop = min(start + target, size)
        yield start, stop, stop - start


def _probe_lines(path: str, field: str) -> None:
    """Raises Unreadable unless one of the first lines is an object with the field."""
    seen: set[str] = set()
    parsed = 0
    with open_lines(path) as file:
        for _ in range(PROBE_LINES):
            line = file.readline(MAX_BYTES)
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                if field in row:
                    return
                parsed += 1
                seen |= row.keys()
    if parsed:
        raise Unreadable(f"{NO_FIELD} {field!r} in its first {parsed} rows, which have {', '.join(sorted(seen)[:12])}")
    raise Unreadable(f"has no JSON object in its first {PROBE_LINES} lines; write one object per line")


def _cut_parquet(path: str, size: int, field: str, target: int) -> Iterator[tuple[int, int, int]]:
    with pq.ParquetFile(path) as file:
        _check_column(file.schema_arrow, field)
        if not file.metadata.num_rows:
            return
        weights = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    first = held = 0
    for group, weight in enumerate(weights):
        held += weight
        if held >= target or group == len(weights) - 1:
            yield first, group + 1, held
            first, held = group + 1, 0


def _cut_arrow(path: str, size: int, field: str, target: int) -> Iterator[tuple[int, int, int]]:
    table = open_arrow(path)
    _check_column(table.schema, field)
    rows = table.num_rows
    count = max(1, min(rows, size // target))
    edges = [rows * i // count for i in range(count + 1)]
    for start, stop in zip(edges, edges[1:]):
        if stop > start:
            yield start, stop, size * (stop - start) // rows


def _check_column(schema: pa.Schema, field: str) -> None:
    if field not in schema.names:
        raise Unreadable(f"{NO_FIELD} {field!r} but {', '.join(schema.names[:12])}")
