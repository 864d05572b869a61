"""Running processes on paper: each does its steps in order, a step starts when all it needs is there.

Ranks are processes, and so is every message link. Because a process only ever waits for named events, the times do not
depend on the order in which processes are looked at (a Kahn network), so one pass over a work list finds them: cost
linear in the number of steps and needs. ``Costs`` are the times of compute steps and messages, in any unit.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from deepv3.errors import ScheduleError
from deepv3.pipeline.actions import FORWARD, INPUT_GRAD, WEIGHT_GRAD, Action, Pair, Transfer, parts
from deepv3.pipeline.schedule import Schedule

Event: TypeAlias = tuple[Any, ...]
"""What a process can wait for: (kind, stage, micro-batch) for a chunk's result, or any other tuple."""
Times: TypeAlias = Callable[[Action | Pair | Transfer], float]
"""Duration of a compute step, or of a message given its SEND; compute takes > 0, a message >= 0."""


@dataclass(frozen=True)
class Costs:
    """The same times for every stage: F, I, W, one message. B takes I + W; a pair F + I + W if it is not given."""

    forward: float = 1.0
    input_grad: float = 1.0
    weight_grad: float = 1.0
    pair: float | None = None
    message: float = 0.0

    def __call__(self, step: Action | Pair | Transfer) -> float:
        """The time of one step; any other callable of this form, such as one that knows the stages, serves as well."""
        if isinstance(step, Pair):
            return self.forward + self.input_grad + self.weight_grad if self.pair is None else self.pair
        if isinstance(step, Transfer):
            return self.message
        if step.kind == FORWARD:
            return self.forward
        if step.kind == INPUT_GRAD:
            return self.input_grad
        return self.weight_grad if step.kind == WEIGHT_GRAD else self.input_grad + self.weight_grad


UNIT_COSTS = Costs()
"""The report's unit picture: F = I = W = 1, so B = 2 and F&B = 3, messages free."""


class Task(NamedTuple):
    """One step of a process: it waits for ``needs``, lasts ``cost``, then ``gives``."""

    needs: tuple[Event, ...]
    gives: tuple[Event, ...]
    cost: float


class Run(NamedTuple):
    """spans: [process][task done] = (start, end). times: when each event came. stuck: process -> event it waits for."""

    spans: list[list[tuple[float, float]]]
    times: dict[Event, float]
    stuck: dict[int, Event]


def simulate(processes: Sequence[Sequence[Task]]) -> Run:
    """Run all processes until none can go on."""
    times: dict[Event, float] = {}
    spans: list[list[tuple[float, float]]] = [[] for _ in processes]
    clock = [0.0] * len(processes)
    waiting: dict[Event, list[int]] = {}
    stuck: dict[int, Event] = {}
    ready = deque(range(len(processes)))
    while ready:
        process = ready.popleft()
        tasks, done = processes[process], spans[process]
        stuck.pop(process, None)
        now = clock[process]
        while len(done) < len(tasks):
            needs, gives, cost = tasks[len(done)]
            start = now
            for need in needs:
                if need not in times:
                    waiting.setdefault(need, []).append(process)
                    stuck[process] = need
                    break
                start = max(start, times[need])
            else:
                now = start + cost
                done.append((start, now))
                for event in gives:
                    times[event] = now
                    if event in waiting:
                        ready.extend(waiting.pop(event))
                continue
            break
        clock[process] = now
    return Run(spans, times, stuck)


def made(action: Action) -> Event:
    """The event that an action's result exists: outputs of F, input gradients of B and I alike, W for itself."""
    kind = action.kind if action.kind in (FORWARD, WEIGHT_GRAD) else INPUT_GRAD
    return (kind, action.stage, action.micro_batch)


def needed(schedule: Schedule, action: Action) -> tuple[Event, ...]:
    """The one event an action waits for; none where tokens are at hand.

    F: F one stage earlier. B, I: the input gradient one stage later, or F of the last stage itself. W: its I.
    """
    kind, stage, micro_batch, _ = action
    if kind == FORWARD:
        return ((FORWARD, stage - 1, micro_batch),) if stage else ()
    if kind == WEIGHT_GRAD:
        return ((INPUT_GRAD, stage, micro_batch),)
    last = stage == schedule.stages - 1
    return ((FORWARD, stage, micro_batch) if last else (INPUT_GRAD, stage + 1, micro_batch),)


def describe(event: Event) -> str:
    """An event of ``made`` in words."""
    kind, stage, micro_batch = event
    return f"the backward of {stage}.{micro_batch}" if kind == INPUT_GRAD else f"{kind}{stage}.{micro_batch}"


def timeline(schedule: Schedule, costs: Times) -> list[list[tuple[float, float]]]:
    """[rank][position among the compute steps] = (start, end), with messages that take no time.

    Raises ScheduleError if the lists wait for each other for ever.
    """
    programs = [
        [
            Task(
                tuple(need for action in parts(step) for need in needed(schedule, action)),
                tuple(map(made, parts(step))),
                costs(step),
            )
            for step in schedule.compute(rank)
        ]
        for rank in range(schedule.ranks)
    ]
    run = simulate(programs)
    if run.stuck:
        rank = min(run.stuck)
        position = len(run.spans[rank])
        step = list(schedule.compute(rank))[position]
        raise ScheduleError(
            f"rank {rank}, action {position} ({step}): waits for {describe(run.stuck[rank])} for ever; stuck are ranks "
            f"{sorted(run.stuck)}"
        )
    return run.spans
