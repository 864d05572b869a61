"""Runs the Gluon kernels' own Python on the CPU: a thread per partition, barriers with phases, copies with byte counts.

Triton cannot interpret Gluon. Here every name of the language that the kernels use stands for plain torch, so indices,
masks, scales and above all the barriers' protocol are those of the source. Everything asynchronous happens as late as
it may: a product reads shared memory when it is waited for, a store when the next one waits, and it is written at the
end, the last one first, if nobody waits for that. So a stage handed back too early, or a buffer overwritten too early,
or a sum to what is not there yet, gives a wrong number; a wrong phase stands still and is reported.
Not shown: what the compiler makes of it, layouts, and the order of memory accesses among the warps of one group.
"""

import builtins
import inspect
import textwrap
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PATIENCE = 20.0  # seconds a partition may stand still


class Barrier:
    """An mbarrier: a phase is over when all have arrived and all expected bytes have come."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.missing = count
        self.bytes = 0

    def step(self, arrivals: int, expected: int) -> None:
        with self.condition:
            self.missing -= arrivals
            self.bytes += expected
            assert self.missing >= 0, "more arrivals than the barrier counts"
            if self.missing == 0 and self.bytes == 0:
                self.phase ^= 1
                self.missing = self.count
                self.condition.notify_all()

    def wait(self, phase: Any) -> None:
        with self.condition:
            over = self.condition.wait_for(lambda: self.phase != int(phase), timeout=PATIENCE)
        assert over, "a barrier's phase never ends: the kernel would hang"


class Shared:
    """A part of shared memory; or an array of barriers."""

    def __init__(self, values: Any) -> None:
        self.values = values

    @property
    def shape(self) -> Any:
        return self.values.shape

    def index(self, place: Any) -> Any:
        chosen = self.values[int(place)]
        return chosen if isinstance(chosen, Barrier) else Shared(chosen)

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return Shared(self.values.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.values.permute(order))

    def load(self, layout: Any) -> Tensor:
        return self.values.clone()

    def store(self, value: Tensor) -> None:
        self.values.copy_(value)


class Descriptor:
    """A tensor of which tiles are copied; what lies outside is zero, and is not written."""

    layout = None

    def __init__(self, tensor: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]):
        self.view = tensor.as_strided(shape, strides)
        self.block_shape, self.dtype = block, tensor.dtype

    def window(self, coordinates: list[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """(of the tensor, of the tile) where both are."""
        starts = [int(c) for c in coordinates]
        ends = [min(s + b, size) for s, b, size in zip(starts, self.block_shape, self.view.shape)]
        inside = tuple(slice(s, max(s, e)) for s, e in zip(starts, ends))
        return inside, tuple(slice(0, part.stop - part.start) for part in inside)


class Pointer:
    """An address in a flat tensor, or many."""

    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset

    def __add__(self, more: Any) -> "Pointer":
        return Pointer(self.memory, self.offset + more)

    def __sub__(self, less: Any) -> "Pointer":
        return self + -less


class Later:
    """A product that has been issued; until it is there, its registers hold anything."""

    def __init__(self, a: Shared, b: Shared) -> None:
        self.a, self.b = a, b
        self.value = torch.full((a.values.shape[0], b.values.shape[1]), float("nan"))


def _memory(tensor: Tensor) -> Tensor:
    """All of the tensor's memory from its first element on."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    return tensor.as_strided((size,), (1,))


def _load(pointer: Pointer, mask: Any = None, other: float = 0) -> Any:
    offset = torch.as_tensor(pointer.offset)
    keep = torch.ones_like(offset, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand(offset.shape)
    values = pointer.memory[torch.where(keep, offset, 0)]
    return torch.where(keep, values, torch.tensor(other, dtype=values.dtype))


def _store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    pointer.memory[pointer.offset[mask]] = value[mask]


class Machine:
    """What the names `gl`, `tma`, `mbarrier` mean while one program runs."""

    def __init__(self, program: int, programs: int, lag: float) -> None:
        self.program, self.programs, self.lag = torch.tensor(program), torch.tensor(programs), lag
        self.sent = threading.local()

    def allocate(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        if layout == "barriers":
            return Shared([Barrier() for _ in range(shape[0])])
        if dtype == torch.int32:
            return Shared(torch.full(shape, -1, dtype=dtype))
        garbage = torch.full(shape, 0x7F if dtype == torch.float8_e4m3fn else 0xFF, dtype=torch.uint8)
        return Shared(garbage.view(dtype) if dtype.itemsize == 1 else torch.full(shape, float("nan"), dtype=dtype))

    def copy_in(self, descriptor: Descriptor, coordinates: list[Any], barrier: Barrier, target: Shared) -> None:
        inside, tile = descriptor.window(coordinates)
        target.values.copy_(torch.zeros(target.values.shape).to(target.values.dtype))
        target.values[tile] = descriptor.view[inside]
        barrier.step(0, -target.values.numel() * target.values.element_size())

    def copy_out(self, descriptor: Descriptor, coordinates: list[Any], source: Shared) -> None:
        self.queue().append((descriptor, coordinates, source, False))

    def add_out(self, descriptor: Descriptor, coordinates: list[Any], source: Shared) -> None:
        self.queue().append((descriptor, coordinates, source, True))

    def queue(self) -> list[Any]:
        if not hasattr(self.sent, "queue"):
            self.sent.queue = []
        return self.sent.queue

    def store_wait(self, pending: int) -> None:
        """All but the last ones have read shared memory."""
        queue = self.queue()
        while len(queue) > pending:
            descriptor, coordinates, source, add = queue.pop(0)
            inside, tile = descriptor.window(coordinates)
            self.read().append((descriptor.view, inside, source.values[tile].clone(), add))

    def read(self) -> list[Any]:
        if not hasattr(self.sent, "read"):
            self.sent.read = []
        return self.sent.read

    def complete(self, reads: list[Any]) -> None:
        """These are written."""
        for view, inside, values, add in reads:
            view[inside] = values + (view[inside] if add else 0)
        self.read().clear()

    def assembly(self, text: str, constraints: str, args: list[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
        if "wait_group 0" in text:
            self.store_wait(0)
            self.complete(self.read())
        return args[0] * args[1] + args[2] if text.startswith("fma") else args[0]

    def multiply(self, a: Shared, b: Shared, add: Any) -> Later:
        assert not add, "every product here goes to a fresh accumulator"
        self.issued().append(Later(a, b))
        return self.issued()[-1]

    def issued(self) -> list[Later]:
        if not hasattr(self.sent, "issued"):
            self.sent.issued = []
        return self.sent.issued

    def product(self, pending: int, deps: tuple[Later]) -> Tensor:
        time.sleep(self.lag)
        issued = self.issued()
        while len(issued) > pending:
            done = issued.pop(0)
            done.value = done.a.values.float() @ done.b.values.float()
        return deps[0].value

    def specialise(self, partitions: list[Any], warps: list[int], registers: list[int]) -> None:
        failures: list[BaseException] = []

        def run(function: Any, args: tuple[Any, ...]) -> None:
            try:
                function(*args)
                assert not self.queue() and not self.issued(), "a partition ends with a store or product under way"
                self.complete(self.read()[::-1])
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=run, args=partition, daemon=True) for partition in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def names(self) -> dict[str, Any]:
        """Globals of the emulated functions."""
        gl = types.SimpleNamespace(
            program_id=lambda axis: self.program,
            num_programs=lambda axis: self.programs,
            num_warps=lambda: 4,
            cdiv=lambda a, b: -(-a // b),
            minimum=lambda a, b: a if a <= b else b,
            maximum=lambda a, b: a if a >= b else b,
            reshape=lambda value, shape: value.reshape(shape),
            permute=lambda value, order: value.permute(order),
            split=lambda value: value.unbind(-1),
            where=lambda condition, a, b: torch.where(torch.as_tensor(condition), a, b),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            arange=lambda start, end, layout: torch.arange(start, end),
            expand_dims=lambda value, axis: value.unsqueeze(axis),
            sum=lambda value, axis: value.sum(axis).to(value.dtype),
            max=lambda value, axis: value.amax(axis),
            static_range=builtins.range,
            load=_load,
            store=_store,
            allocate_shared_memory=self.allocate,
            warp_specialize=self.specialise,
            thread_barrier=lambda: None,
            inline_asm_elementwise=self.assembly,
            NVMMADistributedLayout=lambda **how: None,
            BlockedLayout=lambda *how: None,
            SliceLayout=lambda *how: None,
            SwizzledSharedLayout=lambda *how: None,
            float32=torch.float32,
            int32=torch.int32,
            int64=torch.int64,
        )
        mbarrier = types.SimpleNamespace(
            MBarrierLayout=lambda: "barriers",
            init=lambda barrier, count: barrier.init(count),
            expect=lambda barrier, bytes: barrier.step(1, bytes),
            arrive=lambda barrier, count, pred=True: barrier.step(count, 0) if pred else None,
            wait=lambda barrier, phase, pred=True: barrier.wait(phase) if pred else None,
        )
        tma = types.SimpleNamespace(
            async_copy_global_to_shared=self.copy_in,
            async_copy_shared_to_global=self.copy_out,
            store_wait=self.store_wait,
        )
        return {
            "gl": gl,
            "mbarrier": mbarrier,
            "tma": tma,
            "fence_async_shared": lambda: None,
            "reduce_add": self.add_out,
            "warpgroup_mma": lambda a, b, acc, use_acc, is_async: self.multiply(a, b, use_acc),
            "warpgroup_mma_wait": self.product,
            "range": lambda *ends: (torch.tensor(i) for i in builtins.range(*(int(end) for end in ends))),
            "__builtins__": builtins,
        }


class OnCpu:
    """Stands in for a kernel: kernel[grid](...) runs its programs one after the other.

    edits: pieces of the source to replace, to see that a mistake is found; lag: seconds every product takes.
    """

    def __init__(self, name: str, *modules: Any) -> None:
        self.name, self.edits, self.lag = name, {}, 0.0
        functions = {key: value.fn for module in modules for key, value in vars(module).items() if hasattr(value, "fn")}
        self.sources = {key: textwrap.dedent(inspect.getsource(function)) for key, function in functions.items()}

    def names(self, program: int, programs: int) -> dict[str, Any]:
        space = Machine(program, programs, self.lag).names()
        space["gluon"] = types.SimpleNamespace(jit=lambda function: function)
        for source in self.sources.values():
            for old, new in self.edits.items():
                source = source.replace(old, new)
            exec("from __future__ import annotations\n" + source, space)
        return space

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*args: Any, num_warps: int, **constants: Any) -> None:
            flat = [Pointer(_memory(value)) if isinstance(value, Tensor) else value for value in args]
            for program in range(grid[0]):
                self.names(program, grid[0])[self.name](*flat, **constants)

        return launch


def found(attempt: Callable[[], None], tries: int = 5) -> bool:
    """Whether a planted mistake fails `attempt`. Threads may by chance run in the order that the mistake takes for
    granted, so it has several tries."""
    for _ in range(tries):
        try:
            attempt()
        except AssertionError:
            return True
    return False
