"""What a pipeline rank does, as data: chunks of compute, pairs of them, and transfers.

Words. A *stage* is a consecutive part of the model, numbered in the model's order. A *micro-batch* is numbered within
one pipeline and one step, over both directions. *Direction* 1 is DualPipe's second stream, which enters at the last
rank; every other schedule has direction 0 only. Per chunk (stage, micro-batch) there is

    F   forward                                             needs the output of F one stage earlier
    B   full backward                                       needs the input gradient of B or I one stage later
    I   backward for the input alone; its weight gradient waits in the stage's queue         needs what B needs
    W   the weight gradient that I left behind              needs I of the same chunk
    F&B one forward and one backward of different micro-batches, overlapped (V3 3.2.1)

and, added by ``lower``, on the channels ``act`` (outputs of F) and ``grad`` (input gradients):

    SEND  posts the asynchronous send of this rank's finished tensor
    RECV  posts the receive; whoever needs the tensor waits for it, the post does not
    FREE  waits until the send is complete and gives the tensor's memory back

B and W release the rest of what the chunk kept, I all that W does not need; no action says so. The text of an action is
``F0.5`` (stage 0, micro-batch 5), ``F0.5&B3.2``, ``SEND act 0.5 > 1`` (to rank 1), ``RECV grad 3.2 < 1`` (from rank 1),
``FREE act 0.5 | 1`` (sent to rank 1); an ``r`` after the micro-batch marks direction 1.
"""

import re
from typing import Literal, NamedTuple, TypeAlias

from deepv3.errors import ScheduleError

FORWARD: Literal["F"] = "F"
BACKWARD: Literal["B"] = "B"
INPUT_GRAD: Literal["I"] = "I"
WEIGHT_GRAD: Literal["W"] = "W"
Channel: TypeAlias = Literal["act", "grad"]


class Action(NamedTuple):
    """One chunk of compute: F, B, I or W of a stage for a micro-batch."""

    kind: Literal["F", "B", "I", "W"]
    stage: int
    micro_batch: int
    direction: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.micro_batch}{'r' * self.direction}"


class Pair(NamedTuple):
    """A forward and a full backward of different micro-batches, overlapped; both inputs are there when it starts."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"{self.forward}&{self.backward}"


class Transfer(NamedTuple):
    """SEND or FREE of what ``stage`` on this rank produced, or RECV of what ``stage`` on this rank needs.

    On ``act`` the sender's stage is s and the receiver's s + 1, on ``grad`` the sender's s and the receiver's s - 1.
    """

    kind: Literal["SEND", "RECV", "FREE"]
    channel: Channel
    stage: int
    micro_batch: int
    direction: int
    peer: int

    def __str__(self) -> str:
        sign = {"SEND": ">", "RECV": "<", "FREE": "|"}[self.kind]
        chunk = f"{self.stage}.{self.micro_batch}{'r' * self.direction}"
        return f"{self.kind} {self.channel} {chunk} {sign} {self.peer}"


Step: TypeAlias = Action | Pair | Transfer


def parts(step: Action | Pair) -> tuple[Action, ...]:
    """The chunks of a compute step: one, or the two of a pair."""
    return (step.forward, step.backward) if isinstance(step, Pair) else (step,)


_ACTION = re.compile(r"([FBIW])(\d+)\.(\d+)(r?)")
_TRANSFER = re.compile(r"(SEND|RECV|FREE) (act|grad) (\d+)\.(\d+)(r?) ([><|]) (\d+)")


def _parse_action(text: str) -> Action:
    match = _ACTION.fullmatch(text)
    if match is None:
        raise ScheduleError(f"'{text}' is no action; actions read like F0.5, B3.2r, F0.5&B3.2 or SEND act 0.5 > 1")
    kind, stage, micro_batch, reverse = match.groups()
    return Action(kind, int(stage), int(micro_batch), len(reverse))  # type: ignore[arg-type]


def parse_step(text: str) -> Step:
    """The inverse of str(). Raises ScheduleError for text that is no action."""
    match = _TRANSFER.fullmatch(text)
    if match is not None:
        kind, channel, stage, micro_batch, reverse, _, peer = match.groups()
        transfer = Transfer(kind, channel, int(stage), int(micro_batch), len(reverse), int(peer))  # type: ignore[arg-type]
        if str(transfer) == text:
            return transfer
    if "&" not in text:
        return _parse_action(text)
    forward, backward = (_parse_action(part) for part in text.split("&", 1))
    if (forward.kind, backward.kind) != (FORWARD, BACKWARD):
        raise ScheduleError(f"'{text}' is no pair; a pair is one F and one B, like F0.5&B3.2")
    return Pair(forward, backward)
