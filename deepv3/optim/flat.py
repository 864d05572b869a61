"""Parameters as slices of flat buffers, and the flat buffers' shards (ZeRO-1).

A group is one run of parameters that are treated alike: same pipeline chunk, dense or expert, decayed or not, same
format. It has one buffer of weights, one FP32 buffer of gradients (`param.main_grad` is a view of it), and, of the
buffer's equal shards, one a rank, this rank's one as FP32 master. Two ranks, parameters of 100 and 200 elements::

    weights   [ a: 0..100 | zeros | b: 128..328 | zeros ..512 ]   2 shards of 256
    rank 0 owns   0..256 = a whole, b's elements   0..128
    rank 1 owns 256..512 =          b's elements 128..200

Every parameter starts at a multiple of ALIGN elements, so that kernels may load vectors and use its address for TMA.
Bytes per parameter at dp = 1, BF16: 2 weights + 4 gradient + 4 master + 2 x 2 moments = 14; nothing of that size is
ever copied. In FP32 the master *is* the rank's shard of the weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepv3.dist import Grid

ALIGN = 128  # elements: 256 bytes of BF16
WIDE = (torch.float32, torch.float64)  # formats whose weights are their own masters (FP64 in tests of parity)


class Fragment(NamedTuple):
    """Elements [lo, hi) of the flattened global tensor `name`, as this rank holds them: views, each [hi - lo].

    group, start: in which of Engine.masters() they begin, and where.
    """

    name: str
    shape: tuple[int, ...]
    lo: int
    hi: int
    group: int
    start: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # until torch 2.12


@dataclass(frozen=True)
class Piece:
    """A parameter in its group's buffer.

    shape: of the global tensor; base: where the local one starts in it, flattened (experts beyond the first EP rank);
    offset: where it starts in the buffer. All in elements. param: with `main_grad`, `grad_ready` and `revision` after
    `allocate`.
    """

    name: str
    param: Any
    shape: tuple[int, ...]
    base: int
    offset: int


class FlatGroup:
    """One run of like parameters; see the module. Buffers exist after `allocate`.

    low, grad: [size] weights and FP32 gradients; master, grad_shard, low_shard: [size / shards], this rank's.
    """

    low: Tensor
    grad: Tensor
    master: Tensor
    grad_shard: Tensor
    low_shard: Tensor

    def __init__(self, chunk: int, expert: bool, decay: bool, process_group: dist.ProcessGroup):
        self.chunk, self.expert, self.decay = chunk, expert, decay
        self.process_group = process_group
        self.shards = dist.get_world_size(process_group)
        self.shard = dist.get_rank(process_group)
        self.pieces: list[Piece] = []
        self.end = 0

    def add(self, name: str, param: nn.Parameter, grid: Grid) -> None:
        """Append a parameter. Experts are this rank's slice of the leading (expert) dimension."""
        shape, base = tuple(param.shape), 0
        if self.expert:
            shape, base = (shape[0] * grid.ep_size, *shape[1:]), grid.ep_rank * param.numel()
        self.pieces.append(Piece(name, param, shape, base, self.end))
        self.end += -(-param.numel() // ALIGN) * ALIGN

    @torch.no_grad()
    def allocate(self) -> None:
        """Move the parameters into the buffer, one by one, and make the FP32 shard and the gradient views."""
        first = self.pieces[0].param
        size = -(-self.end // (ALIGN * self.shards)) * ALIGN
        self.low = torch.zeros(size * self.shards, dtype=first.dtype, device=first.device)
        for piece in self.pieces:
            view = self._view(self.low, piece)
            view.copy_(piece.param)
            piece.param.data = view  # the old storage is free from here on
        if self.low.is_cuda:
            torch.cuda.empty_cache()  # the freed pieces, as one block for the master
        self.low_shard = self.low.narrow(0, self.shard * size, size)
        self.master = self.low_shard if self.low.dtype in WIDE else self.low_shard.float()
        self.grad = torch.zeros_like(self.low, dtype=self.master.dtype)
        self.grad_shard = self.grad.narrow(0, self.shard * size, size)
        self.master.grad = self.grad_shard
        for piece in self.pieces:
            piece.param.main_grad = self._view(self.grad, piece)
            piece.param.grad_ready = False
            piece.param.revision = 0

    def _view(self, buffer: Tensor, piece: Piece) -> Tensor:
        return buffer.narrow(0, piece.offset, piece.param.numel()).view(piece.param.shape)

    def seal(self) -> None:
        """Declare the gradients finished: zero what no kernel touched, refuse what the flat buffer would miss."""
        for piece in self.pieces:
            param = piece.param
            if param.grad is not None:
                raise AssertionError(
                    f"{piece.name} has a .grad: its module does not write main_grad; the step would lose it"
                )
            if param.main_grad.data_ptr() != self.grad.data_ptr() + self.grad.element_size() * piece.offset:
                raise AssertionError(f"{piece.name}.main_grad no longer lies in its flat buffer")
            if param.data_ptr() != self.low.data_ptr() + self.low.element_size() * piece.offset:
                raise AssertionError(f"{piece.name} no longer lies in its flat buffer")
            if not param.grad_ready:
                param.main_grad.zero_()
            param.grad_ready = False  # a write after this is caught by `check_sealed`, or is the next step's first

    def check_sealed(self) -> None:
        """Refuse gradients written after `seal`: they missed the reduction."""
        for piece in self.pieces:
            if piece.param.grad_ready:
                raise AssertionError(f"{piece.name}: a weight gradient was written after its reduction began")

    def reduce(self) -> dist.Work | None:
        """Start summing the gradients over the ranks into each one's shard; the rest of the buffer is spoiled."""
        if self.shards == 1:
            return None
        if self.grad.is_cuda:
            return dist.reduce_scatter_tensor(self.grad_shard, self.grad, group=self.process_group, async_op=True)
        return dist.all_reduce(self.grad, group=self.process_group, async_op=True)  # gloo cannot scatter

    def gather(self) -> None:
        """Every rank's shard of the weights to every rank, as bytes. The weights are new: `param.revision` says so to
        who keeps something made of them."""
        for piece in self.pieces:
            piece.param.revision += 1
        if self.shards == 1:
            return
        mine = self.low_shard if self.low.is_cuda else self.low_shard.clone()  # NCCL gathers in place
        whole = self.low.view(torch.uint8)
        getattr(dist, GATHER)(whole, mine.view(torch.uint8), group=self.process_group)

    def fragments(self, index: int, exp_avg: Tensor, exp_avg_sq: Tensor) -> list[Fragment]:
        """What this rank's shard holds of each parameter, in buffer order. exp_avg, exp_avg_sq: [size / shards]."""
        begin = self.shard * self.master.numel()
        found = []
        for piece in self.pieces:
            lo = max(0, begin - piece.offset)
            hi = min(piece.param.numel(), begin + self.master.numel() - piece.offset)
            if lo < hi:
                start = piece.offset + lo - begin
                views = (flat.narrow(0, start, hi - lo) for flat in (self.master, exp_avg, exp_avg_sq))
                found.append(Fragment(piece.name, piece.shape, piece.base + lo, piece.base + hi, index, start, *views))
        return found


def flat_groups(
    model: nn.Module, grid: Grid, chunk_of: Callable[[str], int], owner_of: Callable[[str], str]
) -> list[FlatGroup]:
    """Groups of a rank's parameters.

    chunk_of, owner_of: by parameter name, which of the rank's pipeline chunks it belongs to (-1: to several), and
    the Grid group whose ranks hold the same and share its optimizer state. Ranks that share parameters see them in one
    order, because a model registers its layers by number. Matrices are decayed, vectors (norm gains) not. Names are
    global. Experts are the parameters below a module called `experts`.
    """
    owners = {name: grid.group(name) for name in ("zero", "edp", "ends")}  # on all ranks: making a group is collective
    groups: dict[tuple, FlatGroup] = {}
    for name, param in model.named_parameters():
        chunk, owner, expert, decay = chunk_of(name), owner_of(name), ".experts." in name, param.ndim > 1
        key = (chunk, owner, expert, decay, param.dtype)
        if key not in groups:
            groups[key] = FlatGroup(chunk, expert, decay, owners[owner])
        groups[key].add(name, param, grid)
    return [groups[key] for key in sorted(groups, key=lambda key: -key[0])]  # in the order of their reduction


def owner_of(name: str) -> str:
    """The usual owner: experts belong to the ranks that hold the same ones, all else to the data ranks of a stage."""
    return "edp" if ".experts." in name else "zero"
