"""Bytes on each pipeline rank at the worst moment of a step, part by part.

    weights       training format; FP32 weights are their own master (deepv3/optim/flat.py)
    fp8 weights   E4M3 of the FP8 projections, once as they are and once transposed, made once a step
    gradients     FP32, whole (ZeRO-1)
    master, moments   sharded over the ranks that hold the same weights
    activations   what layers keep (`arithmetic.activation_bytes`), for every chunk between its forward and its backward
                  or, where that is split, its weight gradient: the largest sum while walking the rank's own list
    transfers     pipeline messages sent and not yet freed, received and not yet used
    dispatch      the buffers of one exchange forward and one backward (`arithmetic.buffer_bytes`), with headroom
    workspace     the largest temporary of a layer or of the loss, and what CUDA, NCCL and the allocator keep
    trials        FP8: copies of the largest weight gradient, on which a first step tries every implementation
                  (kernels/backends.py); where they do not fit it goes without, so no run needs them

Everything is a sum of products of batch, sequence and widths, so nothing shrinks when a batch grows.
"""

from dataclasses import dataclass
from functools import lru_cache

from deepv3.arithmetic import activation_bytes, buffer_bytes, slot_bytes, wire_bytes
from deepv3.pipeline.actions import BACKWARD, FORWARD, WEIGHT_GRAD, parts
from deepv3.planner.calibration import Calibration
from deepv3.planner.hardware import GIB
from deepv3.planner.layout import FOREIGN, Layout, schedule_of
from deepv3.planner.network import reached

HEADROOM = 1.25
"""Received rows over their mean: buffers are fixed and no token is dropped (V3 2.1.2); the balanced routing of V3
keeps the fullest rank of a micro-batch below this."""
TRIALS = 4.5
"""Copies of a gradient at the worst moment of comparing two implementations: both results, their difference and the
parts of both that are finite, with masks of a byte."""
KNOBS = {
    "activations": "train.recompute=full, a smaller train.micro_batch_size, or more of parallel.pp_size",
    "weights": "more of parallel.ep_size or parallel.pp_size",
    "gradients": "more of parallel.ep_size or parallel.pp_size, or parallel.schedule=dualpipev, which holds no copies",
    "master": "more data-parallel ranks",
    "moments": "more data-parallel ranks, or optim.moment_dtype=bfloat16",
    "fp8 weights": "precision=bf16, or more of parallel.ep_size or parallel.pp_size",
    "transfers": "a smaller train.micro_batch_size",
    "dispatch": "a smaller train.micro_batch_size",
    "workspace": "a smaller train.micro_batch_size or train.loss_chunk",
}


@lru_cache(maxsize=256)
def fullest(
    schedule: str, pp_size: int, micro_batches: int, virtual: int = 1
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Per rank, the moments that may be its fullest: chunks kept of each stage it holds, none below another in all.

    A chunk is kept from its forward to its backward or, where that is split, its weight gradient.
    """
    lists, found = schedule_of(schedule, pp_size, micro_batches, virtual), []
    for rank in range(pp_size):
        place = {stage: index for index, stage in enumerate(lists.chunks(rank))}
        live, moments = [0] * len(place), set()
        for step in lists.compute(rank):
            done = [action for action in parts(step) if action.kind in (BACKWARD, WEIGHT_GRAD)]
            for action in parts(step):
                live[place[action.stage]] += action.kind == FORWARD
            moments.add(tuple(live))
            for action in done:
                live[place[action.stage]] -= 1
        best = [one for one in moments if not any(_below(one, other) for other in moments)]
        found.append(tuple(sorted(best)))
    return tuple(found)


def _below(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other))


@dataclass(frozen=True)
class RankMemory:
    """One pipeline rank. parts: bytes. in_flight: chunks kept at the worst moment. parameters: that it holds."""

    rank: int
    role: str
    parts: dict[str, float]
    in_flight: int
    parameters: int

    @property
    def total(self) -> float:
        """Bytes at the worst moment of a run."""
        return sum(self.parts.values())

    @property
    def needed(self) -> float:
        """Bytes that a run cannot do without."""
        return self.total - self.parts["trials"]


class Memory:
    """Memory of one layout."""

    def __init__(self, layout: Layout, cal: Calibration) -> None:
        self.layout, self.cal = layout, cal
        m, sent = layout.m, layout.ep > 1
        layer = {
            moe: layout.tokens * sum(activation_bytes(m, layout.precision, layout.recompute, moe, sent).values())
            for moe in (False, True)
        }
        self.kept = [
            sum(layer[index >= m.first_k_dense_replace] for index in spec.layers)
            + spec.mtp * (layer[True] + layout.tokens * 6 * m.hidden_size)  # eh_proj's input and the normed halves
            + (spec.head + spec.mtp) * layout.tokens * 2 * m.hidden_size  # the head's input gradient, see head.py
            for spec in layout.specs
        ]

    def ranks(self) -> list[RankMemory]:
        """Every pipeline rank."""
        return [self.rank(rank) for rank in range(self.layout.pp)]

    def rank(self, rank: int) -> RankMemory:
        """One pipeline rank."""
        layout = self.layout
        shared, experts = (sum(column) for column in zip(*(layout.stage_parameters(s) for _, s in layout.held(rank))))
        group = layout.dp * layout.copies()
        shard = shared / group + experts * layout.ep / group
        wide = layout.precision == "fp32"
        in_flight, activations = self._peak(rank)
        found = {
            "weights": (shared + experts) * (4.0 if wide else 2.0),
            "gradients": (shared + experts) * float(layout.gradient_bytes),
            "master": 0.0 if wide else shard * 4.0,
            "moments": shard * 2.0 * layout.moment_bytes,
            "fp8 weights": 2.0 * layout.fp8_parameters(rank) if layout.precision == "fp8" else 0.0,
            "activations": activations,
            "transfers": self._transfers(),
            "dispatch": self._dispatch(),
            "workspace": self._workspace() + self.cal.workspace.value,
            "trials": self._trials(rank) if layout.precision == "fp8" else 0.0,
        }
        role = " + ".join(f"{stage}:{spec}" for stage, spec in layout.held(rank))
        return RankMemory(rank, role, found, in_flight, shared + experts)

    def _peak(self, rank: int) -> tuple[int, float]:
        """(chunks, bytes) kept at the fullest moment; lists longer than 2 x ranks repeat it."""
        layout = self.layout
        lists = layout.lists(2 * layout.pp)
        stages = lists.chunks(rank)
        most = 2 * layout.pp + (0 if layout.schedule in FOREIGN else 2)
        moments = fullest(layout.schedule, layout.pp, min(layout.micro_batches, most), layout.virtual)[rank]
        sizes = ((sum(live), sum(n * self.kept[stage] for n, stage in zip(live, stages))) for live in moments)
        return max(sizes, key=lambda size: size[1])

    def _transfers(self) -> float:
        """Two tensors each way and channel: one on its way while the next is made."""
        layout = self.layout
        if layout.pp == 1:
            return 0.0
        return 4.0 * 2 * layout.tokens * wire_bytes(layout.m, layout.precision).boundary

    def _dispatch(self) -> float:
        """Buffers of one exchange forward and one backward, and the slots of memory that ranks share."""
        layout, m = self.layout, self.layout.m
        if layout.ep == 1:
            return 0.0
        nodes, groups = max(1, layout.ep // layout.cluster.node), (m.n_group, m.topk_group)
        goes_to = tuple(
            reached(holders, *groups, m.n_routed_experts, m.num_experts_per_tok) for holders in (nodes, layout.ep)
        )
        sizes = buffer_bytes(m, layout.tokens, layout.ep, layout.sends, nodes, (goes_to[0], goes_to[1]))
        slots = slot_bytes(m, layout.tokens, layout.ep, layout.precision) if layout.shares_memory else 0.0
        return 2.0 * HEADROOM * sum(sizes.values()) + slots

    def _trials(self, rank: int) -> float:
        """Of the largest matrix gradient, FP32: all experts' first projections of a layer, or the dense one's."""
        m, dense = self.layout.m, self.layout.m.first_k_dense_replace
        layers = [index for _, spec in self.layout.held(rank) for index in spec.layers]
        mtp = any(spec.mtp for _, spec in self.layout.held(rank))
        widths = [m.intermediate_size] if any(index < dense for index in layers) else []
        if mtp or any(index >= dense for index in layers):
            widths.append(m.n_routed_experts // self.layout.ep * m.moe_intermediate_size)
        return TRIALS * 4.0 * 2 * m.hidden_size * max(widths, default=0)

    def _workspace(self) -> float:
        """The larger of: attention's queries, keys, values with gradients; expert rows; a chunk of logits."""
        layout, m = self.layout, self.layout.m
        width = 4.0 if layout.precision == "fp32" else 2.0
        qkv = m.num_attention_heads * (2 * (m.qk_nope_head_dim + m.qk_rope_head_dim) + m.v_head_dim)
        rows = m.num_experts_per_tok * (m.hidden_size + 3 * m.moe_intermediate_size)
        logits = min(layout.loss_chunk, layout.tokens) * m.vocab_size
        return width * max(2 * layout.tokens * qkv, layout.tokens * rows, 2 * logits)


def misfit(ranks: list[RankMemory], layout: Layout) -> str:
    """Why the fullest rank does not fit, and the knob for its largest part; empty if all fit."""
    capacity, worst = layout.cluster.device.memory, max(ranks, key=lambda rank: rank.needed)
    if worst.needed <= capacity:
        return ""
    parts = {part: size for part, size in worst.parts.items() if part != "trials" and size}
    largest = sorted(parts, key=lambda part: -parts[part])[:2]
    listed = ", ".join(f"{part} {size / GIB:.1f}" for part, size in parts.items())
    return (
        f"pipeline rank {worst.rank} ({worst.role}) needs {worst.needed / GIB:.1f} GiB, "
        f"{layout.cluster.device.name} has {capacity / GIB:.1f}: {listed}. Largest: "
        + "; ".join(f"{part}: {KNOBS[part]}" for part in largest)
    )
