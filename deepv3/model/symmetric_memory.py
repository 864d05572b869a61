"""Memory that all ranks of a node can write, and exchanges of rows through it that never ask the host.

Every rank owns two buffers of P slots, one per source, each for as many rows as one dispatch has tokens: a token is
copied to a rank once at most, so no source needs another's counts to know where to write. An exchange pushes rows into
the peers' slots, raises a flag at each peer, and waits on the device for the P flags (`deepv3.kernels.exchange`).

Nothing tells a source that its slot is free again, because nothing has to. Exchange n writes the buffer of n - 2. A
rank pushes n after it has waited for n - 1, so every peer has pushed n - 1, which in the peer's stream comes after all
that the peer read of n - 2. That holds as long as ranks make the same exchanges in the same order, each reads its own
before the next, and all of them run in one order on the device: where the stream changes, the new one waits for the
old.

Given up: two buffers of the worst case, `Transit.bytes`. On CUDA: `torch.distributed._symmetric_memory`; elsewhere a
file in shared memory, for tests and small runs.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import deepv3.kernels as kernels
from deepv3.errors import ConfigError

BUFFERS = 2
WORD = 4  # bytes; rows are moved as int32
UNIT = 16  # bytes that a lane loads and stores at once
RECORD = 16  # words: records are filled up to a multiple, so that lanes move whole units
PATIENCE = 900.0  # seconds that a wait lasts at most on the device; the host's own guards are far quicker to tell


class Slots(NamedTuple):
    """What a slot holds at most: rows of `row` and `record` words for each of `capacity` tokens."""

    capacity: int
    row: int
    record: int

    def words(self, peers: int) -> int:
        """Of one buffer."""
        return peers * self.capacity * (self.row + self.record)


class Transit:
    """A rank's place in the exchanges of `group`. Collective at the start, and in `exchange` every rank must join.

    patience: seconds after which a source counts as lost; see `kernels.reference.exchange.wait`.
    """

    def __init__(
        self, group: dist.ProcessGroup, slots: Slots, device: torch.device, patience: float = PATIENCE
    ) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.slots, self.patience, self.number = slots, patience, 0
        self.bytes = WORD * BUFFERS * slots.words(self.size)
        flags = 8 * BUFFERS * self.size
        self._memory, self._kept = _shared(group, self.bytes + flags, device)
        self._flags = [m[self.bytes :].view(torch.int64).view(BUFFERS, self.size) for m in self._memory]
        self.failed = torch.zeros(self.size, dtype=torch.int32, device=device)
        self._areas: dict[tuple[int, ...], list[Tensor]] = {}
        self._stream: torch.cuda.Stream | None = None

    def exchange(
        self, rows: Tensor, record: Tensor | None, counts: Tensor, items: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, and with each its record, to all ranks, and theirs here; see `kernels.push` for counts and items.

        rows: [N, W] and record: [N, V], both int32. Returns this rank's areas [P, C, W] and [P, C, V] (of no width
        where there is no record), to be read before the next exchange, and the counts [P] of what came.
        """
        self._order(rows)
        self.number = self.number % (2**31 - 2) + 1
        parity = self.number % BUFFERS
        areas = []
        for part, words in enumerate((rows, record)):
            if words is None:
                areas.append(rows.new_empty(self.size, self.slots.capacity, 0))
                continue
            peers = self._views(parity, part, words.shape[1])
            kernels.push(words, peers, counts, self.rank, items)
            areas.append(peers[self.rank])
        kernels.signal(counts, [flags[parity] for flags in self._flags], self.rank, self.number)
        came = kernels.wait(self._flags[self.rank][parity], self.number, areas[0], self.failed, self.patience)
        return areas[0], areas[1], came

    def _views(self, parity: int, part: int, width: int) -> list[Tensor]:
        """Every rank's area for rows (part 0) or records (part 1) of this width."""
        key = (parity, part, width)
        if key not in self._areas:
            slots = self.slots
            assert width <= (slots.row, slots.record)[part], (key, slots)
            rows = self.size * slots.capacity
            first = parity * slots.words(self.size) + part * rows * slots.row
            whole = [memory[: self.bytes].view(torch.int32)[first:] for memory in self._memory]
            self._areas[key] = [m[: rows * width].view(self.size, slots.capacity, width) for m in whole]
        return self._areas[key]

    def _order(self, rows: Tensor) -> None:
        """Where the caller's stream is not that of the exchange before, wait for all that one has to do."""
        if rows.is_cuda:
            stream = torch.cuda.current_stream()
            if self._stream is not None and self._stream != stream:
                stream.wait_stream(self._stream)
            self._stream = stream


def words_of(rows: Tensor) -> Tensor:
    """[N, D] of any format as int32 words, without a copy."""
    return rows.contiguous().view(torch.int32)


def record_of(*parts: Tensor) -> Tensor:
    """Columns of any 4- or 8-byte formats side by side as words, filled up to a multiple of `RECORD`."""
    words = [words_of(part) for part in parts]
    width = sum(part.shape[1] for part in words)
    if filling := -width % RECORD:
        words.append(words[0].new_zeros(words[0].shape[0], filling))
    return torch.cat(words, dim=1)


def record_words(*widths: int) -> int:
    """Words of a record of parts of so many words."""
    return -(-sum(widths) // RECORD) * RECORD


# -- memory ------------------------------------------------------------------------------------------------------------


def _shared(group: dist.ProcessGroup, size: int, device: torch.device) -> tuple[Sequence[Tensor], object]:
    """Zeros of `size` bytes per rank, all of them mapped here, by rank of the group; and what keeps them mapped."""
    return _shared_cuda(group, size, device) if device.type == "cuda" else _shared_host(group, size)


def _shared_cuda(group: dist.ProcessGroup, size: int, device: torch.device) -> tuple[Sequence[Tensor], object]:
    import torch.distributed._symmetric_memory as symmetric  # not in every build of torch

    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # read at the rendezvous; nothing here multicasts
    mine = symmetric.empty(size, dtype=torch.uint8, device=device)
    mine.zero_()
    torch.cuda.synchronize(device)
    try:
        handle = symmetric.rendezvous(mine, group)
    except RuntimeError as error:
        raise ConfigError(
            f"parallel.dispatcher = symmetric needs GPUs that can map each other's memory, and these {group.size()} "
            f"cannot: {error}; set parallel.dispatcher=all_to_all"
        ) from error
    dist.barrier(group=group)  # nobody writes before all are zero
    return [handle.get_buffer(rank, (size,), torch.uint8) for rank in range(group.size())], (mine, handle)


def _shared_host(group: dist.ProcessGroup, size: int) -> tuple[Sequence[Tensor], object]:
    peers = dist.get_world_size(group)
    first = dist.get_rank(group) == 0
    names: list[str | None] = [None]
    if first:
        memory = Path("/dev/shm")
        handle, names[0] = tempfile.mkstemp("-deepv3", dir=memory if memory.is_dir() else None)
        os.ftruncate(handle, size * peers)
        os.close(handle)
    dist.broadcast_object_list(names, src=dist.get_global_rank(group, 0), group=group)
    assert names[0] is not None
    storage: Any = torch.UntypedStorage.from_file(names[0], True, size * peers)
    dist.barrier(group=group)
    if first:
        os.unlink(names[0])  # the mappings stay
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(peers, size).unbind(), storage
