"""Tensors between pipeline ranks: posts of asynchronous sends and receives, and waits for them.

Two communicators per pipeline, one for activations and one for gradients: inside a pair either may leave first
(`lower`). Shapes are known to both ends, so nothing but the tensor travels. On CUDA a wait makes the stream wait, not
the host.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from deepv3.dist import Grid
from deepv3.pipeline.actions import Channel, Transfer

Key = tuple[Channel, int, int]
"""A tensor that travels: (channel, stage that needs it, micro-batch)."""


class Mailbox:
    """What waits on a rank: tensors made or received for a stage here, and sends that are not complete."""

    def __init__(self, grid: Grid) -> None:
        self._peers = grid.members("pp_act")
        self._groups = {"act": grid.group("pp_act"), "grad": grid.group("pp_grad")} if grid.pp_size > 1 else {}
        self._ready: dict[Key, tuple[Tensor, dist.Work | None]] = {}
        self._leaving: dict[Key, tuple[Tensor, dist.Work]] = {}

    def put(self, key: Key, tensor: Tensor) -> None:
        """A tensor made here: for a stage on this rank, or to be sent."""
        assert key not in self._ready, f"{key} is made twice"
        self._ready[key] = (tensor, None)

    def take(self, key: Key) -> Tensor:
        """A tensor that a stage needs; waits for its message."""
        tensor, work = self._ready.pop(key)
        if work is not None:
            work.wait()
        return tensor

    def send(self, key: Key, step: Transfer) -> None:
        """Post the send of a tensor made here; it stays until `free`."""
        tensor, _ = self._ready.pop(key)
        tensor = tensor.contiguous()
        work = dist.isend(tensor, self._peers[step.peer], group=self._groups[step.channel])
        assert work is not None
        self._leaving[key] = (tensor, work)

    def receive(self, key: Key, step: Transfer, like: tuple[tuple[int, ...], torch.dtype, torch.device]) -> None:
        """Post a receive. like: shape, dtype and device of the tensor."""
        shape, dtype, device = like
        buffer = torch.empty(shape, dtype=dtype, device=device)
        work = dist.irecv(buffer, self._peers[step.peer], group=self._groups[step.channel])
        assert work is not None
        self._ready[key] = (buffer, work)

    def free(self, key: Key) -> None:
        """Wait until a send is complete and give its tensor back."""
        _, work = self._leaving.pop(key)
        work.wait()

    def check_empty(self) -> None:
        """At the end of a step nothing is left over."""
        assert not self._ready and not self._leaving, f"left over: {[*self._ready, *self._leaving]}"
