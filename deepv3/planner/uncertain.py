"""How far a plan may be off: every constant of the calibration moved to the ends of its range, one at a time.

The relative changes of the busiest rank's time add in squares, slower and faster apart: the constants are independent
measurements. What the model leaves out altogether (a slow switch, a bad node) is in no range.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from deepv3.planner.calibration import Calibration
from deepv3.planner.layout import Layout
from deepv3.planner.simulate import Simulator


@dataclass(frozen=True)
class Spread:
    """Factors on a step's time: faster <= 1 <= slower. by: relative change of the time per constant."""

    faster: float
    slower: float
    by: dict[str, float]

    def seconds(self, value: float) -> list[float]:
        """[least, most] of a time."""
        return [value * self.faster, value * self.slower]

    def rate(self, value: float) -> list[float]:
        """[least, most] of something per time."""
        return [value / self.slower, value / self.faster]


def _moved(cal: Calibration) -> Iterator[tuple[str, Calibration]]:
    for name, constant in cal.constants().items():
        for end in {constant.low, constant.high} - {constant.value}:
            yield name, cal.changed({name: constant._replace(value=end)})


def spread(layout: Layout, cal: Calibration) -> Spread:
    """The spread of a layout's step time."""
    base = Simulator(layout, cal).bound()
    slower = faster = 0.0
    by: dict[str, float] = {}
    for name, moved in _moved(cal):
        change = Simulator(layout, moved).bound() / base - 1.0
        by[name] = max(by.get(name, 0.0), change, key=abs)
        slower, faster = slower + max(change, 0.0) ** 2, faster + min(change, 0.0) ** 2
    return Spread(1.0 / (1.0 + math.sqrt(faster)), 1.0 + math.sqrt(slower), by)
