"""Folders that are built once and then shared: trained tokenizers, tokenised sources.

A folder ``KEY`` is worked on as ``KEY.building`` and renamed when it is complete, so whoever sees ``KEY`` sees all of
it. Every rank may call ``build_once`` at the same time: one process per file system gets the lock and builds, the
others wait and find the result; if the builder dies, the kernel drops its lock and the next one goes on from what is
finished. Nothing rests on the lock alone: content is a function of the key and every file inside is published by
rename, so two builders that meet (a file system without locks) write the same bytes.

Given up: waiting ranks poll once a second instead of sleeping in a collective, so that preparing for hours cannot trip
a communicator's watchdog.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from deepv3.errors import DataError, ResourceError

POLL_SECONDS = 1.0
_BUSY = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


def digest(value: Any) -> str:
    """16 hex digits over a JSON value: the name of what was built from it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def build_once(folder: Path, build: Callable[[Path], None], say: Callable[[str], None]) -> Path:
    """``folder``, complete. If it is not there, ``build`` fills a working folder, which may hold the finished files of
    an interrupted attempt, and the result is published under the name. say: told once if another process builds it.

    Raises DataError where the cache cannot be written, ResourceError where the disk is full, and whatever build raises.
    """
    try:
        while not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _lock(folder.with_name(folder.name + ".lock"), folder.is_dir, say) as alone:
                if not folder.is_dir():
                    _build(folder, build, alone)
    except OSError as error:
        raise _disk_error(folder, error) from error
    return folder


def _build(folder: Path, build: Callable[[Path], None], alone: bool) -> None:
    work = folder.with_name(folder.name + ".building")
    try:
        work.mkdir(exist_ok=True)
        build(work)
        for stray in work.glob(".*") if alone else ():  # halves of files, left by killed processes
            stray.unlink()
        work.rename(folder)
    except OSError:
        if not folder.is_dir():  # else a second builder was faster and has published the same
            raise
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _lock(path: Path, done: Callable[[], bool], say: Callable[[str], None]) -> Iterator[bool]:
    """Hold the lock of ``path`` (True); go on without it (False) once ``done`` or where the file system has no locks.

    The kernel drops the lock when the process dies.
    """
    with open(path, "a") as file:
        told = locked = False
        while not (locked or done()):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
                continue
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    break
                if error.errno not in _BUSY:
                    raise
            if not told:
                say(f"waiting for another process that prepares {path.with_suffix('')}")
                told = True
            time.sleep(POLL_SECONDS)
        yield locked


@contextmanager
def published(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name when it is complete and on disk, and not at all if the block raises."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Publish a JSON value."""
    with published(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")


def _disk_error(folder: Path, error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(folder.parent).free if folder.parent.is_dir() else 0
        return ResourceError(
            f"no space left for {folder} ({free / 2**30:.2f} GiB free): free some, or point data.cache_dir to another "
            "disk"
        )
    return DataError(f"{folder} cannot be written ({error}): point data.cache_dir to a folder that can")
