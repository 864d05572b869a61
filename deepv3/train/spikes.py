"""Spikes of loss or gradient norm: a value far above what the last steps say.

Far is counted in robust standard deviations: (x - median) / (1.4826 x median absolute deviation) over a window of
finished steps, with x = loss, or the logarithm of the norm, which is skewed. The deviation has a floor, because a
window may be flatter than what comes next is bound to be. Values that are spikes themselves, or not finite (the step
was skipped on the device), do not enter the window. The verdict depends on global figures only, so all ranks agree.
"""

import math
import statistics
from collections import deque
from typing import Any

from deepv3.config.schema import TrainConfig

MIN_HISTORY = 16  # steps before anything counts as a spike
FLOOR = {"loss": 0.01, "grad_norm": 0.1}  # least deviation: 1 % of a typical loss of order 1-10, 10 % of a norm


class SpikeGuard:
    """The last steps' losses and norms, and whether a new one is a spike."""

    def __init__(self, train: TrainConfig):
        self.threshold = train.spike_threshold
        self._windows = {name: deque[float](maxlen=train.spike_window) for name in FLOOR}

    def look(self, loss: float, grad_norm: float) -> str | None:
        """Take one step's figures in; a spike in words, or None."""
        values = {"loss": loss, "grad_norm": math.log(grad_norm) if grad_norm > 0 else -math.inf}
        found = [words for name, value in values.items() if (words := self._one(name, value))]
        return " and ".join(found) or None

    def _one(self, name: str, value: float) -> str | None:
        window = self._windows[name]
        if not math.isfinite(value):
            return None
        if len(window) >= min(MIN_HISTORY, window.maxlen or 0):
            median = statistics.median(window)
            deviation = max(1.4826 * statistics.median(abs(x - median) for x in window), FLOOR[name])
            if value - median > self.threshold * deviation:
                now, usual = (math.exp(value), math.exp(median)) if name == "grad_norm" else (value, median)
                return f"{name} {now:.4g} against {usual:.4g}, {(value - median) / deviation:.1f} deviations"
        window.append(value)
        return None

    def state_dict(self) -> dict[str, Any]:
        """The windows, JSON."""
        return {name: list(window) for name, window in self._windows.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse; the window may have another length since."""
        for name, window in self._windows.items():
            window.clear()
            window.extend(state.get(name, []))
