"""The folders of a run's checkpoints on the disk: room for one, the rename that publishes it, and how many are kept.

run_dir/checkpoints/step-00000123/            published: complete
                    .step-00000124.<token>.partial/   being written, or left by a kill: nobody reads it
                    abandoned-step-00000130/  later steps of a run that was wound back
                    latest                    link to the newest, for people; nothing reads it
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from deepv3.checkpoint import manifest as manifests
from deepv3.checkpoint.manifest import Manifest
from deepv3.checkpoint.shards import sync_folder
from deepv3.errors import ResourceError


def steps(folder: Path) -> list[Path]:
    """Published checkpoints in a folder, newest first, sound or not."""
    found = [path for path in folder.iterdir() if manifests.STEP.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(path.name[5:])


def prepare(hidden: Path) -> None:
    """Make the empty hidden folder in which a checkpoint is written; leftovers of killed saves go."""
    for stale in hidden.parent.glob(".step-*"):
        shutil.rmtree(stale, ignore_errors=True)  # a straggler of the killed run may still write there
    hidden.mkdir(parents=True)


def require_space(folder: Path, needed: int) -> None:
    """Raise ResourceError where the folder's disk has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"no space for a checkpoint: it takes {needed / 2**30:.3f} GiB, {folder} has {free / 2**30:.3f} GiB free; "
            "free some, lower checkpoint.keep, save less often (checkpoint.every) or set run_dir to another disk"
        )


def publish(hidden: Path, final: Path, content: Manifest) -> None:
    """Add the manifest and rename; each name is on the disk before the next thing happens. Raises OSError."""
    with open(hidden / manifests.NAME, "w", encoding="utf-8") as file:
        file.write(content.to_json())
        file.flush()
        os.fsync(file.fileno())
    sync_folder(hidden)
    if final.exists():  # the same step again, after resuming from an older checkpoint
        _discard(final)
    hidden.rename(final)
    sync_folder(final.parent)
    with suppress(OSError):  # some file systems have no links
        beside = final.with_name(".latest")
        beside.unlink(missing_ok=True)
        beside.symlink_to(final.name)
        beside.replace(final.with_name("latest"))


def retain(latest: Path, keep: int, keep_every: int) -> None:
    """Remove all but the `keep` newest checkpoints up to `latest` and those of every keep_every-th step (0: none of
    them); move later steps out of the way."""
    older = []
    for path in steps(latest.parent):
        if step_of(path) > step_of(latest):
            aside = path.with_name(f"abandoned-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        elif path.name != latest.name:
            older.append(path)
    for path in older[max(keep, 1) - 1 :]:
        if not keep_every or step_of(path) % keep_every:
            _discard(path)


def _discard(path: Path) -> None:
    """Remove a checkpoint so that a kill half-way leaves nothing that looks like one."""
    hidden = path.with_name(f".{path.name}.discarded")
    path.rename(hidden)
    shutil.rmtree(hidden)
