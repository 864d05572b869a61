"""How long each action of a schedule takes: stages made of layers, chunks alone, and overlapped pairs.

A chunk alone runs its pieces one after the other, so its all-to-alls stand in the open, except that the shared expert
works while tokens travel, and in a full backward the experts' weight gradient does. In a pair (V3 3.2.2, F4) the layers
of the forward chunk meet those of the backward chunk, last layer first, in two slots each:

    compute   experts(I) experts(W) experts(F)         | attention(I) attention(W) attention(F)
    network   dispatch(F) combine's gradient           | combine(F), pipeline message, dispatch's gradient

A slot takes as long as its longer side; the pair takes the sum of its slots times `interference`. Layers without a
partner, the head and eh_proj run alone. Head and loss make their gradients in the forward (deepv3/model/head.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from deepv3.config.schema import ModelConfig
from deepv3.pipeline.actions import BACKWARD, FORWARD, INPUT_GRAD, Action, Pair, Transfer
from deepv3.pipeline.layout import StageSpec
from deepv3.planner.network import AllToAll
from deepv3.planner.work import Layer, Seconds, Workload, added

NOTHING = 1e-6
"""Seconds of a chunk without layers, such as a stage that holds the embedding alone: a dry run needs some time."""


@dataclass(frozen=True)
class Cost:
    """Seconds of an action. exposed: of them, those in which compute waits for the network; moved: the network's own
    seconds, hidden or not; stretched: what interference adds."""

    seconds: float
    exposed: float = 0.0
    moved: float = 0.0
    stretched: float = 0.0


@dataclass(frozen=True)
class Stage:
    """What a stage computes. layers: in the model's order, MTP blocks at the end."""

    layers: tuple[Layer, ...]
    once_forward: Seconds = field(default_factory=Seconds)  # head, eh_proj
    once_input: Seconds = field(default_factory=Seconds)
    once_weight: Seconds = field(default_factory=Seconds)

    def total(self) -> Seconds:
        """All compute of one micro-batch by class."""
        once = self.once_forward + self.once_input + self.once_weight
        return added((once, *(layer.total() for layer in self.layers)))


def build_stages(work: Workload, m: ModelConfig, specs: Sequence[StageSpec]) -> tuple[Stage, ...]:
    """The stages of a layout."""
    kinds = {False: work.layer(False), True: work.layer(True)}
    found = []
    for spec in specs:
        layers = [kinds[index >= m.first_k_dense_replace] for index in spec.layers] + [kinds[True]] * spec.mtp
        joints = [work.joint()] * spec.mtp
        forward = added([work.head()] * (spec.head + spec.mtp) + [joint[0] for joint in joints])
        inputs, weight = (added(joint[part] for joint in joints) for part in (1, 2))
        found.append(Stage(tuple(layers), forward, inputs, weight))
    return tuple(found)


class Costs:
    """Times of all actions of one layout, as `pipeline.dryrun` wants them: called with a step, returns seconds.

    message: seconds of a pipeline message. stretch: the interference factor. full: recompute is full, so that backward
    sends tokens out and back once more.
    """

    def __init__(self, stages: Sequence[Stage], a2a: AllToAll, message: float, stretch: float, full: bool) -> None:
        self.stages, self.a2a, self.message, self.stretch, self.full = tuple(stages), a2a, message, stretch, full
        self._alone: dict[tuple[str, int], Cost] = {}
        self._pairs: dict[tuple[int, int], Cost] = {}

    def __call__(self, step: Action | Pair | Transfer) -> float:
        return self.message if isinstance(step, Transfer) else self.cost(step).seconds

    def cost(self, step: Action | Pair) -> Cost:
        """The time of a compute step and what it is made of."""
        if isinstance(step, Pair):
            key = (step.forward.stage, step.backward.stage)
            if key not in self._pairs:
                self._pairs[key] = self._pair(*(self.stages[stage] for stage in key))
            return self._pairs[key]
        name = (step.kind, step.stage)
        if name not in self._alone:
            self._alone[name] = self._chunk(step.kind, self.stages[step.stage])
        return self._alone[name]

    def _chunk(self, kind: str, stage: Stage) -> Cost:
        compute, exposed, moved = self._once(kind, stage), 0.0, 0.0
        for layer in stage.layers:
            seconds, open_, travel = self._layer(kind, layer)
            compute, exposed, moved = compute + seconds, exposed + open_, moved + travel
        return Cost(max(compute + exposed, NOTHING), exposed, moved)

    @staticmethod
    def _once(kind: str, stage: Stage) -> float:
        if kind == FORWARD:
            return stage.once_forward.total()
        inputs, weight = stage.once_input.total(), stage.once_weight.total()
        return {BACKWARD: inputs + weight, INPUT_GRAD: inputs}.get(kind, weight)

    def _layer(self, kind: str, layer: Layer) -> tuple[float, float, float]:
        """(compute, exposed network, all network) of one layer of a chunk alone."""
        there, back = (self.a2a.dispatch, self.a2a.combine) if layer.moe else (0.0, 0.0)
        weight = layer.attention_weight.total() + layer.ffn_weight.total()
        if kind == FORWARD:
            compute = layer.attention_forward.total() + layer.ffn_forward.total()
            return compute, max(0.0, there - layer.shared) + back, there + back
        if kind not in (BACKWARD, INPUT_GRAD):
            return weight, 0.0, 0.0
        compute, moved = layer.attention_input.total() + layer.ffn_input.total(), there + back
        hidden = layer.ffn_weight.total() if kind == BACKWARD else 0.0
        exposed = there + max(0.0, back - hidden)
        if self.full:
            exposed, moved = exposed + max(0.0, there - layer.shared) + back, 2 * moved
        return compute + (weight if kind == BACKWARD else 0.0), exposed, moved

    def _pair(self, forward: Stage, backward: Stage) -> Cost:
        compute = self._once(FORWARD, forward) + self._once(BACKWARD, backward)
        exposed, moved, message = 0.0, 2 * self.message, 2 * self.message
        # Expert layers meet expert layers, so that there is something to hide behind; dense ones meet what is left.
        ahead = sorted(forward.layers, key=lambda layer: not layer.moe)
        behind = sorted(backward.layers, key=lambda layer: not layer.moe)
        together = min(len(ahead), len(behind))
        for f, b in zip(ahead, behind):
            out, ret = self._slots(f, b, message)
            message = 0.0
            compute, exposed, moved = compute + out[0] + ret[0], exposed + out[1] + ret[1], moved + out[2] + ret[2]
        for kind, rest in ((FORWARD, ahead[together:]), (BACKWARD, behind[together:])):
            for layer in rest:
                seconds, open_, travel = self._layer(kind, layer)
                compute, exposed, moved = compute + seconds, exposed + open_, moved + travel
        exposed += message
        plain = compute + exposed
        return Cost(plain * self.stretch, exposed, moved, plain * (self.stretch - 1.0))

    def _slots(self, f: Layer, b: Layer, message: float) -> tuple[tuple[float, float, float], ...]:
        """(compute, exposed, network) of the experts' and of attention's slot."""
        there = self.a2a.dispatch
        back = self.a2a.combine
        experts = b.ffn_input.total() + b.ffn_weight.total() + f.ffn_forward.total()
        attention = b.attention_input.total() + b.attention_weight.total() + f.attention_forward.total()
        first = there * f.moe + back * b.moe
        second = back * f.moe + there * b.moe
        if self.full and b.moe:
            first, second = first + there, second + back
        second += message
        return (experts, max(0.0, first - experts), first), (attention, max(0.0, second - attention), second)
