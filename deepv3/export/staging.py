"""An output folder that appears whole or not at all, and never at the cost of somebody else's files.

Method: everything is written to a hidden folder beside the output, made durable, then renamed into place; an earlier
export of ours is exchanged with the new one in one system call (where the file system cannot exchange, the old one is
moved aside an instant before). A killed export leaves only the hidden folder, which the next one clears; a lock file
beside it keeps two exports to one output apart.
"""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepv3.checkpoint.shards import sync_folder
from deepv3.errors import CheckpointError, ConfigError, ResourceError
from deepv3.export.files import MARKER, read_json

SLACK_BYTES = 64 << 20  # tokenizer, JSON files, the file system's own needs
GIB = 2**30
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def staged(output: Path, nbytes: int, what: str = "export") -> Iterator[Path]:
    """A hidden folder to fill; becomes `output` when the block ends well, vanishes when it does not.

    nbytes: what will be written, checked against the free space; what: the act, for messages. Raises ConfigError for an
    output that is not ours, ResourceError where the disk is too small or fills up, CheckpointError where another export
    to it is under way.
    """
    check_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    _check_space(output, nbytes, what)
    folder = output.parent / f".{output.name}.partial"
    lock = _lock(output)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
        sync_folder(folder)
        _publish(folder, output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"{output}: the disk filled up during the {what}; nothing was kept: {error}") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _lock_path(output).unlink(missing_ok=True)
        os.close(lock)


def check_output(output: Path) -> None:
    """Raise ConfigError unless `output` does not exist, is an empty folder, or holds an export of ours only."""
    if not output.exists():
        return
    if not output.is_dir():
        raise ConfigError(f"output={output} is a file; name a folder that does not exist yet")
    present = {path.name for path in output.iterdir()}
    if not present:
        return
    if MARKER not in present:
        raise ConfigError(
            f"output={output} exists and is not an export of ours (it has no {MARKER}); name another folder or "
            "remove it"
        )
    foreign = sorted(present - set(read_json(output / MARKER).get("files", [])))
    if foreign:
        raise ConfigError(
            f"output={output} is an export of ours but also holds {', '.join(foreign[:5])}, which replacing it would "
            "delete; move that away or name another folder"
        )


def _check_space(output: Path, nbytes: int, what: str) -> None:
    free, needed = shutil.disk_usage(output.parent).free, nbytes + SLACK_BYTES
    if needed > free:
        raise ResourceError(
            f"the {what} needs {needed / GIB:.2f} GiB, but {output.parent} has {free / GIB:.2f} GiB free: free some or "
            "name an output on another disk" + (" (dtype=bfloat16 takes half of float32)" if what == "export" else "")
        )


def _lock_path(output: Path) -> Path:
    return output.parent / f".{output.name}.lock"


def _lock(output: Path) -> int:
    """Lock `output` against other exports; returns the descriptor that holds the lock until it is closed."""
    path = _lock_path(output)
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = path.exists() and os.path.samestat(os.fstat(lock), os.stat(path))  # not a file its last owner removed
    except BlockingIOError:
        held = False
    if not held:
        os.close(lock)
        raise CheckpointError(f"{output}: another export to it is under way; wait for it or name another output")
    return lock


def _publish(folder: Path, output: Path) -> None:
    """Put `folder` in the place of `output`."""
    try:
        os.rename(folder, output)  # nothing there, or an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(folder, output):
            aside = output.parent / f".{output.name}.replaced"
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(output, aside)
            os.rename(folder, output)
            shutil.rmtree(aside)
    sync_folder(output.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one step; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0
