"""Runs one rank's checked action list against its stages; it knows no optimizer.

One small method per action. Activations are given back as soon as the schedule allows: a stage's input with its
backward, its output when the next rank has it. Weight gradients of an I wait in their stage's queue until its W. The
host waits for nothing on the device, except for the counts of a portable expert dispatch.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deepv3.config.schema import Config
from deepv3.data.loader import Batch
from deepv3.dist import Grid
from deepv3.model.transformer import Transformer, moe_layers
from deepv3.pipeline.actions import (
    BACKWARD,
    FORWARD,
    INPUT_GRAD,
    WEIGHT_GRAD,
    Action,
    Pair,
    Step,
    Transfer,
    parts,
)
from deepv3.pipeline.check import check
from deepv3.pipeline.figures import StepOut
from deepv3.pipeline.lanes import Lanes
from deepv3.pipeline.lower import channel_of, consumer, lower
from deepv3.pipeline.overlap import Walk, interleave
from deepv3.pipeline.p2p import Key, Mailbox
from deepv3.pipeline.schedule import Schedule, forward_only, make_schedule
from deepv3.pipeline.stage import Scales, Stage, Tape
from deepv3.pipeline.timeline import WAITING, Timeline

Done = Callable[[int], None]


class _Feed:
    """Micro-batches by number; fetched in order as far as asked for."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._source: Iterator[Batch] = iter(batches)
        self._seen: list[Batch] = []

    def __getitem__(self, number: int) -> Batch:
        while len(self._seen) <= number:
            self._seen.append(next(self._source))
        return self._seen[number]


@dataclass
class _Pass:
    """One walk over the list: what it reads, sums up and still has to do."""

    feed: _Feed
    scales: Scales
    total: StepOut
    tapes: dict[tuple[int, int], Tape]
    left: dict[int, int]  # weight gradients that a stage still lacks
    done: Done


class Executor:
    """The pipeline executor of one rank. stages: the parts of the rank's model, by stage number."""

    def __init__(self, model: Transformer, stages: dict[int, Stage], cfg: Config, grid: Grid) -> None:
        self.model, self.stages, self.grid, self.cfg = model, stages, grid, cfg
        self.device, self.rank = grid.device, grid.pp_rank
        self.chunks = {stage: chunk for chunk, stage in enumerate(sorted(stages))}
        self.mail = Mailbox(grid)
        self.lanes = Lanes(self.device)
        self._schedules: dict[tuple[int, bool], Schedule] = {}
        self._run = {
            FORWARD: self._forward,
            BACKWARD: self._backward,
            INPUT_GRAD: self._input,
            WEIGHT_GRAD: self._weight,
        }
        self._move = {"SEND": self._send, "RECV": self._receive, "FREE": self._free}
        self.now: _Pass | None = None

    def schedule(self, count: int, training: bool = True) -> Schedule:
        """The proved list for a number of micro-batches, made once."""
        if (count, training) not in self._schedules:
            parallel = self.cfg.parallel
            made = make_schedule(parallel.schedule, parallel.pp_size, count, parallel.strict and training)
            made = lower(made if training else forward_only(made))
            check(made)
            self._schedules[count, training] = made
        return self._schedules[count, training]

    def run(
        self, batches: Iterable[Batch], count: int, loss_scale: float, mtp_weight: float, on_chunk_done: Done
    ) -> StepOut:
        """One step. batches: this data rank's `count` micro-batches, the same ones on every rank of the pipeline.

        loss_scale: 1 / (trained tokens of the global batch) (V3 Eq. 24-25). on_chunk_done(chunk): called when the last
        weight gradient of a chunk is enqueued; chunks are this rank's stages, ascending.
        """
        return self._walk(self.schedule(count), batches, Scales(loss_scale, mtp_weight), on_chunk_done)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], count: int, loss_scale: float) -> StepOut:
        """The same sums without gradients, through the same pipeline."""
        self.model.eval()
        out = self._walk(self.schedule(count, training=False), batches, Scales(loss_scale, 0.0), lambda chunk: None)
        self.model.train()
        self.take_timeline()  # the next step reports its own time and load
        self.model.dispatcher.take_load()
        return out

    def take_timeline(self) -> Timeline:
        """What communication was hidden and how long this rank waited, since the last call."""
        return self.lanes.take_timeline()

    def _walk(self, schedule: Schedule, batches: Iterable[Batch], scales: Scales, done: Done) -> StepOut:
        left = dict.fromkeys(self.stages, 0)
        for step in schedule.compute(self.rank):
            for action in parts(step):
                left[action.stage] += action.kind in (BACKWARD, WEIGHT_GRAD)
        total = StepOut.zeros(moe_layers(self.model.cfg), self.model.cfg.n_routed_experts, self.device)
        self.routes, self.now = schedule, _Pass(_Feed(batches), scales, total, {}, left, done)
        for stage in (stage for stage, lacks in left.items() if not lacks):
            done(self.chunks[stage])  # no micro-batch comes here; its twin's gradients wait for ours
        for item in schedule.actions[self.rank]:
            self._step(item)
        assert not self.now.tapes, f"micro-batches without a backward: {[*self.now.tapes]}"
        self.mail.check_empty()
        assert not any(len(stage.queue) for stage in self.stages.values()), "weight gradients are left in a queue"
        self.now = None
        return total

    def _step(self, step: Step) -> None:
        if isinstance(step, Transfer):
            self._move[step.kind](step)
        elif isinstance(step, Pair):
            self._pair(step)
        else:
            self._run[step.kind](step)

    # -- compute -----------------------------------------------------------------------------------------------------

    def _forward(self, action: Action) -> None:
        tape = self._begin(action)
        self.lanes.walk(self.stages[action.stage].forward(tape)).finish()
        self._hand_on(action, tape)

    def _backward(self, action: Action) -> None:
        stage = self.stages[action.stage]
        stage.queue.deferring = False
        self._backward_walk(action).finish()
        self._finish_backward(action)
        self._count(action.stage)

    def _input(self, action: Action) -> None:
        stage = self.stages[action.stage]
        stage.queue.deferring = True
        self._backward_walk(action).finish()
        stage.queue.close()
        self._finish_backward(action)

    def _weight(self, action: Action) -> None:
        self.lanes.timed(self.stages[action.stage].queue.pop)
        self._count(action.stage)

    def _pair(self, pair: Pair) -> None:
        tape = self._begin(pair.forward)
        queue = self.stages[pair.backward.stage].queue
        queue.deferring = True
        forward = self.lanes.walk(self.stages[pair.forward.stage].forward(tape))
        interleave(forward, self._backward_walk(pair.backward), lambda: self.lanes.timed(queue.run_open))
        self._hand_on(pair.forward, tape)
        self._finish_backward(pair.backward)
        self._count(pair.backward.stage)

    def _begin(self, action: Action) -> Tape:
        assert self.now is not None
        stage, key = self.stages[action.stage], ("act", action.stage, action.micro_batch)
        x = None if self.routes.source(action) is None else self._receive_for(key)  # type: ignore[arg-type]
        tape = stage.begin(self.now.feed[action.micro_batch], self.now.scales, x)
        self.now.tapes[action.stage, action.micro_batch] = tape
        return tape

    def _receive_for(self, key: Key) -> Tensor:
        start = self.lanes.timeline.mark()
        tensor = self.mail.take(key)
        self.lanes.timeline.add(WAITING, start, self.lanes.timeline.mark())
        return tensor

    def _hand_on(self, action: Action, tape: Tape) -> None:
        assert self.now is not None
        self.lanes.join()
        self.now.total.add_(self.stages[action.stage].figures(tape))
        if self.routes.target(action) is not None:
            self.mail.put(consumer(action), tape.take())
        if self.routes.forward_only:
            del self.now.tapes[action.stage, action.micro_batch]

    def _backward_walk(self, action: Action) -> Walk:
        assert self.now is not None
        dy = (
            None
            if self.routes.source(action) is None
            else self._receive_for(("grad", action.stage, action.micro_batch))
        )
        tape = self.now.tapes[action.stage, action.micro_batch]
        return self.lanes.walk(self.stages[action.stage].backward(tape, dy))

    def _finish_backward(self, action: Action) -> None:
        assert self.now is not None
        self.lanes.join()
        dx = self.now.tapes.pop((action.stage, action.micro_batch)).dx
        if self.routes.target(action) is not None:
            assert dx is not None
            self.mail.put(consumer(action), dx)

    def _count(self, stage: int) -> None:
        assert self.now is not None
        self.now.left[stage] -= 1
        if not self.now.left[stage]:
            self.now.done(self.chunks[stage])

    # -- transfers ---------------------------------------------------------------------------------------------------

    def _sent(self, step: Transfer) -> Key:
        kind = FORWARD if step.channel == channel_of(Action(FORWARD, 0, 0)) else BACKWARD
        return consumer(Action(kind, step.stage, step.micro_batch, step.direction))

    def _send(self, step: Transfer) -> None:
        self.mail.send(self._sent(step), step)

    def _free(self, step: Transfer) -> None:
        self.mail.free(self._sent(step))

    def _receive(self, step: Transfer) -> None:
        assert self.now is not None
        batch = self.now.feed[step.micro_batch]
        rows = batch.tokens.shape[0] * self.stages[step.stage].seq_len(batch)
        dtype = next(self.model.parameters()).dtype
        like = ((rows, self.model.cfg.hidden_size), dtype, self.device)
        self.mail.receive((step.channel, step.stage, step.micro_batch), step, like)
