"""From a step to a whole run: batch ramp, context extension, GPU hours, money, failures and checkpoints.

The ramp passes through batch sizes of equal token shares (deepv3/optim/ramps.py); steps are simulated at a few of them
and interpolated between, since a step's time is nearly a straight line in its number of micro-batches. Failures: with a
mean time between failures of one device, N devices fail N times as often; a failure costs a restart and, on average,
half the work since the last checkpoint, so the best interval is Young's sqrt(2 x checkpoint time x time between
failures).
"""

import math
from bisect import bisect_left
from dataclasses import dataclass

from deepv3.config.schema import TrainConfig
from deepv3.planner.hardware import GB
from deepv3.planner.layout import Layout
from deepv3.planner.simulate import Simulator

HOUR = 3600.0
MTBF_HOURS = 50_700.0
"""Of one device: Llama 3 (arXiv 2407.21783, 3.3.4) counts 419 unexpected interruptions in 54 days of 16,384 H100."""
RESTART_SECONDS = 600.0
"""Detection, restart and loading; an assumption."""
STORAGE_PER_NODE = 40 * GB
"""Bytes/s a node writes: its own 400 Gb/s storage card (HW 5.1) at the fraction network cards reach."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training. notes: what falls short of it, for the reader."""

    name: str
    tokens: float
    steps: float
    seconds: float
    gpus: int
    notes: tuple[str, ...] = ()

    @property
    def gpu_hours(self) -> float:
        """Devices times hours."""
        return self.gpus * self.seconds / HOUR


def curve(simulator: Simulator, smallest: int, largest: int) -> list[tuple[int, float]]:
    """(micro-batches, seconds of a step) at a few sizes from `smallest` to `largest`, ends included."""
    layout = simulator.layout
    unit, full = layout.dp * layout.micro, 2 * layout.pp
    inner = ((smallest + full) // 2, full, 3 * layout.pp)
    counts = {smallest, largest, *(count for count in inner if smallest < count < largest)}
    return [(count, simulator.step(count * unit).seconds) for count in sorted(counts)]


def interpolate(points: list[tuple[int, float]], at: float) -> float:
    """The broken line through the points, at a size between the first and the last."""
    index = bisect_left([count for count, _ in points], at)
    if index == 0 or points[index][0] == at:
        return points[index][1]
    (a, x), (b, y) = points[index - 1], points[index]
    return x + (y - x) * (at - a) / (b - a)


def pre_training(simulator: Simulator, train: TrainConfig, name: str, notes: tuple[str, ...] = ()) -> Phase:
    """A run's own length, ramp included."""
    layout = simulator.layout
    unit, ramp = layout.dp * layout.micro, train.batch_ramp if train.global_batch_size is None else None
    per_step = layout.batch * layout.seq_len
    end = train.tokens if train.tokens is not None else math.inf
    left = train.steps if train.steps is not None else math.inf
    tokens = steps = seconds = 0.0
    if ramp is not None and ramp.end > ramp.start:
        rises = math.ceil((ramp.end - ramp.start) / ramp.increment)
        points = curve(simulator, ramp.start // unit, ramp.end // unit)
        for size in range(ramp.start, ramp.end, ramp.increment):
            here = min(
                ramp.tokens / rises / (size * layout.seq_len), left - steps, (end - tokens) / (size * layout.seq_len)
            )
            tokens, steps = tokens + here * size * layout.seq_len, steps + here
            seconds += here * interpolate(points, size / unit)
    rest = max(0.0, min(left - steps, (end - tokens) / per_step))
    seconds += rest * simulator.step().seconds
    return Phase(name, tokens + rest * per_step, steps + rest, seconds, layout.cluster.count, notes)


@dataclass(frozen=True)
class Failures:
    """What faults cost over a run. lost_share: of all time, to checkpoints, lost work and restarts."""

    between_hours: float
    expected: float
    checkpoint_bytes: float
    checkpoint_seconds: float
    interval_seconds: float
    lost_share: float


def failures(layout: Layout, stored_parameters: int, seconds: float, mtbf_hours: float) -> Failures:
    """Expected faults. stored_parameters: of the checkpoint, with FP32 master and both moments for each.

    checkpoint_seconds: of a write that training waits for; one written beside training costs less.
    """
    between = mtbf_hours * HOUR / layout.cluster.count
    size = stored_parameters * (4.0 + 2.0 * layout.moment_bytes)
    write = size / (STORAGE_PER_NODE * layout.cluster.nodes)
    interval = math.sqrt(2.0 * write * between)
    lost = write / interval + (interval / 2 + RESTART_SECONDS) / between
    return Failures(between / HOUR, seconds / between, size, write, interval, lost)
