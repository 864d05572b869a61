"""Forward and backward of one step through the whole model, without a pipeline: the order that every schedule equals.

Micro-batches in ascending order, weight gradients as soon as they are known. Gradients end in each parameter's FP32
``main_grad``; nothing here synchronises with the device. Same interface as `executor.Executor`.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch

from deepv3.data.loader import Batch
from deepv3.model.transformer import Output, Transformer, moe_layers
from deepv3.pipeline.figures import StepOut
from deepv3.pipeline.replay import Replay


class PlainExecutor:
    """One whole model on one device. replay: runs training micro-batches as CUDA graphs, where there is one."""

    def __init__(self, model: Transformer, device: torch.device, replay: Replay | None = None) -> None:
        self.model, self.device, self.replay = model, device, replay

    def _forward(self, batch: Batch, loss_scale: float, mtp_weight: float) -> Output:
        tokens = batch.tokens.to(self.device, non_blocking=True)
        documents = None if batch.documents is None else batch.documents.to(self.device, non_blocking=True)
        return self.model(tokens, loss_scale=loss_scale, mtp_weight=mtp_weight, documents=documents)

    def _nothing(self) -> StepOut:
        return StepOut.zeros(moe_layers(self.model.cfg), self.model.cfg.n_routed_experts, self.device)

    def take_timeline(self) -> None:
        """Nothing to report: no pipeline, and the exchanges of experts are part of the computation."""

    def run(
        self,
        batches: Iterable[Batch],
        count: int,
        loss_scale: float,
        mtp_weight: float,
        on_chunk_done: Callable[[int], None],
    ) -> StepOut:
        """One step's micro-batches. loss_scale: 1 / (trained tokens of the global batch) (V3 Eq. 24-25)."""
        total = self._nothing()
        work, seen = partial(self._train, loss_scale=loss_scale, mtp_weight=mtp_weight), 0
        replay = self.replay
        if replay is not None and not replay.ready((count, loss_scale, mtp_weight)):
            replay = None
        for number, batch in enumerate(batches):
            total.add_(work(batch) if replay is None else replay.run(number, batch, work))
            seen += 1
        assert seen == count, "a step was promised another number of micro-batches"
        on_chunk_done(0)
        return total

    def _train(self, batch: Batch, loss_scale: float, mtp_weight: float) -> StepOut:
        out = self._forward(batch, loss_scale, mtp_weight)
        out.objective.backward()
        return _figures(out)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], count: int, loss_scale: float) -> StepOut:
        """The same sums without gradients."""
        self.model.eval()
        total = self._nothing()
        for batch in batches:
            total.add_(_figures(self._forward(batch, loss_scale, 0.0)))
            count -= 1
        self.model.train()
        self.model.dispatcher.take_load()  # the next step reports its own
        if self.replay is not None:
            self.replay.forget_codes()
        assert count == 0, "validation was promised another number of micro-batches"
        return total


def _figures(out: Output) -> StepOut:
    return StepOut(*(getattr(out, name).detach().double() for name in StepOut.__dataclass_fields__))
