"""What must hold for one rank's list, whatever the other ranks do, and the memory it needs.

In the order of the list:
1. every action belongs there: stage, direction and micro-batch exist and are this rank's;
2. per chunk one F, and one full backward or one I and one W; none missing at the end;
3. per stage, forwards, backwards and weight gradients each in ascending order of micro-batch, so that sums over
   micro-batches are those of one process; W takes the oldest of the stage's queue;
4. what comes from another rank has its RECV before its use, what goes to another its SEND after it is made, every SEND
   its FREE. Skipped while the list has no transfers yet.
"""

from collections import deque
from typing import NamedTuple, TypeAlias

from deepv3.errors import ScheduleError
from deepv3.pipeline.actions import (
    BACKWARD,
    FORWARD,
    INPUT_GRAD,
    WEIGHT_GRAD,
    Action,
    Channel,
    Pair,
    Step,
    Transfer,
    parts,
)
from deepv3.pipeline.dryrun import describe, made, needed
from deepv3.pipeline.lower import Link, channel_of, consumer, link_of
from deepv3.pipeline.schedule import Schedule

Tensor: TypeAlias = tuple[Channel, int, int]
"""A tensor that travels: (channel, stage that needs it, micro-batch)."""

_WORDS = {FORWARD: "F", INPUT_GRAD: "B or I", WEIGHT_GRAD: "weight gradient"}


class Post(NamedTuple):
    """A SEND or RECV as its link sees it: what it moves, and where in the list it stands."""

    step: Transfer
    tensor: Tensor
    position: int


class Peaks(NamedTuple):
    """Most of each at one time: chunks between F and B or I, between F and B or W, waiting W, message tensors."""

    live: int
    kept: int
    deferred: int
    buffers: int


LIVE, KEPT, DEFERRED, BUFFERS = range(4)


class RankWalk:
    """Walks one rank's list. Afterwards ``peaks`` has the memory, ``links`` the posts of each link in order."""

    def __init__(self, schedule: Schedule, rank: int):
        self.schedule, self.rank = schedule, rank
        self.position = -1
        self.step: Step | None = None
        self.next: dict[tuple[str, int, int], int] = {}  # (F, I or W; stage; direction) -> micro-batch that is due
        self.queues: dict[tuple[int, int], deque[int]] = {}  # (stage, direction) -> micro-batches that wait for W
        self.done: set[object] = set()
        self.received: set[Tensor] = set()
        self.to_send: set[Tensor] = set()
        self.sent: set[Tensor] = set()
        self.freed: set[Tensor] = set()
        self.now, self.most = [0, 0, 0, 0], [0, 0, 0, 0]  # as in Peaks
        self.links: dict[Link, list[Post]] = {}

    def fail(self, why: str) -> ScheduleError:
        """The error of the action under inspection."""
        return ScheduleError(f"rank {self.rank}, action {self.position} ({self.step}): {why}")

    def run(self) -> "RankWalk":
        """Check the whole list; raises ScheduleError."""
        for position, step in enumerate(self.schedule.actions[self.rank]):
            self.position, self.step = position, step
            if isinstance(step, Transfer):
                self._transfer(step)
            else:
                self._compute(step)
        self._nothing_missing()
        return self

    @property
    def peaks(self) -> Peaks:
        """The memory of the whole list."""
        return Peaks(*self.most)

    def _hold(self, what: int, more: int) -> None:
        self.now[what] += more
        if self.now[what] > self.most[what]:
            self.most[what] = self.now[what]

    def _compute(self, step: Action | Pair) -> None:
        actions = parts(step)
        for action in actions:
            self._belongs(action)
            self._in_turn(action)
            self._has_inputs(action)
        for action in actions:  # a pair's forward is kept before its backward lets go
            self._keep(action)
        for action in actions:
            self._let_go(action)

    def _belongs(self, action: Action) -> None:
        kind, stage, micro_batch, direction = action
        s = self.schedule
        if not (0 <= stage < s.stages and 0 <= micro_batch < s.micro_batches):
            raise self.fail(f"there are {s.stages} stages and {s.micro_batches} micro-batches")
        way = s.direction(micro_batch)
        if direction != way or s.routes[way][stage] != self.rank:
            raise self.fail(f"chunk {stage}.{micro_batch} goes in direction {way}, on rank {s.routes[way][stage]}")
        if s.forward_only and kind != FORWARD:
            raise self.fail("the schedule is forward only")

    def _in_turn(self, action: Action) -> None:
        kind, stage, micro_batch, direction = action
        for series in (INPUT_GRAD, WEIGHT_GRAD) if kind == BACKWARD else (kind,):
            key = (series, stage, direction)
            due = self.next.get(key, self.schedule.reverse_from if direction else 0)
            if micro_batch != due:
                raise self.fail(f"the next {_WORDS[series]} of stage {stage} is due for micro-batch {due}, each once")
            self.next[key] = due + 1

    def _has_inputs(self, action: Action) -> None:
        kind, stage, micro_batch, direction = action
        if kind == WEIGHT_GRAD:
            if not self.queues.get((stage, direction)):
                raise self.fail(f"waits for I{stage}.{micro_batch}, which comes later in this list")
            return
        if kind != FORWARD and (FORWARD, stage, micro_batch) not in self.done:
            raise self.fail(f"waits for F{stage}.{micro_batch}, which comes later in this list")
        source = self.schedule.source(action)
        if source == self.rank:
            for need in needed(self.schedule, action):
                if need not in self.done:
                    raise self.fail(f"waits for {describe(need)}, which comes later in this list")
        elif source is not None and self.schedule.lowered:
            channel = channel_of(action)
            if (channel, stage, micro_batch) not in self.received:
                raise self.fail(f"waits for a message on {channel} from rank {source} that no RECV before it takes in")
            self._hold(BUFFERS, -1)

    def _keep(self, action: Action) -> None:
        kind, stage, micro_batch, direction = action
        self.done.add(made(action))
        if kind == FORWARD and not self.schedule.forward_only:
            self._hold(LIVE, 1)
            self._hold(KEPT, 1)
        if kind == INPUT_GRAD:
            self.queues.setdefault((stage, direction), deque()).append(micro_batch)
            self._hold(DEFERRED, 1)
        if kind != WEIGHT_GRAD and self.schedule.target(action) not in (None, self.rank):
            self.to_send.add(consumer(action))
            self._hold(BUFFERS, int(self.schedule.lowered))

    def _let_go(self, action: Action) -> None:
        kind, stage, _, direction = action
        if kind == BACKWARD:
            self._hold(LIVE, -1)
            self._hold(KEPT, -1)
        elif kind == INPUT_GRAD:
            self._hold(LIVE, -1)
        elif kind == WEIGHT_GRAD:
            self.queues[(stage, direction)].popleft()
            self._hold(KEPT, -1)
            self._hold(DEFERRED, -1)

    def _transfer(self, step: Transfer) -> None:
        kind, channel, stage, micro_batch, direction, peer = step
        action = Action(FORWARD if channel == "act" else BACKWARD, stage, micro_batch, direction)
        self._belongs(action)
        incoming = kind == "RECV"
        other = self.schedule.source(action) if incoming else self.schedule.target(action)
        if other != peer or other == self.rank:
            end = "nowhere" if other is None else f"rank {other}"
            raise self.fail(f"the other end of this tensor is {end}, this is rank {self.rank}")
        tensor: Tensor = (channel, stage, micro_batch) if incoming else consumer(action)
        known = {"RECV": self.received, "SEND": self.sent, "FREE": self.freed}[kind]
        if tensor in known:
            raise self.fail("stands in the list twice")
        if kind == "SEND" and tensor not in self.to_send:
            raise self.fail(f"waits for {describe(made(action))}, which comes later in this list")
        if kind == "FREE" and tensor not in self.sent:
            raise self.fail("gives back what no SEND before it has sent")
        known.add(tensor)
        if kind == "FREE":
            self._hold(BUFFERS, -1)
            return
        self._hold(BUFFERS, int(incoming))
        self.links.setdefault(link_of(channel, self.rank, peer), []).append(Post(step, tensor, self.position))

    def _nothing_missing(self) -> None:
        s = self.schedule
        for direction, route in enumerate(s.routes):
            first, stop = (s.reverse_from, s.micro_batches) if direction else (0, s.reverse_from)
            for stage in (stage for stage, rank in enumerate(route) if rank == self.rank):
                for series in (FORWARD,) if s.forward_only else (FORWARD, INPUT_GRAD, WEIGHT_GRAD):
                    due = self.next.get((series, stage, direction), first)
                    if due != stop:
                        raise ScheduleError(
                            f"rank {self.rank}: its list ends without the {_WORDS[series]} of {stage}.{due}"
                        )
        if not s.lowered:
            return
        for known, what in ((self.sent, "SEND"), (self.freed, "FREE")):
            for channel, stage, micro_batch in sorted(self.to_send - known):
                raise ScheduleError(
                    f"rank {self.rank}: its list ends without a {what} on {channel} of what {stage}.{micro_batch} needs"
                )
