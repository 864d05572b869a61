"""Rows between ranks that can write each other's memory, with flags in place of counts on the host: plain torch.

An area is one rank's memory for one exchange, [P, C, W] int32 words: source s of P writes rows of W words into slot s,
at most C of them, so nobody needs to know what others send to know where to write. Rows of any format are words here.
`peers` and `flags` are by rank; the caller's own is among them. A full exchange, on every rank:

    push(rows, peers, counts, me, items)      every peer's rows into its slot `me`
    signal(counts, flags, me, number)         they are there, and so many
    came = wait(own flags, number, ...)       the slots of all sources are full
    take(own area, came)                      out of the area, or read in place

The CPU path runs over shared memory and relies on a processor that keeps the order of stores, as x86 does.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

COUNT_BITS = 32  # of a flag; the number of the exchange stands above
PAUSE = 2e-5  # seconds between two looks at the flags


def push(rows: Tensor, peers: Sequence[Tensor], counts: Tensor, me: int, items: Tensor | None = None) -> None:
    """Write the counts[p] rows for each peer p into peers[p][me, :counts[p]].

    rows: [N, W] int32; peers: P areas [P, C, W]; counts: [P] int32. items: [.] int32, row numbers sorted by peer, of
    which the first sum(counts) count; without it the rows for p are rows[p * C :], as they lie in an area.
    Example: counts [2, 1], items [0, 3, 1]: rows 0 and 3 go to rank 0, row 1 to rank 1.
    """
    start = 0
    for peer, count in enumerate(counts.tolist()):
        first = peer * peers[peer].shape[1]
        chosen = rows[first : first + count] if items is None else rows[items[start : start + count]]
        peers[peer][me, :count] = chosen
        start += count


def signal(counts: Tensor, flags: Sequence[Tensor], me: int, number: int) -> None:
    """Tell every peer p, after all that was pushed before, that exchange `number` (below 2^31) has counts[p] rows.

    flags: P tensors [P] int64, entry s of which is written by source s: number * 2^32 + count.
    """
    for peer, count in enumerate(counts.tolist()):
        flags[peer][me] = number << COUNT_BITS | count


def wait(flags: Tensor, number: int, area: Tensor, failed: Tensor, patience: float) -> Tensor:
    """Wait for exchange `number` of every source. flags: [P] int64; area: [P, C, W]. Returns counts [P] int32.

    A source that is not heard of within `patience` seconds has count 0, failed[s] (int32) becomes 1, and the first row
    of its slot all ones, which is NaN in every floating-point format: who reads it all the same shall notice.
    """
    end = time.monotonic() + patience
    while not bool((came := flags >> COUNT_BITS == number).all()) and time.monotonic() < end:
        time.sleep(PAUSE)
    failed.masked_fill_(~came, 1)
    area[:, :1].masked_fill_(~came[:, None, None], -1)
    return torch.where(came, flags & (1 << COUNT_BITS) - 1, 0).int()


def take(area: Tensor, counts: Tensor) -> Tensor:
    """The rows of an area [P, C, W] in memory of their own, [P * C, W]; rows from counts[s] on hold anything."""
    out = torch.zeros_like(area)
    for source, count in enumerate(counts.tolist()):
        out[source, :count] = area[source, :count]
    return out.flatten(0, 1)


def places(ranks: Tensor, slots: Tensor, counts: Tensor, capacity: int) -> Tensor:
    """Where copies lie in an area of `capacity` rows a slot, which `slots` numbers as if slots had no gaps.

    ranks, slots: [T, K] int32, of each copy, rank -1 for none; counts: [P] int32. Returns [T, K] int32, -1 for none.
    Example: capacity 4, counts [2, 1]: copies (rank 0, slot 0), (0, 1), (1, 2) lie at 0, 1 and 4.
    """
    moved = torch.arange(counts.shape[0], device=counts.device) * capacity - (counts.cumsum(0) - counts)
    return torch.where(ranks < 0, -1, slots + moved[ranks.clamp(min=0).long()]).int()


def unpack(
    record: Tensor, counts: Tensor, at: int, gate: torch.dtype, top_k: int, first: int, share: int
) -> tuple[Tensor, Tensor]:
    """Gates and choices out of records [P, C, V] int32: from word `at` on K gates, FP32 or FP64, then K global experts.

    counts: [P], rows that came. Returns gates [P * C, K], and choices among the `share` experts from `first` on,
    numbered from 0, [P * C, K] int32. In rows that did not come gates are 0 and choices -1, which also stands for
    experts elsewhere.
    """
    there = (torch.arange(record.shape[1], device=record.device) < counts[:, None]).view(-1, 1)
    rows, words = record.flatten(0, 1), top_k * gate.itemsize // 4
    gates = rows[:, at : at + words].masked_fill(~there, 0).view(gate)
    experts = rows[:, at + words : at + words + top_k] - first
    here = there & (experts >= 0) & (experts < share)
    return gates, experts.masked_fill(~here, -1)
