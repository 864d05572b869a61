"""A whole plan: configuration in, one nested dictionary of plain numbers out; tables and pictures are made of it.

Top-level numbers are the contract of scripts (step, throughput and cost at the full batch); the rest is grouped by
question. What is uncertain has a ``*_range`` beside it, [least, most].
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deepv3.arithmetic import activation_bytes, flops_by_part, flops_per_token, kv_cache_bytes, parameters
from deepv3.config.schema import Config
from deepv3.pipeline.schedule import make_schedule
from deepv3.planner.calibration import Calibration
from deepv3.planner.campaign import HOUR, MTBF_HOURS, Phase, failures, pre_training
from deepv3.planner.hardware import GIB
from deepv3.planner.layout import Layout
from deepv3.planner.memory import Memory, RankMemory, misfit
from deepv3.planner.simulate import Simulator, Step
from deepv3.planner.topology import of_fabric, table
from deepv3.planner.uncertain import Spread, spread

POST_TRAINING_GPU_HOURS = 5000.0
"""V3 Table 1, as reported: supervised and reinforcement tuning are not modelled."""


REMADE = {
    "none": ("SwiGLU outputs", "rows of a local permutation"),
    "selective": ("SwiGLU outputs", "rows of a local permutation", "norm outputs", "queries, keys, values"),
    "full": ("all but a layer's input",),
}
"""What backward makes again, by train.recompute (deepv3/model/block.py)."""


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes for granted. price: dollars per device and hour (V3 Table 1: 2). mtbf_hours: of one device."""

    price: float = 2.0
    mtbf_hours: float = MTBF_HOURS


@dataclass(frozen=True)
class Plan:
    """The estimates behind a plan; `document` makes plain numbers of them."""

    cfg: Config
    layout: Layout
    cal: Calibration
    step: Step
    ranks: tuple[RankMemory, ...]
    spread: Spread
    phases: tuple[Phase, ...]
    simulator: Simulator
    assumptions: Assumptions

    @property
    def misfit(self) -> str:
        """Why it does not fit in memory; empty if it does."""
        return misfit(list(self.ranks), self.layout)


def make_plan(
    cfg: Config, later: Sequence[Config], cal: Calibration, assumptions: Assumptions, names: Sequence[str] = ("run",)
) -> Plan:
    """Estimate a run and the phases that continue it. names: of all phases. Raises ConfigError for impossible grids."""
    layout = Layout.of(cfg)
    layout.refuse_impossible()
    make_schedule(
        layout.schedule, layout.pp, layout.micro_batches, cfg.parallel.strict
    )  # strict: refuses what falls short
    simulator = Simulator(layout, cal)
    phases = [pre_training(simulator, cfg.train, names[0])]
    for name, phase_cfg in zip(names[1:], later):
        other = Layout.of(phase_cfg)
        other.refuse_impossible()
        reason = misfit(Memory(other, cal).ranks(), other)
        notes = ("does not fit without splitting sequences over devices (context parallelism)",) if reason else ()
        phases.append(pre_training(Simulator(other, cal), phase_cfg.train, name, notes))
    ranks = tuple(Memory(layout, cal).ranks())
    step, range_ = simulator.step(), spread(layout, cal)
    return Plan(cfg, layout, cal, step, ranks, range_, tuple(phases), simulator, assumptions)


def limits(step: Step) -> dict[str, float]:
    """Shares of the step, of the rank with most work, by what the time goes to; they sum to 1."""
    names = {
        "gemm_fp8": "FP8 matrix products", "gemm_bf16": "BF16 matrix products", "attention": "attention",
        "memory": "memory-bound kernels", "host": "outside the modelled kernels",
    }  # fmt: skip
    found: dict[str, float] = {names[kind]: seconds for kind, seconds in step.work.items()}
    found |= {
        "network in the open": step.exposed,
        "overlap's interference": step.stretched,
        "pipeline bubble": step.bubble,
        "gradients and update": step.reduction + step.update,
    }
    return {name: seconds / step.seconds for name, seconds in sorted(found.items(), key=lambda item: -item[1])}


def _mfu(step: Step, causal: bool) -> float:
    m, layout = step.layout.m, step.layout
    flops = flops_per_token(m, layout.seq_len, causal, mtp=False)
    return step.tokens_per_second_per_gpu * flops / layout.cluster.device.bf16


def _memory(plan: Plan) -> dict[str, Any]:
    capacity = plan.layout.cluster.device.memory / GIB
    slack = plan.cal.workspace
    off = [(end - slack.value) / GIB for end in (slack.high, slack.low)]
    rows = [
        {
            "rank": r.rank, "role": r.role, "parameters": r.parameters, "in_flight": r.in_flight,
            "total_gib": r.total / GIB, "total_gib_range": [r.total / GIB + o for o in off],
            "parts_gib": {part: size / GIB for part, size in r.parts.items()},
        }
        for r in plan.ranks
    ]  # fmt: skip
    layout = plan.layout
    kept = {
        kind: activation_bytes(layout.m, layout.precision, layout.recompute, moe, layout.ep > 1)
        for kind, moe in (("dense", False), ("experts", True))
    }
    return {
        "capacity_gib": capacity,
        "ranks": rows,
        "layer_bytes_per_token": kept,
        "recomputed": list(REMADE[layout.recompute]),
        "fits": not plan.misfit,
        "does_not_fit": plan.misfit,
    }


def _step(plan: Plan) -> dict[str, Any]:
    step, shares = plan.step, limits(plan.step)
    return {
        "micro_batches": step.layout.micro_batches,
        "pipeline_seconds": step.pipeline,
        "reduction_seconds": step.reduction,
        "update_seconds": step.update,
        "busiest_rank": step.rank,
        "busy_seconds": step.busy,
        "bubble_seconds": step.bubble,
        "bubble_share": step.bubble / step.seconds,
        "bubble_share_all_ranks": sum(step.bubbles) / len(step.bubbles) / step.seconds,
        "network_seconds": step.moved,
        "exposed_network_seconds": step.exposed,
        "hidden_communication": step.hidden,
        "shares": shares,
        "limited_by": next(iter(shares)),
        "mfu": _mfu(step, True),
        "mfu_full_attention": _mfu(step, False),
        "notes": list(step.notes),
    }


def _network(plan: Plan) -> dict[str, Any]:
    a2a, layout = plan.simulator.a2a, plan.layout
    full = of_fabric(layout.cluster.fabric)
    return {
        "fabric": full.name,
        "ends": full.ends,
        "dispatch_seconds": a2a.dispatch,
        "combine_seconds": a2a.combine,
        "network_bytes_per_layer_forward": a2a.bytes_nic,
        "nvlink_bytes_per_layer_forward": a2a.bytes_nvlink,
        "message_seconds": plan.simulator.costs.message,
        "cost_per_device_dollars": full.cost_per_end,
        "cost_dollars": full.cost_per_end * layout.cluster.count,
        "topologies": {
            row.name: {
                "ends": row.ends,
                "switches": row.switches,
                "links": row.links,
                "dollars_per_end": row.cost_per_end,
            }
            for row in table().values()
        },
    }


def _run(plan: Plan) -> dict[str, Any]:
    stored = parameters(plan.layout.m).stored
    seconds, hours = plan.phases[0].seconds, sum(phase.gpu_hours for phase in plan.phases)
    rows = [
        asdict(phase) | {"notes": list(phase.notes), "gpu_hours": phase.gpu_hours, "days": phase.seconds / 24 / HOUR}
        for phase in plan.phases
    ]
    tuned = POST_TRAINING_GPU_HOURS if len(plan.phases) > 1 else 0.0
    return {
        "phases": rows,
        "post_training_gpu_hours": tuned,
        "gpu_hours": hours + tuned,
        "gpu_hours_range": [bound + tuned for bound in plan.spread.seconds(hours)],
        "dollars": (hours + tuned) * plan.assumptions.price,
        "price_per_gpu_hour": plan.assumptions.price,
        "failures": asdict(failures(plan.layout, stored, seconds, plan.assumptions.mtbf_hours)),
    }


def document(plan: Plan) -> dict[str, Any]:
    """The plan as JSON holds it."""
    layout, step, m = plan.layout, plan.step, plan.layout.m
    count, rate = parameters(m), step.tokens_per_second_per_gpu
    hours = 1e12 / rate / HOUR
    cluster = layout.cluster
    return {
        "total_parameters": count.total,
        "mtp_parameters": count.mtp,
        "active_parameters": count.active,
        "active_parameters_range": [count.active, count.active_with_embedding],
        "tokens_per_second_per_gpu": rate,
        "tokens_per_second_per_gpu_range": plan.spread.rate(rate),
        "step_seconds": step.seconds,
        "step_seconds_range": plan.spread.seconds(step.seconds),
        "gpu_hours_per_trillion_tokens": hours,
        "gpu_hours_per_trillion_tokens_range": plan.spread.seconds(hours),
        "days_per_trillion_tokens": hours / 24 / cluster.count,
        "dollars_per_trillion_tokens": hours * plan.assumptions.price,
        "mfu": _mfu(step, True),
        "fits": not plan.misfit,
        "cluster": {
            "device": cluster.device.name, "devices": cluster.count, "per_node": cluster.node,
            "network": cluster.fabric.name, "source": cluster.device.source,
        },
        "layout": {
            "pp_size": layout.pp, "ep_size": layout.ep, "dp": layout.dp, "schedule": layout.schedule,
            "precision": layout.precision, "recompute": layout.recompute, "micro_batch_size": layout.micro,
            "global_batch_size": layout.batch, "seq_len": layout.seq_len,
            "stages": [str(spec) for spec in layout.specs],
        },
        "kv_cache_bytes_per_token": kv_cache_bytes(m),
        "flops_per_token": {
            "causal": flops_per_token(m, layout.seq_len, True, mtp=False),
            "full_attention": flops_per_token(m, layout.seq_len, False, mtp=False),
            "parts_causal": flops_by_part(m, layout.seq_len),
            "parts_full_attention": flops_by_part(m, layout.seq_len, causal=False),
        },
        "memory": _memory(plan),
        "step": _step(plan),
        "network": _network(plan),
        "run": _run(plan),
        "uncertainty": {name: change for name, change in plan.spread.by.items() if abs(change) > 1e-4},
        "calibration": plan.cal.name,
    }  # fmt: skip
