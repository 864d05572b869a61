"""One optimizer step on one page.

1. every micro-batch forward and backward, gradients summed in FP32 (executor);
2. the step's figures summed over all ranks in one all-reduce: losses, expert counts, each rank's news (faults.py);
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
from deepv3.dist import Grid
from deepv3.model.dispatch import Load
from deepv3.model.transformer import Transformer, moe_layers
from deepv3.optim import ramps
from deepv3.pipeline.figures import StepOut
from deepv3.pipeline.timeline import Timeline
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
    n_votes: int
    spans: Spans
    timeline: Timeline | None
    load: Load

    def read(self) -> tuple[StepOut, float, bool, Tensor, float, float]:
        """Wait for the figures: (global sums, grad norm, skipped, votes summed, smallest and largest router bias)."""
        self.clock.seconds()
        sizes = [2 * self.n_moe, self.n_votes, 2]
        sums, biases, votes, tail = self.figures.split([self.figures.numel() - sum(sizes), *sizes])
        norm, skipped = tail.tolist()
        low, high = biases.view(2, -1) if self.n_moe else biases.new_zeros(2, 1)
        return StepOut.unpack(sums, self.n_moe), norm, bool(skipped), votes, low.min().item(), high.max().item()

    def times(self) -> dict[str, float]:
        """Where the step's time went, as ``time_*`` fields; after `read`."""
        spent = self.spans.fields()
        if self.timeline is not None:
            inside = self.timeline.fields()
            spent["time_compute"] -= inside["time_comm_exposed"] + inside["time_bubble"]
            inside["time_comm_exposed"] += spent.get("time_comm_exposed", 0.0)
            spent |= inside
        return spent


def bias_ranges(model: Transformer, grid: Grid) -> Tensor:
    """Smallest and largest router bias of every MoE layer, [2 n_moe] FP64, to be summed over the world: a layer's are
    brought by the first rank that has it, with zeros from all others."""
    ranges = torch.zeros(2, moe_layers(model.cfg), dtype=torch.float64, device=grid.device)
    routers = model.routers()
    if routers and grid.first_copy:
        biases = torch.stack([router.e_score_correction_bias for router in routers]).double()
        ranges[:, model.rows()] = torch.stack([biases.amin(1), biases.amax(1)])
    return ranges.flatten()


def train_step(run, plan: Plan, batches: Iterable[Batch], votes: Tensor) -> StepRecord:
    """Run one optimizer step of `run` (a train.loop.Run) and return its record, still in flight.

    votes: this rank's news (faults.Votes.pack), FP64 on the host; summed over ranks with the step's figures. Router
    biases in the record are those that the step was made with.
    """
    clock, spans = Clock(run.device), Spans(run.device)
    run.engine.begin_step()
    count = plan.sequences // (run.cfg.train.micro_batch_size * run.grid.dp_size)
    with spans.span("compute"):
        source = spans.waiting("data", batches)
        out = run.executor.run(source, count, 1.0 / plan.tokens, plan.mtp_weight, on_chunk_done=run.engine.reduce)
    sums = out.pack()
    figures = torch.cat([sums, bias_ranges(run.model, run.grid), votes.to(run.device, non_blocking=True)])
    if run.grid.world_size > 1:
        with spans.span("comm_exposed"):
            dist.all_reduce(figures)
    n_moe = out.entropy.numel()
    with spans.span("optimizer"):
        stats = run.engine.finish_step(plan.lr)
        counts = StepOut.unpack(figures[: sums.numel()], n_moe).counts
        skipped = stats.skipped.double()
        run.model.update_biases(counts, plan.bias_speed * (1 - skipped))
        if run.ema is not None:
            run.ema.update()
    figures = torch.cat([figures, stats.norm.double().view(1), skipped.view(1)])
    host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=figures.is_cuda)
    host.copy_(figures, non_blocking=True)
    clock.stop()
    return StepRecord(
        plan, clock, host, n_moe, votes.numel(), spans, run.executor.take_timeline(), run.model.dispatcher.take_load()
    )
