"""When a run's state is saved, what is said of it, and what a failed save means.

Saves that are due go on in the background; the last one of a process is waited for. A background save that fails (a
full disk, a file system that is away) costs a warning and is tried again when the next one is due, because the run's
state is sound and the older checkpoints stand; MAX_FAILURES in a row end the run, and so does a failed last save.
"""

from typing import Any

from deepv3.checkpoint.saver import Saved, Saver
from deepv3.config.schema import Config
from deepv3.errors import CheckpointError, ResourceError
from deepv3.train.events import EventLog

MAX_FAILURES = 2


class Saves:
    """A run's saves on this rank. All ranks call the same methods at the same steps. events: rank 0's, or None."""

    def __init__(self, saver: Saver, cfg: Config, events: EventLog | None):
        self.saver, self.events = saver, events
        self.asynchronous, self.rewinds = cfg.checkpoint.asynchronous, cfg.train.spike == "rewind"
        self.failures = 0
        self.held_step: int | None = None

    def hold(self, step: int, client: dict[str, Any]) -> None:
        """Keep a copy to wind back to, where the run does that."""
        if self.rewinds:
            self.saver.hold(client)
            self.held_step = step

    def periodic(self, step: int, client: dict[str, Any]) -> None:
        """Save the state after `step`, in the background if checkpoint.asynchronous."""
        try:
            if self.asynchronous:
                self._tell(self.saver.start(step, client))
                self.held_step = step
            else:
                self._tell(self.saver.save(step, client))
                self.hold(step, client)
        except (CheckpointError, ResourceError) as error:
            self._failed(step, error)

    def last(self, step: int, client: dict[str, Any]) -> None:
        """Save the state after `step` and return when it is published. Raises as store.save."""
        self.settle(step)
        self._tell(self.saver.save(step, client))

    def settle(self, step: int) -> None:
        """Wait for what is being written and tell of it."""
        try:
            self._tell(self.saver.wait())
        except (CheckpointError, ResourceError) as error:
            self._failed(step, error)

    def poll(self) -> None:
        """Tell of a save that has been published meanwhile; does not wait."""
        self._tell(self.saver.finished())

    def _tell(self, saved: Saved | None) -> None:
        if saved is None:
            return
        self.failures = 0
        if self.events is not None:
            gib, rate = saved.size / 2**30, saved.size / max(saved.seconds, 1e-9) / 1e9
            self.events.add(
                "save",
                saved.step,
                f"{saved.path.name}: {gib:.3f} GiB written in {saved.seconds:.2f} s, {rate:.2f} GB/s; "
                f"training waited {saved.stall:.3f} s",
            )

    def _failed(self, step: int, error: CheckpointError | ResourceError) -> None:
        self.failures += 1
        if self.failures >= MAX_FAILURES:
            raise error
        if self.events is not None:
            self.events.add(
                "alarm", step, f"a checkpoint was not saved and is tried again when the next is due: {error}"
            )
