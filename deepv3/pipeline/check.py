"""Proves lists of actions before anything runs them.

1. Each rank's list alone (``walk``): belonging, exactly once, ascending, inputs, sends, frees, memory.
2. Each link: both ends post the same messages in the same order.
3. All ranks together, dry: the run ends. Assumed: SEND and RECV do not wait; the operations of a link, which serves
   both senses, run one after the other, each when both ends have posted it; compute waits for the receives it needs
   and FREE for its send; a rank does one thing at a time.

What passes 3 also runs where sends are buffered, or where the two senses of a link do not wait for each other: both
only take waits away. Everything that fails is a ScheduleError that names rank, position and action, and what it waits
for.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest

from deepv3.errors import ScheduleError
from deepv3.pipeline.actions import BACKWARD, FORWARD, WEIGHT_GRAD, Action, Pair, Step, Transfer, parts
from deepv3.pipeline.dryrun import UNIT_COSTS, Event, Run, Task, Times, describe, made, needed, simulate
from deepv3.pipeline.lower import Link, channel_of, consumer, lower
from deepv3.pipeline.schedule import Schedule
from deepv3.pipeline.walk import Peaks, RankWalk, Tensor


@dataclass(frozen=True)
class Report:
    """What the dry run found. Tuples go by rank, times are in the unit of the costs.

    schedule: the lowered lists. makespan: time until the last rank is done. spans: per compute step, in the order of
    the list, (step, start, end). peaks: see ``Peaks``.
    """

    schedule: Schedule
    makespan: float
    spans: tuple[tuple[tuple[Action | Pair, float, float], ...], ...]
    peaks: tuple[Peaks, ...]

    @property
    def busy(self) -> tuple[float, ...]:
        """Time in compute steps."""
        return tuple(sum(end - start for _, start, end in spans) for spans in self.spans)

    @property
    def bubble(self) -> tuple[float, ...]:
        """Idle time, from the common start to the end of the last rank."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def bubble_share(self) -> float:
        """Idle time over all time, all ranks together."""
        return sum(self.bubble) / (self.makespan * len(self.spans))

    def counts(self, rank: int) -> Counter[str]:
        """Compute steps by kind: F, B, I, W outside of pairs, and F&B."""
        return Counter("F&B" if isinstance(step, Pair) else step.kind for step, _, _ in self.spans[rank])

    def summary(self) -> str:
        """A table for people: the whole, what falls short, one line per rank."""
        s = self.schedule
        lines = [
            f"{s.name}: {s.ranks} ranks, {s.stages} stages, {s.micro_batches} micro-batches; "
            f"time {self.makespan:g}, bubble {self.bubble_share:.1%}",
            *s.notes,
            "rank    busy    idle  live  kept  buffers  steps",
        ]
        for rank, (busy, idle, peak) in enumerate(zip(self.busy, self.bubble, self.peaks)):
            steps = ", ".join(f"{kind} {number}" for kind, number in sorted(self.counts(rank).items()))
            lines.append(f"{rank:4d} {busy:7g} {idle:7g} {peak.live:5d} {peak.kept:5d} {peak.buffers:8d}  {steps}")
        return "\n".join(lines)


def _match_links(schedule: Schedule, walks: list[RankWalk]) -> dict[Link, list[tuple[Tensor, Transfer]]]:
    """Hold the two ends of every link against each other; returns its tensors in order, with their SENDs."""
    matched: dict[Link, list[tuple[Tensor, Transfer]]] = {}
    for link in sorted({link for walk in walks for link in walk.links}):
        channel, low, high = link
        posts = zip_longest(walks[low].links.get(link, ()), walks[high].links.get(link, ()))
        for number, (here, there) in enumerate(posts):
            if not (here and there and here.step.kind != there.step.kind and here.tensor == there.tensor):
                ends = [
                    f"rank {rank} has {f'action {post.position} ({post.step})' if post else 'nothing'}"
                    for rank, post in ((low, here), (high, there))
                ]
                raise ScheduleError(f"message {number} on {channel} does not match: {ends[0]}, {ends[1]}")
            send = here.step if here.step.kind == "SEND" else there.step
            matched.setdefault(link, []).append((here.tensor, send))
    return matched


def _task(schedule: Schedule, rank: int, step: Step, costs: Times) -> Task:
    """A rank's step. Events: a chunk's result by name; ("SEND" | "RECV" | "over", tensor) for messages."""
    if isinstance(step, Transfer):
        action = Action(FORWARD if step.channel == "act" else BACKWARD, step.stage, step.micro_batch)
        tensor = (step.channel, step.stage, step.micro_batch) if step.kind == "RECV" else consumer(action)
        return Task((("over", tensor),), (), 0.0) if step.kind == "FREE" else Task((), ((step.kind, tensor),), 0.0)
    needs: list[Event] = []
    for action in parts(step):
        source = schedule.source(action)
        if source == rank:
            needs += needed(schedule, action)
        elif source is not None and action.kind != WEIGHT_GRAD:
            needs.append(("over", (channel_of(action), action.stage, action.micro_batch)))
    return Task(tuple(needs), tuple(map(made, parts(step))), costs(step))


def _stuck(schedule: Schedule, run: Run, links: list[Link]) -> ScheduleError:
    """Who waits for what, for every rank that cannot go on."""
    lines = []
    for process, event in sorted(run.stuck.items()):
        kind, subject = event[0], event[1]
        position = len(run.spans[process])
        if process >= schedule.ranks:
            channel, low, high = links[process - schedule.ranks]
            lines.append(f"{channel} between ranks {low} and {high} waits for the {kind} of message {position}")
            continue
        what = "the message {} {}.{}".format(*subject) if kind == "over" else describe(event)
        lines.append(f"rank {process}, action {position} ({schedule.actions[process][position]}): waits for {what}")
    return ScheduleError("deadlock: " + "; ".join(lines))


def check(schedule: Schedule, costs: Times = UNIT_COSTS) -> Report:
    """Prove a schedule and measure it. One that is not lowered yet is lowered with the same costs.

    Raises ScheduleError; see the module for what is proved and what is assumed.
    """
    if not schedule.lowered:
        for rank in range(schedule.ranks):
            RankWalk(schedule, rank).run()
        schedule = lower(schedule, costs)
    walks = [RankWalk(schedule, rank).run() for rank in range(schedule.ranks)]
    matched = _match_links(schedule, walks)
    processes = [[_task(schedule, rank, step, costs) for step in steps] for rank, steps in enumerate(schedule.actions)]
    processes += [
        [Task((("SEND", tensor), ("RECV", tensor)), (("over", tensor),), costs(send)) for tensor, send in messages]
        for messages in matched.values()
    ]
    run = simulate(processes)
    if run.stuck:
        raise _stuck(schedule, run, list(matched))
    spans = tuple(
        tuple((step, *span) for step, span in zip(steps, run.spans[rank]) if not isinstance(step, Transfer))
        for rank, steps in enumerate(schedule.actions)
    )
    makespan = max(end for rank in run.spans for _, end in rank)
    return Report(schedule, makespan, spans, tuple(walk.peaks for walk in walks))
