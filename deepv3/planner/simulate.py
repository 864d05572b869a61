"""The time of one optimizer step: the action lists run on paper, then gradients, norm, update and weights.

1. Lists, messages and proof are training's own (`make_schedule`, `lower`, `check`), with the times of `costs`.
2. A rank reduces the gradients of a chunk (FP32, a ring over its data ranks; experts over the ranks that hold the same
   ones) as soon as the chunk's last weight gradient is done, one chunk after the other.
3. When all are reduced: update of the shard (memory-bound), then the gathering of weights in the training format.

A steady schedule repeats itself, so with many micro-batches two shorter runs tell the time of the whole one: 2 more
micro-batches always cost the same from some number on (tests hold this against full runs). Others' interleaved
lists, which repeat per group of ranks, are always run in full. What is given up: the reduction is taken not to slow the
compute it overlaps with.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from deepv3.arithmetic import wire_bytes
from deepv3.pipeline.actions import FORWARD, INPUT_GRAD, parts
from deepv3.pipeline.check import Report, check
from deepv3.pipeline.dryrun import timeline
from deepv3.planner.calibration import Calibration
from deepv3.planner.costs import Costs, Stage, build_stages
from deepv3.planner.layout import FOREIGN, Layout
from deepv3.planner.network import AllToAll, Network
from deepv3.planner.work import Seconds, Workload, added

EXACT = 3200  # ranks x micro-batches that are run in full


@dataclass(frozen=True)
class Step:
    """One optimizer step. Times in seconds, of the rank with most work (`rank`) unless said otherwise.

    pipeline: from the first action to the last on any rank. reduction: what gradient reduction adds after it; update:
    norm, optimizer and gathering of weights. busy: compute steps by kind (F, B, I, W, F&B). work: compute by class.
    exposed, moved: network time in the open, and all of it. stretched: interference. notes: the schedule's.
    """

    layout: Layout
    pipeline: float
    reduction: float
    update: float
    rank: int
    busy: dict[str, float]
    work: Seconds
    exposed: float
    moved: float
    stretched: float
    bubbles: tuple[float, ...]
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.pipeline + self.reduction + self.update

    @property
    def bubble(self) -> float:
        """Idle time of the rank with most work."""
        return self.bubbles[self.rank]

    @property
    def tokens(self) -> int:
        """Trained by the step."""
        return self.layout.batch * self.layout.seq_len

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Throughput of one device."""
        return self.tokens / self.seconds / self.layout.cluster.count

    @property
    def hidden(self) -> float:
        """Share of the all-to-alls' and messages' time that compute covers."""
        return 1.0 - self.exposed / self.moved if self.moved else 1.0


class Simulator:
    """Estimates steps of one layout, at any batch."""

    def __init__(self, layout: Layout, cal: Calibration) -> None:
        self.layout, self.cal = layout, cal
        self._steps: dict[int, Step] = {}
        self.network = Network(layout.cluster, cal)
        self.work = Workload(
            layout.m, layout.cluster.device, cal, layout.precision, layout.recompute, layout.seq_len, layout.tokens,
            layout.ep, self.a2a.dispatch + self.a2a.combine, layout.gradient_bytes, layout.replayed,
        )  # fmt: skip

    @cached_property
    def a2a(self) -> AllToAll:
        """All-to-alls of one layer and micro-batch."""
        layout = self.layout
        return self.network.all_to_all(layout.m, layout.sends, layout.tokens, layout.ep)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """What every stage computes."""
        return build_stages(self.work, self.layout.m, self.layout.specs)

    @cached_property
    def costs(self) -> Costs:
        """Times of the actions."""
        layout = self.layout
        size = layout.tokens * wire_bytes(layout.m, layout.precision).boundary
        inside = layout.cluster.count <= layout.cluster.node
        message = self.network.message(size, inside) if layout.pp > 1 else 0.0  # one rank hands over in place
        return Costs(self.stages, self.a2a, message, self.cal.interference.value, layout.recompute == "full")

    def tight_bound(self) -> float:
        """A better one than `bound`: the lists run with messages that take no time."""
        layout = self.layout
        if layout.pp * layout.micro_batches > EXACT:
            return self.bound()
        spans = timeline(layout.lists(), self.costs)
        return max(rank[-1][1] for rank in spans) + self.update()

    def bound(self) -> float:
        """Seconds that no run of the lists can be faster than: the busiest rank's own actions, and the update."""
        m = min(self.layout.micro_batches, 4 * self.layout.pp)
        lists = self.layout.lists(m)
        busy = max(sum(map(self.costs, lists.compute(rank))) for rank in range(lists.ranks))
        return busy * self.layout.micro_batches / m * (1.0 if m == self.layout.micro_batches else 0.97) + self.update()

    def update(self) -> float:
        """Norm, optimizer on this rank's shard, weights gathered and coded; of the rank with most parameters."""
        layout, width = self.layout, 4 if self.layout.precision == "fp32" else 2
        slowest = 0.0
        for rank in range(layout.pp):
            shared, experts = (
                sum(column) for column in zip(*(layout.stage_parameters(s) for _, s in layout.held(rank)))
            )
            group, same = layout.dp * layout.copies(), layout.dp * layout.copies() // layout.ep
            shard = shared / group + experts / same
            moved = shard * self.cal.update_bytes.value
            if layout.precision == "fp8":
                moved += layout.fp8_parameters(rank) * self.cal.codes_bytes.value
            seconds = moved / self.work.bandwidth
            seconds += self.network.ring(width * shared, group) + self.network.ring(width * experts, same, layout.ep)
            slowest = max(slowest, seconds)
        return slowest + self.network.latency * 2 * math.log2(max(2, layout.cluster.count))

    def _reduced(self, report: Report) -> float:
        """When the last rank has all its gradients reduced, from the start of the step."""
        layout, latest = self.layout, 0.0
        group, same = layout.dp * layout.copies(), layout.dp * layout.copies() // layout.ep
        for spans in report.spans:
            done: dict[int, float] = {}
            for step, _, end in spans:
                for action in parts(step):
                    if action.kind not in (FORWARD, INPUT_GRAD):
                        done[action.stage] = end
            clock = 0.0
            for stage, ready in sorted(done.items(), key=lambda item: item[1]):
                shared, experts = layout.stage_parameters(layout.specs[stage])
                shared, experts = (count * layout.gradient_bytes for count in (shared, experts))
                seconds = self.network.ring(shared, group) + self.network.ring(experts, same, layout.ep)
                clock = max(clock, ready) + seconds
            latest = max(latest, clock)
        return latest

    def step(self, batch: int | None = None) -> Step:
        """Estimate one step. batch: sequences; the layout's full batch if not given."""
        layout = self.layout
        count = layout.micro_batches if batch is None else batch // (layout.dp * layout.micro)
        if count not in self._steps:
            short = 4 * layout.pp + 8
            if layout.schedule in FOREIGN or layout.pp * count <= EXACT or count <= short + 8:
                self._steps[count] = self._run(count)
            else:
                self._steps[count] = _extend(self._run(short), self._run(short + 8), count)
        return self._steps[count]

    def report(self, micro_batches: int) -> Report:
        """The lists, proved and timed."""
        return check(self.layout.lists(micro_batches), self.costs)

    def _run(self, count: int) -> Step:
        layout, report = self.layout, self.report(count)
        rank = max(range(layout.pp), key=lambda r: report.busy[r])
        busy: dict[str, float] = {}
        exposed = moved = stretched = 0.0
        passes: Counter[int] = Counter()
        for step, start, end in report.spans[rank]:
            kind = "&".join(action.kind for action in parts(step))
            busy[kind] = busy.get(kind, 0.0) + end - start
            cost = self.costs.cost(step)
            exposed, moved, stretched = exposed + cost.exposed, moved + cost.moved, stretched + cost.stretched
            passes.update(action.stage for action in parts(step) if action.kind == FORWARD)
        totals = ((times, self.stages[stage].total()) for stage, times in passes.items())
        work = added(Seconds({kind: times * value for kind, value in total.items()}) for times, total in totals)
        reduction = self._reduced(report) - report.makespan

        return Step(
            replace(layout, batch=count * layout.dp * layout.micro), report.makespan, reduction, self.update(), rank,
            busy, work, exposed, moved, stretched, report.bubble, report.schedule.notes,
        )  # fmt: skip


def _extend(one: Step, two: Step, count: int) -> Step:
    """The step with `count` micro-batches from two with fewer, by the straight line through both."""
    a, b = one.layout.micro_batches, two.layout.micro_batches
    share = (count - a) / (b - a)

    def line(x: float, y: float) -> float:
        return x + (y - x) * share

    def lines(x: dict[str, float], y: dict[str, float]) -> dict[str, float]:
        return {key: line(x.get(key, 0.0), y.get(key, 0.0)) for key in y}

    def row(x: Sequence[float], y: Sequence[float]) -> tuple[float, ...]:
        return tuple(map(line, x, y))

    layout = two.layout
    return Step(
        replace(layout, batch=count * layout.dp * layout.micro), line(one.pipeline, two.pipeline), two.reduction,
        two.update, two.rank, lines(one.busy, two.busy), Seconds(lines(one.work, two.work)),
        line(one.exposed, two.exposed), line(one.moved, two.moved), line(one.stretched, two.stretched),
        row(one.bubbles, two.bubbles), two.notes,
    )  # fmt: skip
