"""Where the device's time goes inside a real training step, by what the planner counts.

Marks on the stream (CUDA events; the host's clock on a CPU) cut a step into stretches that belong to attention, the
experts, the head or none of them, forward by wrapping the modules' calls and backward by hooks on the tensors between
them. Within a stretch every matrix product and the attention core is timed by marks of its own, with its FLOPs. What is
left of a stretch is its memory-bound kernels, everything else that runs there, and gaps. So all rows together are the
whole step, at the clocks that a step runs at, and nothing needs to know any kernel by name.

Given up: marks take about a microsecond each on the device, and keep neighbouring kernels from overlapping.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import deepv3.kernels as kernels
from deepv3.arithmetic import attention_flops
from deepv3.config.schema import ModelConfig
from deepv3.model.block import Block
from deepv3.model.head import Head
from deepv3.model.mla import MLA
from deepv3.planner.work import PADDING, attention_backward
from deepv3.precision.saved import Remade

Kind = tuple[str, ...]
Describe = Callable[..., tuple[Kind, float, float]]
"""Of a call's arguments: kind, FLOPs (or parameters), bytes of FP32 sums."""
PRODUCTS: dict[str, tuple[Kind, int]] = {
    "grouped_mm": (("bf16", "grouped", "forward"), 1),
    "grouped_mm_t": (("bf16", "grouped", "input"), 1),
    "grouped_wgrad_": (("bf16", "grouped", "weight"), 0),
    "dense_wgrad_": (("bf16", "dense", "weight"), 0),
    "fp8_mm": (("fp8", "dense", "forward"), 2),
    "fp8_wgrad_": (("fp8", "dense", "weight"), 0),
    "grouped_fp8_mm": (("fp8", "grouped", "forward"), 2),
    "grouped_fp8_wgrad_": (("fp8", "grouped", "weight"), 0),
}
"""Function of deepv3.kernels -> what its product is, and which argument is the matrix or its gradient, [.., N, K]."""
ATTENTION, ATTENTION_BACKWARD = ("attention", "forward"), ("attention", "backward")
CODES = ("codes",)
BETWEEN = ("between",)  # made again inside attention's backward, and no part of it


class Mark:
    """A point of the device's time."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self.at = time.perf_counter()
        if self.event is not None:
            self.event.record()

    def until(self, later: "Mark") -> float:
        """Seconds; the device has passed both."""
        if self.event is None:
            return later.at - self.at
        assert later.event is not None
        return float(self.event.elapsed_time(later.event)) / 1e3


@dataclass
class Span:
    """A timed call. work: FLOPs, or parameters coded; summed: bytes of FP32 sums read and written."""

    kind: Kind
    start: Mark
    work: float = 0.0
    summed: float = 0.0
    stop: Mark | None = None
    inner: list["Span"] = field(default_factory=list)

    def whole(self) -> float:
        """Seconds from start to stop."""
        assert self.stop is not None
        return self.start.until(self.stop)

    def own(self) -> float:
        """Seconds without the spans inside."""
        return self.whole() - sum(span.whole() for span in self.inner)


@dataclass(frozen=True)
class Measured:
    """One step, in seconds. products: kind -> (work, seconds, bytes of sums); rest: piece -> what is left of it;
    step: everything; update: norm and optimizer; host: until the host had enqueued the step."""

    products: dict[Kind, tuple[float, float, float]]
    rest: dict[str, float]
    step: float
    update: float
    host: float


class Meter:
    """Times steps of one model on this device: `with meter.installed()`, then per step `begin`, `compute_done`, `end`.

    tokens: of a micro-batch. Not for overlapped passes, which use several streams.
    """

    def __init__(self, m: ModelConfig, tokens: int, seq_len: int, device: torch.device) -> None:
        self.m, self.tokens, self.seq_len, self.device = m, tokens, seq_len, device
        self._reset()

    def _reset(self) -> None:
        self._spans: list[tuple[str, Span]] = []
        self._open: list[Span] = []
        self._cuts: list[tuple[str, Mark]] = []
        self._piece, self._backward = "other", False
        self._layer_out: Tensor | None = None

    # -- a step -------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The step starts."""
        self._reset()
        self._began = time.perf_counter()
        self._enter("other")

    def compute_done(self) -> None:
        """All micro-batches are enqueued; the optimizer follows."""
        self._enter("update")

    def end(self) -> Measured:
        """The step is enqueued; waits for the device."""
        last, host = Mark(self.device), time.perf_counter() - self._began
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        ends = [mark for _, mark in self._cuts[1:]] + [last]
        rest: dict[str, float] = {}
        for (piece, start), stop in zip(self._cuts, ends):
            rest[piece] = rest.get(piece, 0.0) + start.until(stop)
        products: dict[Kind, tuple[float, float, float]] = {}
        for piece, span in self._spans:
            if span.kind == BETWEEN:
                continue
            work, seconds, summed = products.get(span.kind, (0.0, 0.0, 0.0))
            products[span.kind] = (work + span.work, seconds + span.own(), summed + span.summed)
            rest[piece] -= span.own()
        return Measured(products, rest, self._cuts[0][1].until(last), rest.pop("update"), host)

    def _enter(self, piece: str) -> None:
        if not self._cuts or piece != self._piece:
            self._cuts.append((piece, Mark(self.device)))
        self._piece = piece

    # -- spans --------------------------------------------------------------------------------------------------------

    def _start(self, kind: Kind, work: float = 0.0, summed: float = 0.0) -> Span:
        span = Span(kind, Mark(self.device), work, summed)
        if self._open:
            self._open[-1].inner.append(span)
        self._open.append(span)
        self._spans.append((self._piece, span))
        return span

    def _stop(self) -> None:
        self._open.pop().stop = Mark(self.device)

    def _timed(self, call: Callable[..., Any], describe: Describe) -> Callable[..., Any]:
        """`call` as a span; inside a product nothing else is timed, since it may be made of others."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._open and self._open[-1].kind not in (BETWEEN, ATTENTION_BACKWARD):
                return call(*args, **kwargs)
            self._start(*describe(*args, **kwargs))
            try:
                return call(*args, **kwargs)
            finally:
                self._stop()

        return timed

    # -- what is wrapped ----------------------------------------------------------------------------------------------

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Calls are timed within."""
        with ExitStack() as undo:

            def replace(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
                own = getattr(owner, name)
                undo.callback(setattr, owner, name, own)
                setattr(owner, name, wrap(own))

            for name, (kind, index) in PRODUCTS.items():
                replace(kernels, name, partial(self._timed, describe=self._product(kind, index)))
            replace(torch, "mm", lambda call: self._timed(call, self._mm))
            replace(kernels, "quantise_blocks", lambda call: self._timed(call, lambda w, *_: (CODES, w.numel(), 0.0)))
            replace(kernels, "e5m6_unpack", lambda call: self._timed(call, lambda *_: (BETWEEN, 0.0, 0.0)))
            replace(Remade, "__call__", lambda call: self._timed(call, lambda *_: (BETWEEN, 0.0, 0.0)))
            replace(F, "scaled_dot_product_attention", self._attention)
            replace(Tensor, "backward", self._in_backward)
            replace(MLA, "forward", self._around_attention)
            replace(Block, "attention", self._before_attention)
            replace(Block, "combine", self._after_layer)
            replace(Head, "loss", self._around_head)
            yield

    def _mm(self, a: Tensor, b: Tensor, **_: Any) -> tuple[Kind, float, float]:
        which = "input" if self._backward else "forward"
        return ("bf16", "dense", which), 2.0 * a.shape[0] * a.shape[1] * b.shape[1], 0.0

    def _product(self, kind: Kind, index: int) -> Describe:
        """FLOPs as the planner counts them: experts' rows with half a tile of padding each."""

        def describe(*args: Any) -> tuple[Kind, float, float]:
            n, k = args[index].shape[-2:]
            rows, summed, which = self.tokens, 0.0, kind[2]
            if kind[1] == "grouped":
                rows = self.tokens * self.m.num_experts_per_tok + PADDING * args[index].shape[0]
                if which == "weight":
                    summed = (8.0 if args[-1] else 4.0) * args[index].numel()
            elif kind == ("bf16", "dense", "weight"):
                rows = args[1].shape[0]  # the head's come in chunks
            if which == "forward" and self._backward:
                which = "input"
            return (*kind[:2], which), 2.0 * rows * n * k, summed

        return describe

    def _attention(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Forward as a span; backward by hooks on its node, without what it makes again inside."""
        flops = self.tokens * attention_flops(self.m, self.seq_len)

        def core(*args: Any, **kwargs: Any) -> Tensor:
            out = self._timed(call, lambda *_, **__: (ATTENTION, flops, 0.0))(*args, **kwargs)
            if out.grad_fn is not None:
                backward = attention_backward(self.m) * flops
                out.grad_fn.register_prehook(lambda _: self._hooked(self._start, ATTENTION_BACKWARD, backward))
                out.grad_fn.register_hook(lambda *_: self._hooked(self._stop))
            return out

        return core

    def _hooked(self, act: Callable[..., Any], *args: Any) -> None:
        act(*args)  # a hook's result would replace the gradient

    def _in_backward(self, call: Callable[..., None]) -> Callable[..., None]:
        def backward(*args: Any, **kwargs: Any) -> None:
            self._backward = True
            try:
                call(*args, **kwargs)
            finally:
                self._backward = False
                self._enter("other")

        return backward

    # -- pieces -------------------------------------------------------------------------------------------------------

    def _hook(self, tensor: Tensor, piece: str) -> None:
        """Backward enters `piece` once the gradient of `tensor` is known."""
        if tensor.requires_grad:
            tensor.register_hook(lambda _: self._enter(piece))

    def _before_attention(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def attention(block: Block, x: Tensor, *args: Any) -> Any:
            if x is not self._layer_out:  # the first layer's input: what is behind it is no layer
                self._hook(x, "other")
            self._enter("attention")
            return call(block, x, *args)

        return attention

    def _after_layer(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def combine(*args: Any) -> Tensor:
            self._layer_out = call(*args)
            self._hook(self._layer_out, "experts")
            return self._layer_out

        return combine

    def _around_attention(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(mla: MLA, *args: Any) -> Tensor:
            out = call(mla, *args)
            self._hook(out, "attention")
            self._enter("experts")
            return out

        return forward

    def _around_head(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def loss(head: Head, hidden: Tensor, *args: Any) -> Any:
            self._enter("head")
            try:
                return call(head, hidden, *args)
            finally:
                self._enter("other")

        return loss
