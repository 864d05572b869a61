"""Rows between GPUs that can write each other's memory: Triton kernels; the contract is in `reference.exchange`.

- push: a few programs per peer loop over tiles of the peer's rows, so that a copy over NVLink leaves most of the device
  to the computation beside it; peer addresses come from a table on the device. Ranks begin with different peers.
- signal: a kernel of its own behind the push. The end of a kernel orders its stores before what the stream runs next,
  and the flag is stored with release semantics at system scope; count and number share its 64 bits.
- wait: one program acquires all flags at system scope. It ends after `patience` at the latest, as nothing on the host
  times a kernel out. In the interpreter, which has no clock, patience counts looks.
- take: the same copy as push, within the device and with more programs.
- places, unpack: what would be a dozen small launches on integers and gates, in one each.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from deepv3.kernels.checks import INT32, block, cdiv, check, multiprocessors, next_power_of_2

TILE = 4096  # words that a program moves at a time
PUSHING = 64  # programs of a push: 16 KB under way each, more than NVLink's bandwidth times latency
PAIRS, RECORDS = 1024, 64  # of a program
INT64 = (torch.int64,)


@triton.jit(do_not_specialize=["me"])
def _copy_kernel(
    rows_ptr,
    targets_ptr,
    counts_ptr,
    items_ptr,
    me,
    capacity,
    words,
    n_peers,
    PUSH: tl.constexpr,
    ITEMS: tl.constexpr,
    PEERS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    peer = (tl.program_id(1) + me) % n_peers
    lanes = tl.arange(0, PEERS)
    counts = tl.load(counts_ptr + lanes, mask=lanes < n_peers, other=0)
    count = tl.sum(tl.where(lanes == peer, counts, 0), axis=0)
    before = tl.sum(tl.where(lanes < peer, counts, 0), axis=0)
    if PUSH:
        target = tl.multiple_of(tl.load(targets_ptr + peer).to(tl.pointer_type(tl.int32)), 16)
        slot = me
    else:
        target = targets_ptr
        slot = peer
    tiles = tl.cdiv(words, WORDS)
    for unit in range(tl.program_id(0), tl.cdiv(count, ROWS) * tiles, tl.num_programs(0)):
        rows = unit // tiles * ROWS + tl.arange(0, ROWS)
        cols = unit % tiles * WORDS + tl.arange(0, WORDS)
        if ITEMS:
            taken = tl.load(items_ptr + before + rows, mask=rows < count, other=0)
        else:
            taken = peer * capacity + rows
        mask = (rows < count)[:, None] & (cols < words)[None, :]
        values = tl.load(rows_ptr + taken.to(tl.int64)[:, None] * words + cols[None, :], mask=mask)
        placed = (slot * capacity + rows).to(tl.int64)
        tl.store(target + placed[:, None] * words + cols[None, :], values, mask=mask)


@triton.jit(do_not_specialize=["me", "number"])
def _signal_kernel(counts_ptr, flags_ptr, me, number, n_peers, PEERS: tl.constexpr):
    lanes = tl.arange(0, PEERS)
    mask = lanes < n_peers
    counts = tl.load(counts_ptr + lanes, mask=mask, other=0)
    flags = tl.load(flags_ptr + lanes, mask=mask, other=0).to(tl.pointer_type(tl.int64))
    message = counts.to(tl.int64) + (number.to(tl.int64) << 32)
    tl.atomic_xchg(flags + me, message, mask=mask, sem="release", scope="sys")


@triton.jit(do_not_specialize=["number", "patience"])
def _wait_kernel(
    flags_ptr,
    counts_ptr,
    failed_ptr,
    area_ptr,
    number,
    patience,
    slot_words,
    words,
    n_peers,
    PEERS: tl.constexpr,
    WORDS: tl.constexpr,
    CLOCK: tl.constexpr,
):
    lanes = tl.arange(0, PEERS)
    mask = lanes < n_peers
    nothing = tl.zeros((PEERS,), tl.int64)
    message = tl.atomic_add(flags_ptr + lanes, nothing, mask=mask, sem="acquire", scope="sys")
    late = tl.sum((mask & (message >> 32 != number)).to(tl.int32), axis=0)
    limit = patience.to(tl.int64)
    spent = limit * 0
    start = spent
    if CLOCK:
        start = cuda.globaltimer()
    while (late > 0) & (spent < limit):
        message = tl.atomic_add(flags_ptr + lanes, nothing, mask=mask, sem="acquire", scope="sys")
        late = tl.sum((mask & (message >> 32 != number)).to(tl.int32), axis=0)
        if CLOCK:
            spent = cuda.globaltimer() - start
        else:
            spent += 1
    came = message >> 32 == number
    tl.store(counts_ptr + lanes, tl.where(came, message & 0xFFFFFFFF, 0).to(tl.int32), mask=mask)
    tl.store(failed_ptr + lanes, tl.full((PEERS,), 1, tl.int32), mask=mask & (came == 0))
    for source in range(tl.where(late > 0, n_peers, 0)):
        lost = tl.sum((mask & (lanes == source) & (came == 0)).to(tl.int32), axis=0)
        for first in range(0, tl.where(lost > 0, words, 0), WORDS):
            cols = first + tl.arange(0, WORDS)
            place = area_ptr + slot_words.to(tl.int64) * source + cols
            tl.store(place, tl.full((WORDS,), -1, tl.int32), mask=cols < words)


@triton.jit
def _places_kernel(
    ranks_ptr, slots_ptr, counts_ptr, places_ptr, n, capacity, n_peers, PEERS: tl.constexpr, PAIRS: tl.constexpr
):
    lanes = tl.arange(0, PEERS)
    counts = tl.load(counts_ptr + lanes, mask=lanes < n_peers, other=0)
    moved = lanes * capacity - (tl.cumsum(counts, axis=0) - counts)
    pairs = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    rank = tl.load(ranks_ptr + pairs, mask=pairs < n, other=-1)
    slot = tl.load(slots_ptr + pairs, mask=pairs < n, other=0)
    place = tl.where(rank < 0, -1, slot + tl.gather(moved, tl.maximum(rank, 0), 0))
    tl.store(places_ptr + pairs, place, mask=pairs < n)


@triton.jit
def _unpack_kernel(
    record_ptr,
    counts_ptr,
    gates_ptr,
    here_ptr,
    capacity,
    width,
    at,
    top_k,
    first,
    share,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    source = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, TOP_K)
    mask = (rows < capacity)[:, None] & (k < top_k)[None, :]
    came = mask & (rows < tl.load(counts_ptr + source))[:, None]
    place = (source * capacity + rows).to(tl.int64)[:, None]
    gates = tl.load(record_ptr + place * width + at + k[None, :], mask=came, other=0)
    experts = tl.load(record_ptr + place * width + at + top_k + k[None, :], mask=came, other=-1) - first
    here = came & (experts >= 0) & (experts < share)
    tl.store(gates_ptr + place * top_k + k[None, :], gates, mask=mask)
    tl.store(here_ptr + place * top_k + k[None, :], tl.where(here, experts, -1), mask=mask)


@functools.lru_cache(maxsize=1024)
def _addresses(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """A table on the device; made once, since the copy makes the host wait."""
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def _table(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    return _addresses(tuple(tensor.data_ptr() for tensor in tensors), device)


def _copy(rows: Tensor, targets: Tensor, counts: Tensor, me: int, items: Tensor | None, capacity: int, push: bool):
    peers, words = counts.shape[0], rows.shape[1]
    cols = block(words, 1024)
    per_tile = max(1, TILE // cols)
    tiles = cdiv(capacity, per_tile) * cdiv(words, cols)
    programs = PUSHING if push else 8 * multiprocessors(rows.device)
    if not tiles:
        return
    _copy_kernel[(min(tiles, cdiv(programs, peers)), peers)](
        rows,
        targets,
        counts,
        counts if items is None else items,  # not read without ITEMS
        me,
        capacity,
        words,
        peers,
        PUSH=push,
        ITEMS=items is not None,
        PEERS=max(2, next_power_of_2(peers)),
        ROWS=per_tile,
        WORDS=cols,
    )


def push(rows: Tensor, peers: Sequence[Tensor], counts: Tensor, me: int, items: Tensor | None = None) -> None:
    """See `reference.exchange.push`."""
    check("rows", rows, (None, None), INT32, rows.device)
    check("counts", counts, (len(peers),), INT32, rows.device)
    for area in peers:
        check("an area", area, (len(peers), None, rows.shape[1]), INT32, rows.device)
    if items is not None:
        check("items", items, (None,), INT32, rows.device)
    _copy(rows, _table(peers, rows.device), counts, me, items, peers[0].shape[1], push=True)


def signal(counts: Tensor, flags: Sequence[Tensor], me: int, number: int) -> None:
    """See `reference.exchange.signal`."""
    check("counts", counts, (len(flags),), INT32, counts.device)
    for flag in flags:
        check("flags", flag, (len(flags),), INT64, counts.device)
    peers = len(flags)
    table = _table(flags, counts.device)
    _signal_kernel[(1,)](counts, table, me, number, peers, PEERS=max(2, next_power_of_2(peers)), num_warps=1)


def wait(flags: Tensor, number: int, area: Tensor, failed: Tensor, patience: float) -> Tensor:
    """See `reference.exchange.wait`."""
    peers = flags.shape[0]
    check("flags", flags, (peers,), INT64, flags.device)
    check("area", area, (peers, None, None), INT32, flags.device)
    check("failed", failed, (peers,), INT32, flags.device)
    clock = flags.is_cuda or flags.is_meta
    counts = torch.empty(peers, dtype=torch.int32, device=flags.device)
    _wait_kernel[(1,)](
        flags,
        counts,
        failed,
        area,
        number,
        int(patience * 1e9) if clock else int(patience),
        area.stride(0),
        area.shape[2],
        peers,
        PEERS=max(2, next_power_of_2(peers)),
        WORDS=1024,
        CLOCK=clock,
        num_warps=1,
    )
    return counts


def take(area: Tensor, counts: Tensor) -> Tensor:
    """See `reference.exchange.take`."""
    check("area", area, (counts.shape[0], None, None), INT32, area.device)
    check("counts", counts, (None,), INT32, area.device)
    rows = area.flatten(0, 1)
    out = torch.empty_like(rows)
    _copy(rows, out, counts, 0, None, area.shape[1], push=False)
    return out


def places(ranks: Tensor, slots: Tensor, counts: Tensor, capacity: int) -> Tensor:
    """See `reference.exchange.places`."""
    check("ranks", ranks, (None, None), INT32, ranks.device)
    check("slots", slots, tuple(ranks.shape), INT32, ranks.device)
    check("counts", counts, (None,), INT32, ranks.device)
    peers, out = counts.shape[0], torch.empty_like(slots)
    if out.numel():
        _places_kernel[(cdiv(out.numel(), PAIRS),)](
            ranks,
            slots,
            counts,
            out,
            out.numel(),
            capacity,
            peers,
            PEERS=max(2, next_power_of_2(peers)),
            PAIRS=PAIRS,
        )
    return out


def unpack(
    record: Tensor, counts: Tensor, at: int, gate: torch.dtype, top_k: int, first: int, share: int
) -> tuple[Tensor, Tensor]:
    """See `reference.exchange.unpack`; gates are FP32 here."""
    check("record", record, (counts.shape[0], None, None), INT32, record.device)
    check("counts", counts, (None,), INT32, record.device)
    if gate != torch.float32:
        raise TypeError(f"gate is {gate}, needed torch.float32")
    peers, capacity, width = record.shape
    gates = torch.empty((peers * capacity, top_k), dtype=gate, device=record.device)
    here = torch.empty((peers * capacity, top_k), dtype=torch.int32, device=record.device)
    if here.numel():
        _unpack_kernel[(cdiv(capacity, RECORDS), peers)](
            record,
            counts,
            gates.view(torch.int32),
            here,
            capacity,
            width,
            at,
            top_k,
            first,
            share,
            TOP_K=max(2, next_power_of_2(top_k)),
            ROWS=RECORDS,
        )
    return gates, here
