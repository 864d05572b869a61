"""From ``data.sources[i]`` to a Source: the files it means, checked before any work, and the pieces they are read in.

Local files and folders, globs, saved datasets and hub datasets all end as a list of pieces (reading.py), except a hub
dataset with ``streaming``, which is read as the hub serves it. Hidden files and folders and ``__pycache__`` are no
documents. What cannot work is a DataError here: a path that leads nowhere, a folder without a fitting file, a field
that no row has. A damaged file beside sound ones is named and counted like a damaged document.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from deepv3.config.schema import SourceConfig
from deepv3.data import files, pieces
from deepv3.data.reading import MAX_FILES, Document, Piece, document, stream
from deepv3.errors import DataError


@dataclass
class Source:
    """A source ready to be read. label: its field, for messages. damaged: (file, reason) of files that do not open.

    identity: a JSON value that is equal while the documents are the same (paths, sizes, times, field, format).
    pieces: empty only for a hub dataset that streams. bytes: of text and files, an estimate for progress; 0 unknown.
    copies: files left out because another one has the same bytes.
    """

    label: str
    config: SourceConfig
    identity: object
    pieces: list[Piece] = field(default_factory=list)
    damaged: list[tuple[str, str]] = field(default_factory=list)
    bytes: int = 0
    copies: int = 0
    _sharded: datasets.IterableDataset | None = field(default=None, init=False, repr=False)

    def documents(self, cache_dir: Path, piece: int | None = None) -> datasets.IterableDataset:
        """The documents in order, or those of one piece; ``as_document`` makes each row one."""
        if not self.pieces:
            return _from_hub(self.config, self.label, cache_dir)
        if piece is None:
            return stream(self.pieces, self.config.field, cache_dir)
        if self._sharded is None:
            self._sharded = stream(self.pieces, self.config.field, cache_dir)
        return self._sharded.shard(len(self.pieces), piece)

    def as_document(self, row: dict, index: int) -> Document:
        """A row of ``documents`` as a document; index: its place in the stream, the number of a hub document."""
        if self.pieces:
            return row
        return document(index, f"{self.config.path} document {index}", row.get(self.config.field))


def open_source(config: SourceConfig, label: str, cache_dir: Path, stop_at_damage: bool) -> Source:
    """Find and check the files of one source. label: ``data.sources[0]``. stop_at_damage: data.bad_documents=stop.

    Raises DataError, naming the field and the fix.
    """
    found = files.find(config, label)
    if found is None:
        return _open_hub(config, label, cache_dir, stop_at_damage)
    return _open_local(found, config, label, stop_at_damage)


def _open_local(found: files.Found, config: SourceConfig, label: str, stop_at_damage: bool) -> Source:
    if len(found.paths) > MAX_FILES:
        raise DataError(
            f"{label}.path={config.path} holds {len(found.paths):,} files, more than {MAX_FILES:,}; pack the documents "
            "into parquet or jsonl files"
        )
    stats, missing = [], []
    for path in found.paths:
        try:
            status = os.stat(path)
            stats.append((path, status.st_size, status.st_mtime_ns))
        except OSError as error:  # a dangling link
            missing.append((path, error.strerror or str(error)))
    if stats and not any(size for _, size, _ in stats):
        raise DataError(f"{label}.path={config.path}: all {len(stats)} files are empty; give files that hold text")
    every, stats = len(stats), files.without_copies(stats) if config.unique else stats
    made, damaged = pieces.cut(found.format, [row[:2] for row in stats], config.field)
    damaged = missing + damaged
    _check_damage(label, config, len(found.paths), damaged, stop_at_damage)
    if not made:
        raise DataError(
            f"{label}.path={config.path}: {len(stats)} files without a single row; give files that hold text"
        )
    identity = {"format": found.format, "field": config.field, "files": stats}
    size = sum(piece.bytes for piece in made)
    return Source(label, config, identity, made, damaged, size, every - len(stats))


def _check_damage(label: str, config: SourceConfig, count: int, damaged: list[tuple[str, str]], stop: bool) -> None:
    if not damaged or (len(damaged) < count and not stop):
        return
    listed = "; ".join(f"{path} {reason}" for path, reason in damaged[:5])
    listed += f"; and {len(damaged) - 5} more" if len(damaged) > 5 else ""
    if len(damaged) == count:
        no_field = damaged[0][1].startswith(pieces.NO_FIELD)
        fix = f"set {label}.field" if no_field else f"mend the files, or set {label}.format to what they are"
        raise DataError(f"{label}.path={config.path}: none of {count} files can be read: {listed}. To go on, {fix}")
    raise DataError(
        f"{label}.path={config.path}: {len(damaged)} of {count} files cannot be read: {listed}. "
        "Mend or remove them, or set data.bad_documents=skip"
    )


def _open_hub(config: SourceConfig, label: str, cache_dir: Path, stop_at_damage: bool) -> Source:
    if config.streaming:
        identity = {"hub": config.path, "name": config.name, "split": config.split, "field": config.field}
        source = Source(label, config, identity)
        for row in source.documents(cache_dir):
            if config.field not in row:
                raise DataError(f"{label}.field={config.field}: the dataset has {', '.join(row)}; set {label}.field")
            return source
        raise DataError(f"{label}.path={config.path}: split {config.split} is empty; set {label}.split")
    loaded = _from_hub(config, label, cache_dir)
    paths = sorted(file["filename"] for file in loaded.cache_files)
    return _open_local(files.Found("arrow", paths), config, label, stop_at_damage)


def _from_hub(config: SourceConfig, label: str, cache_dir: Path) -> datasets.Dataset | datasets.IterableDataset:
    try:
        return datasets.load_dataset(
            config.path,
            config.name,
            split=config.split,
            streaming=config.streaming,
            cache_dir=None if config.streaming else str(cache_dir / "hub"),
        )
    except Exception as error:  # the hub client raises its own, the file system's and the network's
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DataError(
            f"{label}.path={config.path}: no file or folder here, and the hub does not give it ({reason}). Give a path "
            f"that exists, or a dataset's name, {label}.name and {label}.split, with network access or after a "
            "download into data.cache_dir"
        ) from error


def read_text(source: Source, cache_dir: Path, limit: int) -> Iterator[str]:
    """About ``limit`` bytes of text spread over the whole source, to train a tokenizer on, without bad documents."""
    taken = 0
    for dataset in _spread(source, cache_dir):
        for index, row in enumerate(dataset):
            text = source.as_document(row, index)["text"]
            if text:
                text = text[: limit - taken]
                taken += len(text.encode())
                yield text
            if taken >= limit:
                return


def _spread(source: Source, cache_dir: Path) -> Iterator[datasets.IterableDataset]:
    """The pieces one by one in an order whose every beginning covers the source: 0, 1/2, 1/4, 3/4, 1/8 ..."""
    if not source.pieces:
        yield source.documents(cache_dir)
        return
    bits = len(source.pieces).bit_length()
    order = (int(format(i, f"0{bits}b")[::-1], 2) for i in range(1 << bits))
    for i in order:
        if i < len(source.pieces):
            yield source.documents(cache_dir, i)
