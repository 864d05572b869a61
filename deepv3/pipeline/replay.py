"""Forward and backward of a micro-batch as a CUDA graph: the host starts it with one call, not a thousand launches.

Two recordings are one step's micro-batches: `first` stores weight gradients and makes the FP8 codes of the weights,
`later` adds and reads those codes. They hold what was a number when they were made (loss scale, MTP weight, shapes), so
a step with others drops them, runs launch by launch, and the step after it records anew. What Python did beside the
device while recording is repeated at each start: gradients marked as written, the dispatcher's load noted.

Only for a whole model on one device: where tokens travel, the host or a counter of the host takes part.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepv3.config.schema import Config
from deepv3.data.loader import Batch
from deepv3.errors import ConfigError
from deepv3.model.dispatch import Load
from deepv3.model.transformer import Transformer
from deepv3.pipeline.figures import StepOut
from deepv3.precision.weights8 import WeightCodes

Work = Callable[[Batch], StepOut]
Recorder = Callable[[Callable[[], StepOut], Any], tuple[StepOut, Callable[[], None]]]


def record_graph(work: Callable[[], StepOut], pool: Any) -> tuple[StepOut, Callable[[], None]]:
    """`work` as a CUDA graph, not run yet: the tensors that every start fills, and what starts it on the current
    stream. Other threads (the loader's, NCCL's) may go on calling CUDA meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        figures = work()
    return figures, graph.replay


def records(cfg: Config, device: torch.device) -> bool:
    """Whether a whole model on this device is run from recordings: train.cuda_graph, and null where they can be made.

    Raises ConfigError where a device cannot record and should.
    """
    asked = cfg.train.cuda_graph
    if asked and device.type != "cuda":
        raise ConfigError(f"train.cuda_graph = true wants a CUDA device, and this is {device}; set it to null")
    return device.type == "cuda" and cfg.parallel.ep_size == 1 if asked is None else asked


@dataclass
class _Recording:
    figures: StepOut
    start: Callable[[], None]
    written: list[nn.Parameter]  # whose gradients it is the first of a step to write
    load: Load


class Replay:
    """The recordings of one model. record: what makes one; another than `record_graph` in tests."""

    def __init__(self, model: Transformer, device: torch.device, record: Recorder = record_graph) -> None:
        self.model, self.device, self._record = model, device, record
        self._parameters = list(model.parameters())
        self._key: Hashable = None
        self._drop()

    def _drop(self) -> None:
        self._first: _Recording | None = None
        self._later: _Recording | None = None
        self._batch: Batch | None = None
        self._tables: tuple[Tensor, Tensor] | None = None  # read by address: they must not be freed before
        self._pool: Any = None

    def ready(self, key: Hashable) -> bool:
        """Whether the step of this key may run by `run`: the one before it had the same. Asked once a step."""
        if key == self._key:
            return True
        self._key = key
        self._drop()
        return False

    def run(self, number: int, batch: Batch, work: Work) -> StepOut:
        """Micro-batch `number` of a step: what work(batch) would do. The figures hold until the next one starts."""
        if self._batch is None:
            documents = None if batch.documents is None else self._place(batch.documents)
            self._batch = Batch(self._place(batch.tokens), documents)
            rows, width = batch.tokens.shape
            seq_len = width - 1 - self.model.cfg.num_nextn_predict_layers
            self._tables = self.model.rotary(rows, seq_len, self.device)
            if self.device.type == "cuda":
                self._pool = torch.cuda.graph_pool_handle()
        self._batch.tokens.copy_(batch.tokens, non_blocking=True)
        if batch.documents is not None:
            assert self._batch.documents is not None, "documents come with every micro-batch or with none"
            self._batch.documents.copy_(batch.documents, non_blocking=True)
        if number == 0 and self._first is None:
            self._outdate_codes()
            self._first = self._recorded(work)
        elif number and self._later is None:
            self._later = self._recorded(work)
        recording = self._later if number else self._first
        assert recording is not None
        recording.start()
        for parameter in recording.written:
            parameter.grad_ready = True  # type: ignore[attr-defined]
        load = recording.load
        self.model.dispatcher.load.note(load.rows, load.received, load.crossed)
        return recording.figures

    def _outdate_codes(self) -> None:
        """So that the codes of the weights are made inside the recording, whoever made them last."""
        for parameter in self._parameters:
            parameter.revision = getattr(parameter, "revision", 0) + 1  # type: ignore[attr-defined]

    def _place(self, part: Tensor) -> Tensor:
        return torch.empty(part.shape, dtype=part.dtype, device=self.device)

    def _recorded(self, work: Work) -> _Recording:
        batch, dispatcher = self._batch, self.model.dispatcher
        assert batch is not None
        written = [parameter for parameter in self._parameters if not _ready(parameter)]
        before = dispatcher.take_load()
        figures, start = self._record(lambda: work(batch), self._pool)
        load, dispatcher.load = dispatcher.take_load(), before
        return _Recording(figures, start, [parameter for parameter in written if _ready(parameter)], load)

    def forget_codes(self) -> None:
        """Free FP8 codes that were made outside of a recording, as in a validation; recordings have their own."""
        if self._first is not None:
            for module in self.model.modules():
                codes = getattr(getattr(module, "fp8", None), "codes", None)
                if isinstance(codes, WeightCodes):
                    codes.forget()


def _ready(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "grad_ready", False)
