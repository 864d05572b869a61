"""Python's cycle collector at times of our choosing, the same on all ranks.

Left alone it runs when enough objects were made, on each rank at another moment, and looks through everything that was
ever imported: tens of milliseconds in which this rank enqueues nothing and all others wait for it. Here what exists at
the start is set aside for good, and young objects are looked through every few steps, all objects in pauses. Tensors do
not wait for it: no cycle of a step holds one (a test counts).
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

EVERY = 10  # steps


class Collector:
    """Handed out by `steady`; `step` after every step, `pause` where the device has nothing to do anyway."""

    def step(self, number: int) -> None:
        """Collect the young after every `EVERY`th step."""
        if number % EVERY == 0:
            gc.collect(1)

    def pause(self) -> None:
        """Collect all that was made since the start."""
        gc.collect()


@contextmanager
def steady() -> Iterator[Collector]:
    """Nothing is collected but by the `Collector`; afterwards all is as it was."""
    was = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield Collector()
    finally:
        gc.unfreeze()
        if was:
            gc.enable()
