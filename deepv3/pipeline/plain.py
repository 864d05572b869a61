"""Forward and backward of one step through the whole model, without a pipeline: the order that every schedule equals.

Micro-batches in ascending order, weight gradients as soon as they are known. Gradients end in each parameter's FP32
``main_grad``; nothing here synchronises with the device. Same interface as `executor.Executor`.
"""

from collections.abc import Callable, Iterable

import torch

from deepv3.data.loader import Batch
from deepv3.model.transformer import Output, Transformer, moe_layers
from deepv3.pipeline.figures import StepOut


class PlainExecutor:
    """One whole model on one device."""

    def __init__(self, model: Transformer, device: torch.device) -> None:
        self.model, self.device = model, device

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
        for batch in batches:
            out = self._forward(batch, loss_scale, mtp_weight)
            out.objective.backward()
            total.add_(_figures(out))
            count -= 1
        assert count == 0, "a step was promised another number of micro-batches"
        on_chunk_done(0)
        return total

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
        assert count == 0, "validation was promised another number of micro-batches"
        return total


def _figures(out: Output) -> StepOut:
    return StepOut(*(getattr(out, name).detach().double() for name in StepOut.__dataclass_fields__))
