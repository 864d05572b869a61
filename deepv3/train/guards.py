"""What is watched while a run trains, and the verdict on each step.

    signal, failed save    told to all ranks with the step's figures (faults.py); all stop, or try again, together
    NaN, infinity          the device skipped the step; counted, and too many in a row end the run
    spike                  off, warn, or rewind to the last copy of the state and go on with later data (spikes.py)
    slow rank              named once per window (straggler.py)
    dead or hung rank      a thread of its own (watchdog.py)

Everything lands in run_dir/events.jsonl. All verdicts follow from global figures, so ranks agree without asking.
"""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from deepv3.config.schema import Config
from deepv3.dist import Grid
from deepv3.errors import NumericsError
from deepv3.train.events import EventLog
from deepv3.train.faults import StopSignal, Votes
from deepv3.train.saves import Saves
from deepv3.train.spikes import SpikeGuard
from deepv3.train.straggler import Stragglers
from deepv3.train.watchdog import Watchdog

MAX_REWINDS = 3  # to one and the same step


class Verdict(NamedTuple):
    """What follows from a step. stop: some rank was asked to; rewind: why the state is to be wound back, or None."""

    stop: bool
    rewind: str | None


class Guards:
    """The guards of one run on this rank. Made by all ranks together, before anything slow."""

    def __init__(self, cfg: Config, grid: Grid):
        self.train, self.grid = cfg.train, grid
        run_dir = Path(cfg.run_dir)
        self.events = EventLog(run_dir) if grid.rank == 0 else None
        self.stop = StopSignal()
        self.watch = Watchdog(grid, run_dir, cfg.train.hang_seconds, self.stop)
        self.spikes = SpikeGuard(cfg.train)
        self.stragglers = Stragglers(cfg.logging.straggler_ratio)
        self.saves: Saves | None = None
        self.skipped_in_row = 0
        self._busy = 0.0
        self._rewinds: tuple[int, int] = (-1, 0)  # (step wound back to, how often)

    def begin(self, saves: Saves, step: int, client: dict[str, Any]) -> None:
        """The first step is next: signals wait for the end of a step, hangs count."""
        self.saves = saves
        saves.hold(step, client)
        self.stop.ready()
        self.watch.step(step + 1)

    def votes(self) -> Tensor:
        """This rank's news for the step that is about to start."""
        failed = False
        if self.saves is not None:
            failed = self.saves.saver.failed
            self.saves.poll()
        return Votes.pack(self.grid, self.stop.wanted, failed, self._busy)

    def judge(self, step: int, loss: float, norm: float, skipped: bool, votes: Votes, busy: float) -> Verdict:
        """The verdict on a finished step. loss, norm, skipped, votes: global; busy: this rank's own seconds.

        Raises NumericsError after train.max_skipped_steps skips in a row.
        """
        self._busy = busy
        if votes.save_failed and self.saves is not None:
            self.saves.settle(step)
        if (slow := self.stragglers.add(votes.seconds)) is not None:
            self.tell("alarm", step, slow)
        self._count_skip(step, norm, skipped)
        spike = None if self.train.spike == "off" or skipped else self.spikes.look(loss, norm)
        if spike is not None and self.train.spike == "warn":
            self.tell("alarm", step, f"spike: {spike}")
        return Verdict(votes.stop, spike if self.train.spike == "rewind" else None)

    def _count_skip(self, step: int, norm: float, skipped: bool) -> None:
        self.skipped_in_row = self.skipped_in_row + 1 if skipped else 0
        if skipped:
            self.tell("skip", step, f"gradient norm {norm}: nothing moved; {self.skipped_in_row} in a row")
        if self.skipped_in_row >= self.train.max_skipped_steps:
            raise NumericsError(
                f"gradient norm not finite for {self.skipped_in_row} steps in a row up to step {step} "
                f"(train.max_skipped_steps = {self.train.max_skipped_steps}); weights are those of step "
                f"{step - self.skipped_in_row}: lower optim.lr or look at the data"
            )

    def rewind(self, step: int, spike: str) -> dict[str, Any]:
        """Put the last copy of the state back; its `client`. Raises NumericsError where that did not help before."""
        assert self.saves is not None and self.saves.held_step is not None
        back = self.saves.held_step
        self._rewinds = (back, self._rewinds[1] + 1 if self._rewinds[0] == back else 1)
        if self._rewinds[1] > MAX_REWINDS:
            raise NumericsError(
                f"step {step}: {spike}, again after {MAX_REWINDS} rewinds to step {back}, each with later data: the "
                "state may be damaged; start from an earlier checkpoint (train.resume=PATH), lower optim.lr, or raise "
                f"train.spike_threshold = {self.train.spike_threshold:g}"
            )
        client = self.saves.saver.put_back()
        assert client is not None
        self.spikes.load_state_dict(client["spikes"])
        return client

    def tell(self, kind: str, step: int, text: str) -> None:
        """A row of events.jsonl, from rank 0."""
        if self.events is not None:
            self.events.add(kind, step, text)
