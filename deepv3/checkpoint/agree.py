"""Acts that all ranks do together or not at all."""

import errno
from collections.abc import Callable
from typing import Any

from deepv3.dist import Grid
from deepv3.errors import CheckpointError, DeepV3Error, ResourceError


def agree(grid: Grid, what: str, act: Callable[[], Any]) -> list[Any]:
    """Run `act` on every rank; all ranks get all results (JSON), or all raise what the first failing rank met.

    what: the act in words, for "cannot <what>: <reason>". A full disk becomes ResourceError, every other refusal of the
    system CheckpointError; an unforeseen exception stays what it is on its own rank.
    """
    result: Any = None
    failure: tuple[bool, str] | None = None  # (out of space?, message)
    unforeseen: Exception | None = None
    try:
        result = act()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = ": free some, lower checkpoint.keep, or set run_dir to another disk" if full else ""
        failure = full, f"cannot {what}: {error.strerror or error}{hint}"
    except DeepV3Error as error:
        failure = isinstance(error, ResourceError), str(error)
    except Exception as error:  # its peers must not wait for it
        unforeseen, failure = error, (False, f"cannot {what}: {error!r}")
    outcomes = grid.gather([failure, None if failure else result])
    if unforeseen is not None:
        raise unforeseen
    for rank, (failed, _) in enumerate(outcomes):
        if failed is not None:
            message = failed[1] + (f" (rank {rank})" if grid.world_size > 1 else "")
            raise ResourceError(message) if failed[0] else CheckpointError(message)
    return [value for _, value in outcomes]
