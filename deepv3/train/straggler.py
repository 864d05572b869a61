"""Which rank is slow: every rank's own time a step (forward, backward and waiting for data), over a window of steps.

A synchronous run is as slow as its slowest rank, and from outside all ranks look alike. Their own seconds reach rank 0
with each step's figures. Limit: in a pipeline, or with expert parallelism, a rank's forward and backward contain waits
for its peers, so a slow rank there slows its neighbours' figures too; compare ranks of one stage.
"""

import statistics


class Stragglers:
    """Adds up the seconds of all ranks and speaks once per window.

    ratio: of a rank's seconds to the median rank's, from which on it is named; 0 never names one.
    """

    def __init__(self, ratio: float, window: int = 50):
        self.ratio, self.window = ratio, window
        self._total: list[float] = []
        self._steps = 0

    def add(self, seconds: list[float]) -> str | None:
        """Take one step's seconds per rank; at the end of a window the slow ranks in words, None if there are none."""
        if len(self._total) != len(seconds):
            self._total, self._steps = [0.0] * len(seconds), 0
        self._total = [total + new for total, new in zip(self._total, seconds)]
        self._steps += 1
        if self._steps < self.window:
            return None
        means = [total / self._steps for total in self._total]
        self._total, steps, self._steps = [], self._steps, 0
        usual = statistics.median_low(means)
        slow = [rank for rank, mean in enumerate(means) if self.ratio and mean > self.ratio * usual]
        if not slow:
            return None
        worst = sorted(slow, key=lambda rank: -means[rank])[:5]
        named = ", ".join(f"rank {rank} ({means[rank]:.3f} s, {means[rank] / usual:.2f} x)" for rank in worst)
        more = f" and {len(slow) - len(worst)} more" if len(slow) > len(worst) else ""
        return f"slow: {named}{more}; the median rank computes {usual:.3f} s a step over the last {steps} steps"
