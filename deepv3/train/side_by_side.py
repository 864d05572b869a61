"""Training runs as processes beside one another: started at once, their pace measured, stopped together.

Runs are dealt to the devices in turn; several on one device share its time. Each writes its own run folder and a log
beside it. A run that ends on its own is left alone: how it ended is part of the result.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from deepv3.config.cli import say
from deepv3.errors import EXIT_DONE, ResourceError

PRETRAIN = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"
POLL = 0.25  # seconds
TELL = 30.0  # seconds between lines that say how far the runs are
GRACE = 20.0  # seconds that a stopped run has to end by itself
STOPPED = "stopped at the limit"


@dataclass
class Trial:
    """One run: its name, its arguments beyond those of all, and where it stands."""

    name: str
    arguments: list[str]
    device: str | None = None
    process: subprocess.Popen | None = None
    stopped: bool = False  # by us

    @property
    def running(self) -> bool:
        """Whether its process is alive."""
        return self.process is not None and self.process.poll() is None


def visible_devices() -> list[str]:
    """The CUDA devices of this process as CUDA_VISIBLE_DEVICES names them; empty without CUDA."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] or [str(i) for i in range(count)]


class Group:
    """Trials that run at once, as a context: started on entry, all ended on exit."""

    def __init__(
        self,
        folder: Path,
        trials: Iterable[Trial],
        common: list[str],
        devices: list[str],
        environment: dict[str, str],
        script: Path = PRETRAIN,
    ):
        """folder: of the run folders. common: arguments of all. environment: variables beside this process's own."""
        self.folder, self.trials, self.common = folder, list(trials), common
        self.environment, self.script = environment, script
        for i, trial in enumerate(self.trials):
            trial.device = devices[i % len(devices)] if devices else None

    def __enter__(self) -> "Group":
        self.folder.mkdir(parents=True, exist_ok=True)
        threads = max(1, (os.cpu_count() or 1) // max(1, len(self.trials)))
        own = {"OMP_NUM_THREADS": str(threads)} if "OMP_NUM_THREADS" not in os.environ else {}
        for trial in self.trials:
            where = {"CUDA_VISIBLE_DEVICES": trial.device} if trial.device is not None else {}
            quoted = str(self.folder / trial.name).replace("'", "\\'")
            command = [sys.executable, str(self.script), *self.common, *trial.arguments, f"run_dir='{quoted}'"]
            with open(self.folder / f"{trial.name}.log", "w", encoding="utf-8") as log:
                trial.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | own | self.environment | where,
                )
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def running(self) -> list[Trial]:
        """The trials whose processes are alive."""
        return [trial for trial in self.trials if trial.running]

    def steps(self, trial: Trial) -> int:
        """Finished steps that the trial has written down."""
        try:
            return (self.folder / trial.name / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def wait(self, until: float, enough: Callable[[], bool] = lambda: False) -> bool:
        """Wait until no trial runs or `enough`; False where `until` (of time.monotonic) came first."""
        told = time.monotonic()
        while self.running() and not enough():
            if time.monotonic() >= until:
                return False
            if time.monotonic() - told >= TELL:
                told = time.monotonic()
                say("steps", ", ".join(f"{trial.name} {self.steps(trial)}" for trial in self.trials))
            time.sleep(POLL)
        return True

    def stop(self) -> None:
        """End what still runs: a request, then by force."""
        alive = self.running()
        for trial in alive:
            trial.stopped = True
            trial.process.terminate()  # type: ignore[union-attr]
        until = time.monotonic() + GRACE
        for trial in alive:
            assert trial.process is not None
            try:
                trial.process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                trial.process.kill()
                trial.process.wait()

    def end(self, trial: Trial) -> str:
        """How a trial ended, in words; "done" where it came to its end."""
        assert trial.process is not None
        code = trial.process.returncode
        if code == EXIT_DONE:
            return "done"
        try:
            left = json.loads((self.folder / trial.name / "exit.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            left = {}
        if trial.stopped:
            return STOPPED
        return f"ended with code {code}: {left['reason']}" if left else f"ended with code {code}: {self.tail(trial)}"

    def tail(self, trial: Trial) -> str:
        """The last line of the trial's log."""
        lines = (self.folder / f"{trial.name}.log").read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no word")[:300]


@dataclass
class Pace:
    """What a calibration found. startup: seconds from the start to the slowest run's first steps; step: its seconds a
    step while all others run."""

    startup: float
    step: float


def calibrate(group: Group, until: float, first: int = 5, steps: int = 30) -> Pace:
    """Measure a started group whose runs do not end on their own, while all of them train; ends them.

    first: steps left out of the measure. The slowest counts: whether it gets faster once others have finished depends
    on what it waits for. Raises ResourceError where they all end, or do not get so far until `until`.
    """
    began = time.monotonic()

    def reached(counts: dict[str, int]) -> bool:
        return all(group.steps(trial) >= counts[trial.name] for trial in group.running())

    in_time = group.wait(until, lambda: reached({trial.name: first for trial in group.trials}))
    start, base = time.monotonic(), {trial.name: group.steps(trial) for trial in group.trials}
    in_time = in_time and group.wait(until, lambda: reached({name: count + steps for name, count in base.items()}))
    seconds, alive = time.monotonic() - start, group.running()
    made = {trial.name: group.steps(trial) - base[trial.name] for trial in alive}
    group.stop()
    if not alive:
        first_end = f"{group.trials[0].name} {group.end(group.trials[0])}"
        raise ResourceError(f"all runs ended while their pace was measured: {first_end}")
    if not in_time:
        raise ResourceError(
            f"{first + steps} steps of all runs took longer than the time for measuring their pace: {made} more steps "
            "when it was over; raise limit, or take runs=[...] with fewer of them"
        )
    return Pace(start - began, max(seconds / made[trial.name] for trial in alive))
