"""One optimizer step on one page.

1. every micro-batch forward and backward, gradients summed in FP32 (executor);
2. the step's figures summed over data ranks in one all-reduce: losses, expert counts, the wish to stop;
3. gradients reduced, their true global norm, clip, AdamW (engine);
4. router biases moved by the global counts (V3 2.1.2), unless the step was skipped;
5. EMA of the weights, asynchronously.

Nothing here waits for the device: the figures are copied to the host while the next step is being enqueued.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from deepv3.config.schema import Config
from deepv3.data.loader import Batch
from deepv3.model.transformer import Transformer
from deepv3.optim import ramps
from deepv3.pipeline.executor import StepOut
from deepv3.train.trace import Spans


@dataclass
class Progress:
    """Where a run stands. step: finished optimizer steps; tokens: trained positions; samples: sequences drawn."""

    step: int = 0
    tokens: int = 0
    samples: int = 0


@dataclass
class Plan:
    """What one step uses, from the curves at the tokens seen before it (V3 4.2), and where the run stands after it."""

    step: int
    sequences: int
    tokens: int
    lr: float
    bias_speed: float
    mtp_weight: float
    after: Progress

    @staticmethod
    def of(cfg: Config, at: Progress) -> "Plan":
        """The plan of the step that follows `at`."""
        sequences = ramps.batch_size(cfg.train, at.tokens)
        tokens = sequences * cfg.data.seq_len
        return Plan(
            step=at.step + 1,
            sequences=sequences,
            tokens=tokens,
            lr=ramps.learning_rate(cfg.optim, at.step + 1, at.tokens),
            bias_speed=ramps.bias_speed(cfg, at.tokens),
            mtp_weight=ramps.mtp_weight(cfg, at.tokens),
            after=Progress(at.step + 1, at.tokens + tokens, at.samples + sequences),
        )


class Clock:
    """Seconds between two points of the device's (CUDA) or the host's (CPU) time, without waiting for the device."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self.start = self._now()
        self.end = self.start

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> None:
        """Mark the end."""
        self.end = self._now()

    def seconds(self) -> float:
        """Elapsed time; on CUDA waits until the end mark has passed."""
        if not self._cuda:
            return self.end - self.start
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


@dataclass
class StepRecord:
    """A step under way: its plan, its clock, its spans and its figures on their way to the host."""

    plan: Plan
    clock: Clock
    figures: Tensor
    n_moe: int
    spans: Spans

    def read(self) -> tuple[StepOut, float, bool, bool, float, float]:
        """Wait for the figures: (global sums, grad norm, skipped, stop wanted, smallest and largest router bias)."""
        self.clock.seconds()
        tail = self.figures[-5:].tolist()
        out = StepOut.unpack(self.figures[:-5], self.n_moe)
        return out, tail[1], bool(tail[2]), tail[0] > 0, tail[3], tail[4]


def bias_range(model: Transformer) -> Tensor:
    """Smallest and largest router bias of the model, [2]; zeros without experts."""
    biases = [router.e_score_correction_bias for router in model.routers()]
    return torch.stack(torch.aminmax(torch.cat(biases))) if biases else model.norm.weight.new_zeros(2)


def train_step(run, plan: Plan, batches: Iterable[Batch], stop_wanted: bool) -> StepRecord:
    """Run one optimizer step of `run` (a train.loop.Run) and return its record, still in flight."""
    clock, spans = Clock(run.device), Spans(run.device)
    run.engine.begin_step()
    with spans.span("compute"):
        source = spans.waiting("data", batches)
        out = run.executor.run(source, loss_scale=1.0 / plan.tokens, mtp_weight=plan.mtp_weight)
    figures = torch.cat([out.pack(), torch.tensor([float(stop_wanted)], dtype=torch.float64, device=run.device)])
    if run.grid.world_size > 1:
        with spans.span("comm_exposed"):
            dist.all_reduce(figures)
    n_moe = out.entropy.numel()
    with spans.span("optimizer"):
        stats = run.engine.finish_step(plan.lr)
        counts = StepOut.unpack(figures[:-1], n_moe).counts
        skipped = stats.skipped.double()
        run.model.update_biases(counts, plan.bias_speed * (1 - skipped))
        if run.ema is not None:
            run.ema.update()
    figures = torch.cat([figures, stats.norm.double().view(1), skipped.view(1), bias_range(run.model).double()])
    host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=figures.is_cuda)
    host.copy_(figures, non_blocking=True)
    clock.stop()
    return StepRecord(plan, clock, host, n_moe, spans)
