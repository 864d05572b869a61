"""Several ranks on one GPU, for tests on machines with fewer GPUs than ranks.

    results = shared_gpu.run(4, function, arguments...)      # as ranks.run, whatever GPUs there are

NCCL 2.28.9, which torch 2.11 brings, refuses two ranks on a device ("Duplicate GPU detected"; from 2.30 on
NCCL_MULTI_RANK_GPU_ENABLE=1 allows it). So where GPUs are fewer than ranks, messages go over gloo by way of the host: a
send copies its tensor when it is posted, on the stream that posts it, and a receive or a collective copies back when it
is waited for, on the stream that waits. Streams, events, the allocator, kernels and the order of messages are the real
ones; NCCL's own kernels and concurrency are not there. Symmetric memory is the real one, which the environment must
allow on one device. Processes take turns on the device: a kernel that waits for another process spends its whole turn.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import ranks
import torch
import torch.distributed as dist

from deepv3.optim.flat import GATHER

PATIENCE = 400  # seconds a job may take: processes compile their kernels side by side, and share the device


def why(count: int) -> str:
    """What a test of `count` ranks runs on here."""
    devices = torch.cuda.device_count()
    if devices >= count:
        return f"{count} ranks, each with a GPU of its own, over NCCL"
    version = ".".join(map(str, torch.cuda.nccl.version()))
    return f"{count} ranks on {devices} GPU(s), over gloo by way of the host: NCCL {version} wants a GPU for each"


def run(count: int, function: Callable[..., Any], *arguments: Any, fresh: bool = False) -> list[Any]:
    """`ranks.run`, with ranks sharing GPUs where there are too few.

    fresh: in new processes, for what uses symmetric memory. torch counts its rendezvous per process and keeps stores by
    the name of a group, and so wants one life of the process groups in a process, and all ranks alike.
    """
    print(why(count))
    if fresh:
        ranks.close()
    with mock.patch.object(ranks, "PATIENCE", PATIENCE):
        return ranks.run(count, _on_rank, torch.cuda.device_count(), function, arguments)


def _on_rank(devices: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    alone = int(os.environ["WORLD_SIZE"]) <= devices
    with nullcontext() if alone else sharing(devices):
        return function(*arguments)


@contextmanager
def sharing(devices: int) -> Iterator[None]:
    """Within the block this rank's device is one of `devices` that ranks share, and messages go over gloo."""
    true = dist.init_process_group

    def init_process_group(**options: Any) -> None:
        options.pop("device_id", None)
        true(**{**options, "backend": "gloo"})

    environment = {
        "LOCAL_RANK": str(int(os.environ["LOCAL_RANK"]) % devices),
        "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
    }
    staged = {name: _staged(name, getattr(dist, name)) for name in ARGUMENTS}
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.multiple(
            dist, init_process_group=init_process_group, reduce_scatter_tensor=_reduce_scatter, **staged
        ),
    ):
        yield


# Positions of tensors that a call reads, and of those that it writes.
ARGUMENTS = {
    "all_reduce": ((0,), (0,)),
    "all_gather": ((1,), (0,)),
    GATHER: ((1,), (0,)),
    "all_to_all_single": ((1,), (0,)),
    "isend": ((0,), ()),
    "irecv": ((), (0,)),
}


class _Work:
    """A message under way; `wait` brings what came to the device."""

    def __init__(self, work: Any, arrive: Callable[[], None]) -> None:
        self._work, self._arrive = work, arrive

    def wait(self) -> bool:
        self._work.wait()
        self._arrive()
        return True


def _staged(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` with host tensors in place of CUDA tensors."""
    reads, writes = ARGUMENTS[name]

    def staged(*arguments: Any, **options: Any) -> Any:
        if not any(_on_device(argument) for argument in arguments):
            return call(*arguments, **options)
        hosts = list(arguments)
        for at in {*reads, *writes}:
            hosts[at] = _host(arguments[at], at in reads)
        work = call(*hosts, **options)

        def arrive() -> None:
            for at in writes:
                _copy(arguments[at], hosts[at])

        if work is not None:
            return _Work(work, arrive)
        arrive()
        return None

    return staged


def _on_device(argument: Any) -> bool:
    first = argument[0] if isinstance(argument, list) and argument else argument
    return isinstance(first, torch.Tensor) and first.is_cuda


def _host(argument: Any, read: bool) -> Any:
    """A host tensor, or a list of them, with the argument's values where they are read."""
    if isinstance(argument, list):
        return [_host(tensor, read) for tensor in argument]
    return argument.cpu() if read else torch.empty_like(argument, device="cpu")


def _copy(target: Any, source: Any) -> None:
    for to, came in zip(target, source) if isinstance(target, list) else [(target, source)]:
        to.copy_(came)


def _reduce_scatter(out: torch.Tensor, whole: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
    """gloo cannot scatter: the sum of everything, of which each rank keeps its own part."""
    host = whole.cpu()
    rank, size = dist.get_rank(group), out.numel()
    work = dist.all_reduce(host, group=group, async_op=True)  # a host tensor: passed through
    made = _Work(work, lambda: _copy(out, host[rank * size : (rank + 1) * size]))
    return made if async_op else made.wait()
