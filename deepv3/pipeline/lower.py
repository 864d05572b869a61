"""Adds what moves between ranks to lists of compute: SEND, RECV and FREE on the channels ``act`` and ``grad``.

A *link* is one channel between two ranks, and serves both senses: DualPipe and DualPipeV send activations up and down
between the same neighbours. Only this is taken for granted of a link: the operations posted on it run one after the
other, and an operation is over when both ranks have come to it (NCCL's send and receive on one communicator; gloo asks
for less). So both ranks must post a link's messages in one order, also where one sends and then receives while the
other does the opposite. The order is that in which the tensors become ready in a dry run. A pair's two results leave on
two different links, hence whichever is ready first may go first (two communicators between the same ranks).

1. Dry-run the compute (``timeline``); order all messages by the time their tensor is ready, ties by rank.
2. SEND stands right after the step that makes the tensor. RECV stands ``ahead`` steps before the step that needs it, so
   that the message travels while the rank computes; later if an earlier message of the link is sent later, and earlier
   if a later message of the link is posted earlier.
3. FREE stands where the transfer is over in the dry run, and no less than ``ahead`` steps after SEND, so that it waits
   little if at all.

Why this cannot deadlock, whatever the real times are: every wait points to something that came earlier or at the same
time in the dry run, so the waits form no circle. A stage and its neighbour on one rank (the bottom of the V, or one
rank in all) hand tensors over in place: no message, and the tensor stays until the neighbour's backward is done.
"""

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import TypeAlias

from deepv3.pipeline.actions import FORWARD, WEIGHT_GRAD, Action, Channel, Pair, Step, Transfer, parts
from deepv3.pipeline.dryrun import UNIT_COSTS, Times, timeline
from deepv3.pipeline.schedule import Schedule

Link: TypeAlias = tuple[Channel, int, int]
"""(channel, lower rank, higher rank)"""


def link_of(channel: Channel, one: int, other: int) -> Link:
    """The link of a channel between two ranks, whichever is named first."""
    return (channel, min(one, other), max(one, other))


@dataclass
class _Message:
    """A tensor on its way. made, used: positions of the steps that make and need it; post: where RECV stands."""

    channel: Channel
    source: int
    target: int
    send: Transfer
    recv: Transfer
    ready: float
    made: int
    used: int = -1
    post: int = -1
    free: int = -1

    @property
    def link(self) -> Link:
        return link_of(self.channel, self.source, self.target)


def channel_of(action: Action) -> Channel:
    """Where an action's result travels."""
    return "act" if action.kind == FORWARD else "grad"


def consumer(action: Action) -> tuple[Channel, int, int]:
    """What names the tensor an action makes: its channel, the stage that needs it, its micro-batch."""
    return (channel_of(action), action.stage + (1 if action.kind == FORWARD else -1), action.micro_batch)


def _messages(schedule: Schedule, spans: list[list[tuple[float, float]]]) -> list[_Message]:
    """All messages in the order in which they become ready; ties go by rank, then by position in the list."""
    found: dict[tuple[Channel, int, int], _Message] = {}
    used: dict[tuple[Channel, int, int], int] = {}
    for rank in range(schedule.ranks):
        for position, step in enumerate(schedule.compute(rank)):
            for action in parts(step):
                if action.kind == WEIGHT_GRAD:
                    continue
                kind, stage, micro_batch, direction = action
                channel = channel_of(action)
                used[(channel, stage, micro_batch)] = position
                target = schedule.target(action)
                if target is None or target == rank:
                    continue
                to_stage = consumer(action)[1]
                found[consumer(action)] = _Message(
                    channel,
                    rank,
                    target,
                    Transfer("SEND", channel, stage, micro_batch, direction, target),
                    Transfer("RECV", channel, to_stage, micro_batch, direction, rank),
                    spans[rank][position][1],
                    position,
                )
    for key, message in found.items():
        message.used = used[key]
    return sorted(found.values(), key=lambda message: (message.ready, message.source, message.made))


def _place_receives(messages: list[_Message], ahead: int) -> None:
    """Fill in ``post``. A position p means: before step p of the rank's compute; SEND stands at made + 1."""
    latest_send: dict[tuple[Link, int], int] = {}
    for message in messages:  # not before an earlier message of the link leaves
        floor = latest_send.get((message.link, message.target), 0)
        message.post = max(message.used - ahead, floor)
        assert message.post <= message.used, "a message is needed after all that were ready before it"
        latest_send[(message.link, message.source)] = message.made + 1
    bound: dict[tuple[Link, int], int] = {}
    for message in reversed(messages):  # not after a later message of the link is posted
        here, there = (message.link, message.target), (message.link, message.source)
        message.post = min(message.post, bound.get(here, message.post))
        bound[here] = message.post
        bound[there] = message.made + 1


def _place_frees(messages: list[_Message], spans: list[list[tuple[float, float]]], costs: Times, ahead: int) -> None:
    """Fill in ``free``: the first position before which the transfer is over and ``ahead`` steps have passed."""
    ends = [[end for _, end in rank] for rank in spans]
    over: dict[Link, float] = {}
    for message in messages:
        posted = ends[message.target][message.post - 1] if message.post else 0.0
        start = max(message.ready, posted, over.get(message.link, 0.0))
        over[message.link] = done = start + costs(message.send)
        reached = max(bisect_left(ends[message.source], done) + 1, message.made + 1 + ahead)
        message.free = min(reached, len(ends[message.source]))


def lower(schedule: Schedule, costs: Times = UNIT_COSTS, ahead: int = 1) -> Schedule:
    """The same lists with transfers.

    costs: times of the dry run that orders the messages; the same on all ranks. ahead: compute steps, >= 0, by which a
    receive is posted before its tensor is needed and a send before it is waited for. Raises ScheduleError if the lists
    deadlock.
    """
    assert not schedule.lowered, "transfers are added once"
    spans = timeline(schedule, costs)
    messages = _messages(schedule, spans)
    _place_receives(messages, ahead)
    _place_frees(messages, spans, costs, ahead)
    # Posts keep the common order, frees come last: what they wait for is posted by then.
    posts: list[dict[int, list[Transfer]]] = [{} for _ in range(schedule.ranks)]
    for message in messages:
        posts[message.source].setdefault(message.made + 1, []).append(message.send)
        posts[message.target].setdefault(message.post, []).append(message.recv)
    for message in messages:
        posts[message.source].setdefault(message.free, []).append(message.send._replace(kind="FREE"))
    lists: list[tuple[Step, ...]] = []
    for rank in range(schedule.ranks):
        steps: list[Step] = []
        computes: list[Action | Pair] = list(schedule.compute(rank))
        for position, step in enumerate(computes):
            steps += posts[rank].get(position, [])
            steps.append(step)
        lists.append((*steps, *posts[rank].get(len(computes), [])))
    return replace(schedule, actions=tuple(lists), lowered=True)
