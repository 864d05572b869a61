"""Documents out of files, piece by piece, as one ``datasets`` stream that no damaged document can stop.

A piece is a stretch of a source that is read on its own: a run of small files, a byte range of a jsonl file, some row
groups of a parquet file, some rows of an arrow file. Pieces are the shards of an ``IterableDataset``, the unit of work
of the tokenising processes and the unit of resuming; they depend on the files alone, never on who reads them.

Every document has a number, file << 40 | place in the file (0, byte offset or row), on which all its random decisions
hang (held out or not, FIM or not), and a name that a person can find it by. What cannot be read comes out as a document
with ``error`` set and no text. Line endings and everything else in a text stay as they are; a byte order mark goes.
"""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.io.generator import GeneratorDatasetInputStream

PLACE_BITS = 40  # of a document number: places in a file
MAX_FILES = 1 << (63 - PLACE_BITS)  # of one source
MAX_DOCUMENT_BYTES = 1 << 30  # larger ones are named as bad: a text is held in memory whole
READ_ROWS = 512  # decoded at a time from parquet and arrow

FEATURES = datasets.Features(
    {
        "number": datasets.Value("int64"),
        "name": datasets.Value("string"),
        "text": datasets.Value("large_string"),
        "error": datasets.Value("string"),
    }
)

Document = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """Files first_file, first_file + 1, ... (text: several, else one), of each the stretch start <= place < stop.

    places: byte offsets of line starts (jsonl), row groups (parquet), rows (arrow); text files are always whole.
    """

    format: str
    first_file: int
    paths: tuple[str, ...]
    start: int
    stop: int
    bytes: int


def stream(pieces: list[Piece], field: str, cache_dir: Path) -> datasets.IterableDataset:
    """The documents of ``pieces`` in order, features as FEATURES; each piece is a shard of the dataset."""
    return GeneratorDatasetInputStream(
        generator=read_pieces,
        features=FEATURES,
        gen_kwargs={"pieces": list(pieces), "field": field},
        cache_dir=str(cache_dir / "datasets"),
        streaming=True,
    ).read()


def read_pieces(pieces: list[Piece], field: str) -> Iterator[Document]:
    """All documents of the pieces, damaged ones included."""
    for piece in pieces:
        yield from READERS[piece.format](piece, field)


def document(number: int, name: str, value: Any) -> Document:
    """A document from what a reader found: text, bytes of UTF-8, or anything else, which is an error."""
    try:
        return {"number": number, "name": name, "text": as_text(value), "error": None}
    except ValueError as error:
        return bad(number, name, error)


def bad(number: int, name: str, error: object) -> Document:
    """A document that could not be read."""
    return {"number": number, "name": name, "text": None, "error": " ".join(str(error).split())[:300]}


def as_text(value: Any) -> str:
    """Raises ValueError, with a reason for people, where ``value`` is no text."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            found = value[error.start : error.start + 1].hex()
            raise ValueError(f"invalid UTF-8: byte 0x{found} at {error.start} of {len(value)}") from None
    if value is None:
        raise ValueError("no text: the field is missing or null")
    if not isinstance(value, str):
        raise ValueError(f"no text: the field holds {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise ValueError(f"invalid UTF-8: lone surrogate at character {error.start}") from None
    return value


def read_text_files(piece: Piece, field: str) -> Iterator[Document]:
    """One document per file."""
    for i, path in enumerate(piece.paths):
        number = (piece.first_file + i) << PLACE_BITS
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_DOCUMENT_BYTES + 1)
        except OSError as error:
            yield bad(number, path, error.strerror or error)
            continue
        if len(data) > MAX_DOCUMENT_BYTES:
            yield bad(number, path, f"more than {MAX_DOCUMENT_BYTES:,} bytes")
        elif b"\0" in data:
            yield bad(number, path, f"binary: a NUL byte at {data.index(0)} of {len(data)}")
        else:
            yield document(number, path, data)


def open_lines(path: str) -> IO[bytes]:
    """A jsonl file for reading; .gz, .bz2, .zst and .lz4 are expanded on the way."""
    if Path(path).suffix in (".jsonl", ".json", ".ndjson"):
        return open(path, "rb")
    return io.BufferedReader(pa.input_stream(path, compression="detect"), 1 << 20)


def read_jsonl(piece: Piece, field: str) -> Iterator[Document]:
    """One document per line; a line belongs to the piece in which it starts. Blank lines are nothing."""
    (path,) = piece.paths
    base, place = piece.first_file << PLACE_BITS, piece.start
    try:
        with open_lines(path) as file:
            if place:
                file.seek(place - 1)
                place += _skip_line(file) - 1
            while place < piece.stop:
                line = file.readline(MAX_DOCUMENT_BYTES)
                if not line:
                    return
                name, start, place = f"{path} at byte {place}", place, place + len(line)
                if len(line) == MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
                    place += _skip_line(file)
                    yield bad(base | start, name, f"a line of more than {MAX_DOCUMENT_BYTES:,} bytes")
                elif line.strip():
                    yield _parse_line(base | start, name, line, field)
    except (OSError, EOFError) as error:
        yield bad(base | place, f"{path} from byte {place}", error)


def _skip_line(file: IO[bytes]) -> int:
    skipped = 0
    while line := file.readline(1 << 20):
        skipped += len(line)
        if line.endswith(b"\n"):
            break
    return skipped


def _parse_line(number: int, name: str, line: bytes, field: str) -> Document:
    try:
        row = json.loads(as_text(line))
    except (ValueError, RecursionError) as error:
        return bad(number, name, error if "UTF-8" in str(error) else f"no JSON: {error}")
    if not isinstance(row, dict):
        return bad(number, name, f"no JSON object but {type(row).__name__}")
    return document(number, name, row.get(field))


def read_parquet(piece: Piece, field: str) -> Iterator[Document]:
    """One document per row. A damaged row group is one bad document, and the next group goes on."""
    (path,) = piece.paths
    with pq.ParquetFile(path) as file:
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        for group in range(piece.start, piece.stop):
            place = sum(rows[:group])
            try:
                for batch in file.iter_batches(READ_ROWS, row_groups=[group], columns=[field]):
                    yield from _read_rows(piece, batch.column(0), place)
                    place += len(batch)
            except (OSError, pa.ArrowException) as error:
                number = piece.first_file << PLACE_BITS | place
                yield bad(number, f"{path} row {place} to the end of row group {group}", error)


def read_arrow(piece: Piece, field: str) -> Iterator[Document]:
    """One document per row, memory-mapped."""
    (path,) = piece.paths
    column = open_arrow(path).column(field)
    for start in range(piece.start, piece.stop, READ_ROWS):
        yield from _read_rows(piece, column.slice(start, min(READ_ROWS, piece.stop - start)), start)


def open_arrow(path: str) -> pa.Table:
    """The memory-mapped table of an Arrow file: the stream form that ``datasets`` writes, or the file form."""
    with open(path, "rb") as file:
        is_file_form = file.read(6) == b"ARROW1"
    if is_file_form:
        return pa.ipc.open_file(pa.memory_map(path)).read_all()
    return datasets.Dataset.from_file(path).data.table


def _read_rows(piece: Piece, column: pa.Array | pa.ChunkedArray, place: int) -> Iterator[Document]:
    for i, cell in enumerate(column):
        number, name = piece.first_file << PLACE_BITS | place + i, f"{piece.paths[0]} row {place + i}"
        try:
            yield document(number, name, cell.as_py())
        except UnicodeDecodeError:  # a string column may hold any bytes: writers do not check
            yield document(number, name, cell.as_buffer().to_pybytes())


READERS: dict[str, Callable[[Piece, str], Iterator[Document]]] = {
    "text": read_text_files,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
