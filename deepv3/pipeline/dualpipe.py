"""The DualPipe family: one table of eight phases serves the bidirectional schedule and its V-shaped half.

Every rank runs two chunks, 0 and 1. H is the number of ranks of one half, h = 0 .. H-1 the rank's distance from the
outer end, n the micro-batches each chunk sees (V3 3.2.1, Figure 5):

    DualPipe   H = PP/2,  h = min(r, PP-1-r),  n = m/2; chunk 0 is the direction whose first stage is nearer
    DualPipeV  H = PP,    h = r,               n = m;   chunk 0 is stage r, chunk 1 stage 2 PP - 1 - r

``phases`` is that table; ``chunk_slots`` numbers it. A slot is a place in the table for one micro-batch of one chunk.

Fewer micro-batches. The table needs n >= 2H. Below that the table of 2H is taken and its first 2H - n slots of each
chunk stay empty: F, B, I and W of such a slot vanish on every rank, and a pair that loses a half runs the other half
alone. Chunks of one micro-batch depend on chunks of the same micro-batch only, so what remains is ordered as rightly as
before and needs no more memory. Leaving the *first* slots empty keeps the split backwards of the cool-down, where they
shorten the bubble most. An odd m under DualPipe is the same thing: one empty slot in direction 1. Given up: between
H < n < 2H an order found by search would idle less (82 against 68 units at H = 8, n = 9).
"""

from collections import deque
from typing import Literal, NamedTuple, TypeAlias

from deepv3.pipeline.actions import BACKWARD, FORWARD, INPUT_GRAD, WEIGHT_GRAD


class Slot(NamedTuple):
    """One place of the table. W has chunk -1: it takes the oldest deferred weight gradient, whichever chunk's."""

    kind: Literal["F", "B", "I", "W"]
    chunk: int


Unit: TypeAlias = tuple[Slot | tuple[Slot, Slot], ...]


class Phase(NamedTuple):
    """``repeats`` times the steps of ``unit``; ``name`` in the notation of the published schedule."""

    name: str
    repeats: int
    unit: Unit


F0, F1 = Slot(FORWARD, 0), Slot(FORWARD, 1)
B0, B1 = Slot(BACKWARD, 0), Slot(BACKWARD, 1)
I0, I1 = Slot(INPUT_GRAD, 0), Slot(INPUT_GRAD, 1)
W = Slot(WEIGHT_GRAD, -1)


def phases(half: int, distance: int, count: int) -> tuple[Phase, ...]:
    """The phases of one rank: H = half, h = distance, n = count >= 2H. Phase 4 takes two rows, phase 6 three.

    The innermost rank (h = H-1) runs its first pair as F0 then B1: there the gradient of B1 is what the other ranks
    wait for, and a pair would deliver it later. The last h+1 of the 2(h+1) backwards of phase 6 defer their W.
    """
    outer = half - distance - 1
    inner = outer == 0
    return (
        Phase("1 F0", 2 * outer, (F0,)),
        Phase("2 F0F1", distance + 1, (F0, F1)),
        Phase("3 I1WF1", outer, (I1, W, F1)),
        Phase("4 F0B1F1B0, first", int(inner), (F0, B1, (F1, B0))),
        Phase("4 F0&B1 F1&B0", count - 2 * half + distance + 1 - int(inner), ((F0, B1), (F1, B0))),
        Phase("5 B1 F1&B0", outer, (B1, (F1, B0))),
        Phase("6 B1B0", (distance + 1) // 2, (B1, B0)),
        Phase("6 B1I0", (distance + 1) % 2, (B1, I0)),
        Phase("6 I1I0", (distance + 1) // 2, (I1, I0)),
        Phase("7 WI0", outer, (W, I0)),
        Phase("8 W", distance + 1, (W,)),
    )


Numbered: TypeAlias = tuple[Literal["F", "B", "I", "W"], int, int]


def chunk_slots(half: int, distance: int, counts: tuple[int, int]) -> list[tuple[Numbered, ...]]:
    """The steps of one rank as (kind, chunk, index of the micro-batch within its chunk); a pair has two of them.

    counts: micro-batches of chunk 0 and of chunk 1, each >= 0; unequal or below 2H leaves slots empty.
    """
    table = max(2 * half, *counts)
    empty = (table - counts[0], table - counts[1])
    passed = {FORWARD: [0, 0], BACKWARD: [0, 0]}
    deferred: deque[tuple[int, int]] = deque()
    steps: list[tuple[Numbered, ...]] = []

    def number(slot: Slot) -> Numbered:
        if slot.kind == WEIGHT_GRAD:
            chunk, index = deferred.popleft()
            return (slot.kind, chunk, index)
        seen = passed[FORWARD if slot.kind == FORWARD else BACKWARD]
        index = seen[slot.chunk] - empty[slot.chunk]
        seen[slot.chunk] += 1
        if slot.kind == INPUT_GRAD:
            deferred.append((slot.chunk, index))
        return (slot.kind, slot.chunk, index)

    for phase in phases(half, distance, table):
        for step in phase.unit * phase.repeats:
            slots = (step,) if isinstance(step, Slot) else step
            kept = tuple(numbered for numbered in map(number, slots) if numbered[2] >= 0)
            if kept:
                steps.append(kept)
    assert not deferred, "as many W as I"
    return steps
