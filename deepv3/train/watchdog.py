"""A thread beside training that notices dead and hung ranks, names them and ends the process, which may be restarted.

Once a second each rank puts a beat (Pulse: a number, its step, where its main thread is) into the job's rendezvous
store, and looks at its right-hand neighbour's and at a common verdict. Cost: three small requests a rank and second,
whatever the number of ranks; the device is never asked. What leads to a verdict:

    a neighbour's process is gone, or on another node has no beat for DEAD_AFTER    it died
    a signal arrived, and any rank is gone, or has no beat for LEAVE_AFTER          it died: no save together may start
    this rank's step does not end for `hang_seconds`                                who is behind, by step and by place

The verdict goes into the store; every rank dumps its stacks to run_dir/stacks/, writes exit.json and leaves with 75,
from this thread, because the main thread may never come back. A main thread whose collective fails asks `blame`.

Given up: a rank of another node that keeps the interpreter's lock for DEAD_AFTER seconds is taken for dead.
"""

import datetime
import faulthandler
import os
import select
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from deepv3.config.cli import record_exit, say
from deepv3.dist import Grid
from deepv3.errors import EXIT_RESTART, PeerLost
from deepv3.train.events import EventLog
from deepv3.train.faults import StopSignal
from deepv3.train.pulse import Pulse, here, who_died, who_hangs

BEAT = 1.0  # seconds
DEAD_AFTER = 60.0  # longer than any library holds the interpreter's lock
LEAVE_AFTER = 4.0  # of a stopped beat, once a signal says that something is wrong: 5 s with the beat before it
STORE_PATIENCE = 10.0  # seconds that the store may not answer


class Watchdog:
    """One rank's beat and its eyes; made by all ranks together. The main thread calls the methods."""

    def __init__(self, grid: Grid, run_dir: Path, hang_seconds: float, stop: StopSignal):
        self.grid, self.run_dir, self.hang_seconds, self.stop = grid, Path(run_dir), hang_seconds, stop
        self._main = threading.main_thread().ident
        self._pulse = Pulse(0, 0, "", False, "", socket.gethostname(), os.getpid())
        self._armed = False
        self._progress = time.monotonic()
        self._done = threading.Event()
        self._store = _client() if grid.world_size > 1 else None
        self._prefix = f"deepv3/{grid.gather(time.time_ns())[0]:x}"  # the launcher's store outlives an attempt
        self._answered = time.monotonic()
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> (number, when it was first seen)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def step(self, number: int) -> None:
        """A step begins, or something else that is progress happened in it; from the first call on, hangs count."""
        self._pulse = self._pulse._replace(step=number)
        self._progress = time.monotonic()
        self._armed = True

    def close(self, reason: str = "done") -> None:
        """This rank leaves for `reason`; its peers hear that it did not just die."""
        self._armed = False
        self._done.set()
        self._thread.join(timeout=STORE_PATIENCE)
        self._pulse = self._pulse._replace(left=reason)
        with suppress(dist.DistError, RuntimeError):
            self._beat()

    def blame(self) -> str:
        """Why a collective failed, by the others' beats, in words. Takes as long as a dead one needs to show it."""
        deadline = time.monotonic() + LEAVE_AFTER + BEAT
        try:
            while (words := self._verdict() or self._dead(LEAVE_AFTER - BEAT)) is None:
                if time.monotonic() > deadline:
                    return "a collective failed, but every rank is alive; the network between them may be broken"
                time.sleep(BEAT / 4)
        except (dist.DistError, RuntimeError):
            return "rank 0 or the launcher died: the rendezvous store is gone"
        return words

    # -- the thread --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._done.is_set():
            readable, *_ = select.select([self.stop.wake], [], [], BEAT)
            verdict = None
            try:
                self._beat()
                verdict = self._look(bool(readable))
                self._answered = time.monotonic()
            except (dist.DistError, RuntimeError):
                if time.monotonic() - self._answered > STORE_PATIENCE and not self._done.is_set():
                    verdict = "rank 0 or the launcher died: the rendezvous store is gone"
            if verdict is not None and not self._done.is_set():
                self._leave(verdict)
            if readable:  # stays readable, so that a signal is remembered here too
                self._done.wait(BEAT / 4)

    def _beat(self) -> None:
        with self._lock:
            where, waits = here(self._main)
            self._pulse = self._pulse._replace(number=self._pulse.number + 1, where=where, waits=waits)
            if self._store is not None:
                self._store.set(f"{self._prefix}/{self.grid.rank}", self._pulse.to_json())

    def _look(self, signalled: bool) -> str | None:
        if (verdict := self._verdict()) is not None:
            return verdict
        if self._armed and self.hang_seconds and time.monotonic() - self._progress > self.hang_seconds:
            return self._who_hangs()
        if signalled:
            return self._dead(LEAVE_AFTER - BEAT)
        return self._dead(DEAD_AFTER, [(self.grid.rank + 1) % self.grid.world_size])

    def _verdict(self) -> str | None:
        """What another rank has found."""
        if self._store is None or not self._store.check([f"{self._prefix}/verdict"]):
            return None
        return self._store.get(f"{self._prefix}/verdict").decode()

    def _dead(self, silent: float, ranks: list[int] | None = None) -> str | None:
        """Who of the ranks (None: all) died. Asked twice: one that leaves says so just before it is gone."""
        for _ in range(2):
            words = who_died(self._survey(ranks), self.grid.rank, silent, only_silent=ranks is not None)
            if words is None:
                return None
        return words

    def _survey(self, ranks: list[int] | None = None) -> dict[int, tuple[Pulse, float]]:
        """rank -> (its last pulse, seconds since it changed as far as this rank has looked), of those that beat yet."""
        if self._store is None:
            return {}
        asked = ranks if ranks is not None else range(self.grid.world_size)
        keys = {rank: f"{self._prefix}/{rank}" for rank in asked}
        present = keys if self._store.check(list(keys.values())) else self._present(keys)
        values = self._store.multi_get(list(present.values())) if present else []
        now, found = time.monotonic(), {}
        for rank, value in zip(present, values):
            pulse = Pulse.from_json(value.decode())
            if self._seen.get(rank, (-1, 0.0))[0] != pulse.number:
                self._seen[rank] = pulse.number, now
            found[rank] = pulse, now - self._seen[rank][1]
        return found

    def _present(self, keys: dict[int, str]) -> dict[int, str]:
        assert self._store is not None
        return {rank: key for rank, key in keys.items() if self._store.check([key])}

    def _who_hangs(self) -> str:
        """Look twice, so that a dead rank is not taken for a hung one."""
        self._survey()
        time.sleep(2.5 * BEAT)
        seen = self._survey() or {self.grid.rank: (self._pulse, 0.0)}
        if (dead := who_died(seen, self.grid.rank, 2 * BEAT)) is not None:
            return dead
        there = {rank: pulse for rank, (pulse, _) in seen.items() if not pulse.left}
        return f"{who_hangs(there)} for {self.hang_seconds:g} s (train.hang_seconds)"

    def _leave(self, verdict: str) -> None:
        """Say it, keep the stacks, end the process; rank 0 last, because it may carry the store. After a hang each rank
        stays until the others have looked: with the first to go their collectives fail, and their stacks with them."""
        with suppress(dist.DistError, RuntimeError):
            if self._store is not None:
                verdict = self._store.compare_set(f"{self._prefix}/verdict", "", verdict).decode() or verdict
        folder = self.run_dir / "stacks"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"rank-{self.grid.rank:05d}.txt", "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        if record_exit(self.run_dir, EXIT_RESTART, verdict):
            say(PeerLost.__name__, f"{verdict}; stacks of all ranks are in {folder}")
            EventLog(self.run_dir).add("alarm", self._pulse.step, verdict)
        self._pulse = self._pulse._replace(left=PeerLost.__name__)
        with suppress(dist.DistError, RuntimeError):
            self._beat()
        stays = 1.5 * BEAT if " hangs " in verdict else 0.0
        if self.grid.rank == 0 and self._store is not None:
            stays += 2.5 * BEAT
        time.sleep(stays)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_RESTART)


def _client() -> dist.TCPStore:
    """A connection of its own to the job's store: a library that waits in the other one must not stop the beat."""
    timeout = datetime.timedelta(seconds=STORE_PATIENCE)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
