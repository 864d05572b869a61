"""What ranks tell one another so that all of them do the same: signals, failed saves, how long they took.

A signal handler only sets a flag; a failed save only leaves its future. Both travel, with every rank's seconds, in the
one all-reduce that a step makes anyway (`Votes`), so all ranks learn of them at the same step, without another
collective and without a wait of the host.
"""

import os
import signal
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from deepv3.dist import Grid
from deepv3.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """SIGTERM, SIGINT and SIGUSR1 as a wish.

    While a run is being built (`ready` not called) there is nothing to save, and the signal raises Stopped at once.
    Afterwards it is noted, and a second SIGINT interrupts. Children that a library forks keep the default action.
    wake: a descriptor that becomes readable when a signal arrives, even while Python is stuck in a call.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._ready = False
        self._pid = os.getpid()
        self.wake, write = os.pipe()
        for end in (self.wake, write):
            os.set_blocking(end, False)
        for number in SIGNALS:
            signal.signal(number, self._set)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def ready(self) -> None:
        """From now on signals wait for the end of a step."""
        self._ready = True

    def _set(self, number: int, frame: object) -> None:
        if os.getpid() != self._pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self.wanted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.wanted = True
        if not self._ready:
            raise Stopped(f"stopped by {signal.Signals(number).name} before the first step; nothing was to be saved")


@dataclass
class Votes:
    """All ranks' news of one step. stop, save_failed: whether any rank says so; seconds: of each, in rank order."""

    stop: bool
    save_failed: bool
    seconds: list[float]

    @staticmethod
    def pack(grid: Grid, stop: bool, save_failed: bool, seconds: float) -> Tensor:
        """One rank's news as a vector [2 + ranks], FP64 on the host; summed over ranks it is everyone's."""
        vector = torch.zeros(2 + grid.world_size, dtype=torch.float64)
        vector[0], vector[1], vector[2 + grid.rank] = stop, save_failed, seconds
        return vector

    @staticmethod
    def unpack(total: Tensor) -> "Votes":
        """From the sum over ranks."""
        stop, failed, *seconds = total.tolist()
        return Votes(stop > 0, failed > 0, seconds)


def is_lost_connection(error: BaseException) -> bool:
    """Whether an exception says that a collective failed for a peer's sake: gloo raises plain RuntimeErrors."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Socket")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
