"""Pipeline schedules as pure functions: (name, ranks, micro-batches) -> one list of actions per rank.

With F, B, W the times of a forward, a full backward and a weight gradient, F&B that of a pair, S stages and R ranks
(V3 3.2.1, Table 2; docs/schedules.md derives and draws them):

    1f1b       S = R    bubble (R-1)(F + B)                peak R activations of a stage
    zb1p       S = R    bubble (R-1)(F + B - 2W)           peak R
    dualpipe   S = R    bubble (R/2-1)(F&B + B - 3W)       peak R + 1; two copies of the weights, R even
    dualpipev  S = 2R   bubble (R-1)(F&B + B - 3W)         peak 2R + 1 (of half the size); one copy

Any number of micro-batches m >= 1 runs. What is then less than the full schedule stands in ``Schedule.notes``, or is
refused if ``strict``. Nothing here knows torch, times or messages: ``lower`` adds the messages, ``check`` proves the
lists.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from deepv3.errors import ScheduleError
from deepv3.pipeline.actions import BACKWARD, FORWARD, INPUT_GRAD, WEIGHT_GRAD, Action, Pair, Step, Transfer, parts
from deepv3.pipeline.dualpipe import chunk_slots

Route = tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """One step of a pipeline.

    name: what was built, which is 1f1b where a fall-back took its place. micro_batches: m of this pipeline.
    routes: per direction, the rank of each stage. reverse_from: first micro-batch of direction 1; m if there is none.
    Each direction's micro-batches enter at its first stage and their loss appears at its last stage.
    actions: [rank][position], in the order of execution. notes: how this differs from the full schedule.
    lowered: whether the lists hold the transfers.
    """

    name: str
    micro_batches: int
    routes: tuple[Route, ...]
    actions: tuple[tuple[Step, ...], ...]
    reverse_from: int
    notes: tuple[str, ...] = ()
    forward_only: bool = False
    lowered: bool = False

    @property
    def ranks(self) -> int:
        """Pipeline ranks R."""
        return len(self.actions)

    @cached_property
    def stages(self) -> int:
        """Stages S the model is cut into."""
        return len(self.routes[0])

    def direction(self, micro_batch: int) -> int:
        """0 or 1: which way a micro-batch travels."""
        return int(micro_batch >= self.reverse_from)

    @cached_property
    def _chunks(self) -> tuple[tuple[int, ...], ...]:
        held: list[set[int]] = [set() for _ in range(self.ranks)]
        for route in self.routes:
            for stage, rank in enumerate(route):
                held[rank].add(stage)
        return tuple(tuple(sorted(stages)) for stages in held)

    def chunks(self, rank: int) -> tuple[int, ...]:
        """The stages a rank holds, ascending, so that DualPipe's mirrors r and R-1-r hold theirs in one order."""
        return self._chunks[rank]

    def compute(self, rank: int) -> Iterator[Action | Pair]:
        """A rank's list without transfers."""
        return (step for step in self.actions[rank] if not isinstance(step, Transfer))

    def source(self, action: Action) -> int | None:
        """The rank that makes what an F or a backward needs from another stage; None for tokens and for the loss."""
        stage = action.stage - 1 if action.kind == FORWARD else action.stage + 1
        return self.routes[action.direction][stage] if 0 <= stage < self.stages else None

    def target(self, action: Action) -> int | None:
        """The rank that needs what an F or a backward makes; None at the loss and at the embedding."""
        stage = action.stage + 1 if action.kind == FORWARD else action.stage - 1
        return self.routes[action.direction][stage] if 0 <= stage < self.stages else None


def _single(name: str, ranks: int, count: int, kinds: Callable[[int], str]) -> Schedule:
    """One stage per rank. kinds(rank): the letters of its list; each kind counts its own micro-batches from 0."""
    lists: list[tuple[Step, ...]] = []
    for rank in range(ranks):
        passed = dict.fromkeys((FORWARD, BACKWARD, INPUT_GRAD, WEIGHT_GRAD), 0)
        steps: list[Step] = []
        for kind in kinds(rank):
            steps.append(Action(kind, rank, passed[kind]))  # type: ignore[arg-type]
            passed[kind] += 1
        lists.append(tuple(steps))
    return Schedule(name, count, (tuple(range(ranks)),), tuple(lists), count)


def one_f_one_b(ranks: int, count: int) -> Schedule:
    """1F1B: R-1-r forwards to warm up, then a forward and a backward in turn, then the backwards left."""

    def kinds(rank: int) -> str:
        warm = min(count, ranks - 1 - rank)
        return "F" * warm + "FB" * (count - warm) + "B" * warm

    return _single("1f1b", ranks, count, kinds)


def zb1p(ranks: int, count: int) -> Schedule:
    """ZB1P (Zero Bubble's H1): 1F1B whose weight gradients lag r micro-batches behind on rank r.

    R-r chunks live between F and I and r between I and W, so every rank holds the R chunks that rank 0 of 1F1B holds.
    The lagging W fill the gaps of the cool-down.
    """

    def kinds(rank: int) -> str:
        warm = min(count, ranks - 1 - rank)
        lag = min(rank, count - warm)
        return "F" * warm + "FI" * lag + "FIW" * (count - warm - lag) + "IW" * warm + "W" * lag

    return _single("zb1p", ranks, count, kinds)


Plan = tuple[int, int, tuple[int, int]]


def _two_chunks(name: str, count: int, routes: tuple[Route, ...], plan: Callable[[int], Plan]) -> Schedule:
    """The DualPipe family. plan(rank) -> (H, h, stages of chunks 0 and 1); two routes make the chunks directions."""
    both = len(routes) == 2
    reverse_from = (count + 1) // 2 if both else count
    first, counts = (0, reverse_from), (reverse_from, count - reverse_from if both else count)
    lists: list[tuple[Step, ...]] = []
    for rank in range(max(routes[0]) + 1):
        half, distance, stages = plan(rank)
        # With two routes a rank meets its stage r in direction 0 and stage R-1-r in direction 1.
        way = tuple(int(both and stage != rank) for stage in stages)
        steps: list[Step] = []
        for slots in chunk_slots(half, distance, (counts[way[0]], counts[way[1]])):
            step = [Action(kind, stages[c], first[way[c]] + index, way[c]) for kind, c, index in slots]
            steps.append(Pair(*step) if len(step) == 2 else step[0])
        lists.append(tuple(steps))
    return Schedule(name, count, routes, tuple(lists), reverse_from)


def dualpipe(ranks: int, count: int) -> Schedule:
    """Bidirectional DualPipe: direction 0 enters at rank 0, direction 1 at rank R-1; rank r holds stages r, R-1-r."""

    def plan(rank: int) -> Plan:
        mirror = ranks - 1 - rank
        return ranks // 2, min(rank, mirror), (min(rank, mirror), max(rank, mirror))

    up = tuple(range(ranks))
    return _two_chunks("dualpipe", count, (up, up[::-1]), plan)


def dualpipev(ranks: int, count: int) -> Schedule:
    """DualPipeV: rank r holds stages r and 2R-1-r; what enters at rank 0 turns round at rank R-1 and ends at rank 0."""
    up = tuple(range(ranks))
    return _two_chunks("dualpipev", count, (up + up[::-1],), lambda rank: (ranks, rank, (rank, 2 * ranks - 1 - rank)))


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "1f1b": one_f_one_b,
    "zb1p": zb1p,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}


def _shortfall(name: str, ranks: int, count: int) -> tuple[str, str]:
    """How this falls short of the full schedule, and what is run instead; two empty texts if it does not."""
    if name == "dualpipe" and ranks == 1:
        return "dualpipe needs an even number of pipeline ranks, parallel.pp_size = 1", "1f1b runs instead"
    if not name.startswith("dualpipe"):
        return "", ""
    odd = name == "dualpipe" and count % 2 == 1
    uneven = f"direction 1 runs {count // 2} micro-batches, direction 0 {count - count // 2}" if odd else ""
    if count < 2 * ranks:
        lack = f"{name} overlaps fully from 2 x parallel.pp_size = {2 * ranks} micro-batches on, this step has {count}"
        return lack, "fewer pairs overlap" + (f" and {uneven}" if odd else "")
    if odd:
        return f"dualpipe needs an even number of micro-batches, this step has {count}", uneven
    return "", ""


def make_schedule(name: str, pp_size: int, micro_batches: int, strict: bool = False) -> Schedule:
    """The lists of one step.

    name: 1f1b | zb1p | dualpipe | dualpipev. pp_size: pipeline ranks R >= 1. micro_batches: m >= 1 per pipeline, over
    both directions. strict: refuse what would otherwise be noted (too few or odd micro-batches, one rank).
    Raises ScheduleError.
    """
    if name not in SCHEDULES:
        raise ScheduleError(f"parallel.schedule={name} is none of {', '.join(SCHEDULES)}")
    if pp_size < 1 or micro_batches < 1:
        raise ScheduleError(
            f"a pipeline needs parallel.pp_size >= 1 and at least 1 micro-batch, got {pp_size} and {micro_batches}: "
            "micro-batches = global batch / (dp x train.micro_batch_size)"
        )
    if name == "dualpipe" and pp_size % 2 and pp_size > 1:
        raise ScheduleError(
            f"dualpipe mirrors rank r on rank pp_size-1-r, so parallel.pp_size must be even, got {pp_size}: take "
            f"parallel.pp_size={pp_size - 1} or {pp_size + 1}, or parallel.schedule=dualpipev"
        )
    lack, instead = _shortfall(name, pp_size, micro_batches)
    if lack and strict:
        raise ScheduleError(
            f"{lack}; parallel.strict=true refuses it. Take a smaller dp (micro-batches = global batch / (dp x "
            f"train.micro_batch_size)), a parallel.pp_size that fits, or parallel.strict=false, where {instead}"
        )
    build = SCHEDULES["1f1b" if name == "dualpipe" and pp_size == 1 else name]
    schedule = build(pp_size, micro_batches)
    return replace(schedule, notes=(f"{lack}: {instead}",)) if lack else schedule


def forward_only(schedule: Schedule) -> Schedule:
    """The forwards of a schedule in its order, for validation through the same pipeline."""
    assert not schedule.lowered, "messages are added afterwards"
    forwards = (
        tuple(action for step in schedule.compute(rank) for action in parts(step) if action.kind == FORWARD)
        for rank in range(schedule.ranks)
    )
    return replace(schedule, actions=tuple(forwards), forward_only=True)


def micro_batches(global_batch: int, dp: int, micro_batch_size: int, pp_size: int = 1) -> int:
    """Micro-batches m per pipeline and step = global_batch / (dp x micro_batch_size), both in sequences.

    dp: pipelines side by side (data ranks). Raises ScheduleError if m is no whole number, naming the largest smaller dp
    that fits and, on the same dp x pp_size ranks, the pp_size that goes with one.
    """
    rows, rest = divmod(global_batch, micro_batch_size)
    if rest or not rows:
        raise ScheduleError(
            f"global batch {global_batch} / train.micro_batch_size {micro_batch_size} = "
            f"{global_batch / micro_batch_size:g} micro-batches, no whole number: change train.micro_batch_size or "
            "train.global_batch_size"
        )
    if rows % dp == 0:
        return rows // dp
    world = dp * pp_size
    fits = max(d for d in range(1, dp) if rows % d == 0)
    same_ranks = max(d for d in range(1, dp) if rows % d == 0 and world % d == 0)
    raise ScheduleError(
        f"global batch {global_batch} / (dp {dp} x train.micro_batch_size {micro_batch_size}) = {rows / dp:g} "
        f"micro-batches per pipeline, no whole number: dp={fits} fits ({rows // fits} micro-batches on "
        f"{fits * pp_size} ranks), or on the same {world} ranks parallel.pp_size={world // same_ranks} with "
        f"dp={same_ranks} ({rows // same_ranks} micro-batches)"
    )
