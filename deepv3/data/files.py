"""Which files a source's path means, and in which format."""

import glob
import hashlib
import json
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from deepv3.config.schema import SourceConfig
from deepv3.errors import DataError

STDLIB = "python-stdlib"
# Not read from the standard library: its tests (half of its bytes, some deliberately no valid text) and what is no part
# of it. Distributions differ in whether they ship the tests, so that without them the corpus is alike everywhere.
NOT_STDLIB = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})

SUFFIXES = {
    "parquet": (".parquet", ".pq"),
    "jsonl": tuple(
        f".{name}{packed}" for name in ("jsonl", "json", "ndjson") for packed in ("", ".gz", ".bz2", ".zst", ".lz4")
    ),
    "arrow": (".arrow",),
}
TEXT_SUFFIXES = (".txt", ".md")
SIGNS = SUFFIXES | {"text": (".txt",)}  # a README.md lies beside data of every format
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class Found(NamedTuple):
    """format: text, jsonl, parquet or arrow. paths: absolute, sorted, at least one."""

    format: str
    paths: list[str]


def find(config: SourceConfig, label: str) -> Found | None:
    """The files of a source, or None where its path is a hub name. Raises DataError where there is nothing to read."""
    if config.folders:
        return _folders(config, label)
    if config.path == STDLIB:
        root = sysconfig.get_path("stdlib")
        return _choose(list(_walk(root, NOT_STDLIB)), "text", config.suffixes or [".py"], label, f"{STDLIB} ({root})")
    path = Path(config.path).expanduser()
    if config.format == "hub":
        return None
    try:
        if path.is_dir():
            return _saved(path, config, label) or _folder(path, config, label)
        if path.is_file():
            return Found(_format_of(config, [str(path)], label), [str(path.absolute())])
    except PermissionError as error:
        raise DataError(f"{label}.path={config.path} may not be read ({error.strerror}); grant it or move it") from None
    if glob.has_magic(config.path):
        paths = sorted(str(Path(p).absolute()) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
        if not paths:
            raise DataError(f"{label}.path={config.path} matches no file; mend the pattern")
        return Found(_format_of(config, paths, label), paths)
    if config.format != "auto" or not _may_be_hub(config.path):
        raise DataError(f"{label}.path={config.path}: no such file or folder (seen from {os.getcwd()}); mend the path")
    return None


def _may_be_hub(path: str) -> bool:
    """NAME or OWNER/NAME, unless it ends like a file or begins with a folder that is here."""
    known = [suffix for group in SUFFIXES.values() for suffix in group] + list(TEXT_SUFFIXES)
    return bool(HUB_NAME.fullmatch(path)) and not path.endswith(tuple(known)) and not Path(path.split("/")[0]).exists()


def _walk(root: str | Path, without: frozenset[str] = frozenset()) -> Iterator[str]:
    """Files below ``root``, sorted. Passed by: hidden ones, bytecode, links to folders, folders in ``without``."""

    def unreadable(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(root, onerror=unreadable):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__" and f not in without)
        yield from (os.path.join(os.path.abspath(folder), name) for name in sorted(names) if not name.startswith("."))


def _folders(config: SourceConfig, label: str) -> Found:
    """Several folders as one, in the order given. A file that lies in two of them is there once."""
    below: dict[str, None] = {}
    for root in [config.path, *config.folders]:
        path = Path(sysconfig.get_path("stdlib") if root == STDLIB else root).expanduser()
        if not path.is_dir():
            raise DataError(f"{label}.folders: {root} is no folder (seen from {os.getcwd()}); mend it or leave it out")
        try:
            below |= dict.fromkeys(_walk(path, NOT_STDLIB if root == STDLIB else frozenset()))
        except PermissionError as error:
            raise DataError(f"{label}.folders: {error.filename} may not be read ({error.strerror}); grant it") from None
    where = f"{config.path} and {len(config.folders)} more"
    form = _format_of(config, list(below), label, folder=True)
    suffixes = config.suffixes or (TEXT_SUFFIXES if form == "text" else SUFFIXES[form])
    return _choose(list(below), form, suffixes, label, where)


def without_copies(files: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """The files less those whose bytes an earlier one has. files: (path, bytes, time).

    Only files of equal size are read; one that cannot be read stays, for the reader to name.
    """
    sizes = Counter(size for _, size, _ in files)
    seen: set[tuple[int, bytes]] = set()
    kept = []
    for file in files:
        path, size, _ = file
        if sizes[size] > 1:
            try:
                with open(path, "rb") as content:
                    sign = size, hashlib.file_digest(content, "sha256").digest()
            except OSError:
                sign = size, path.encode()
            if sign in seen:
                continue
            seen.add(sign)
        kept.append(file)
    return kept


def _folder(path: Path, config: SourceConfig, label: str) -> Found:
    below = list(_walk(path))
    if not below:
        raise DataError(f"{label}.path={config.path}: the folder is empty; put files there or mend the path")
    form = _format_of(config, below, label, folder=True)
    suffixes = config.suffixes or (TEXT_SUFFIXES if form == "text" else SUFFIXES[form])
    return _choose(below, form, suffixes, label, config.path)


def _choose(below: list[str], form: str, suffixes: list[str] | tuple[str, ...], label: str, where: str) -> Found:
    paths = [path for path in below if path.endswith(tuple(suffixes))]
    if not paths:
        there = Counter(Path(path).suffix or "none" for path in below).most_common(6)
        listed = ", ".join(f"{suffix} {count}" for suffix, count in there)
        raise DataError(
            f"{label}.path={where}: of {len(below)} files none ends in {', '.join(suffixes)} (there are: {listed}); "
            f"set {label}.suffixes to those that are documents"
        )
    return Found(form, paths)


def _format_of(config: SourceConfig, paths: list[str], label: str, folder: bool = False) -> str:
    """The stated format, else the one that the suffixes show; text where none does."""
    if config.format != "auto":
        return config.format
    if folder and config.suffixes:
        paths = [path for path in paths if path.endswith(tuple(config.suffixes))]
    shown = {form for form, suffixes in SIGNS.items() if any(path.endswith(suffixes) for path in paths)}
    if len(shown) > 1:
        raise DataError(
            f"{label}.path={config.path} holds {' and '.join(sorted(shown))} files; set {label}.format to one of them, "
            "and list the path once for each format that is wanted"
        )
    return shown.pop() if shown else "text"


def _saved(path: Path, config: SourceConfig, label: str) -> Found | None:
    """The arrow files of a folder written by ``save_to_disk``, else None."""
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if config.split not in splits:
            raise DataError(f"{label}.split={config.split}: {path} holds {', '.join(splits)}; set {label}.split")
        path /= config.split
    if not (path / "state.json").is_file():
        return None
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    paths = [str((path / file["filename"]).absolute()) for file in state["_data_files"]]
    missing = [name for name in paths if not Path(name).is_file()]
    if missing or not paths:
        raise DataError(f"{label}.path={config.path}: a saved dataset without {', '.join(missing[:3]) or 'data files'}")
    return Found("arrow", paths)
