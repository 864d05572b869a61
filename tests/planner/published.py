"""Throughput that others have published for V3 and its relatives, laid out as this planner can.

Megatron: performance summary of NVIDIA-NeMo/Megatron-Bridge (docs/performance-summary.md and -archive.md), tokens/s per
device, balanced routing, no token dropped; recipes of the tags v0.2.0 (25.11), v0.3.0 (26.02) and v0.5.0 (26.06) say
which replay CUDA graphs and how tokens are dispatched. Left out: rows that drop tokens (25.09 on GB200 and B200).
Interleaved 1F1B (VP > 1) is laid out as plain 1F1B, which has the larger bubble; TP2 x PP8 as PP16; PP8 x VP2 with
1F1B's all-to-all overlap (B200, 26.04.01) as DualPipeV, which has as many stages and pairs passes likewise.
AutoModel: NVIDIA-NeMo/Automodel's table of DGX-H100 rows. Left out: its V3 rows, whose PP4 x VP8 with 8 micro-batches
no schedule here comes near.
Ours: docs/benchmarks.md, one H200, planned with `report` constants, before any calibration.
TorchTitan: 0.2.2 on our shape `mini` (5.2 B), measured on H200 with forced balance; middle of the steps' range.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from plans import model, on

from deepv3.config.schema import ModelConfig
from deepv3.planner.calibration import BUILT_IN, Calibration, Value
from deepv3.planner.hardware import GIB
from deepv3.planner.layout import Layout
from deepv3.planner.memory import Memory
from deepv3.planner.simulate import Simulator, Step
from deepv3.planner.uncertain import spread

WITHOUT_MTP = replace(model("v3_671b"), num_nextn_predict_layers=0)


REPORT, EAGER, GRAPHS = (BUILT_IN[name] for name in ("report", "megatron", "megatron_graphs"))
ROUTED = (
    "Megatron-LM's GB200 guide, 2.1.4 and 2.2.1: routing and preparation are 31 kernels, 17 with a fused dispatcher"
)
ALL_TO_ALL = EAGER.changed(
    {
        "kernels_forward": Value(45 + 14, 45 + 14, 45 + 14, ROUTED),
        "kernels_backward": Value(90 + 28, 90 + 28, 90 + 28, f"{ROUTED}; backward twice as many"),
    },
    "megatron, all-to-all",
)


@dataclass(frozen=True)
class Row:
    """One published figure. rate: tokens/s per device."""

    name: str
    layout: Layout
    rate: float
    calibration: Calibration = REPORT

    @cached_property
    def step(self) -> Step:
        """As planned."""
        return Simulator(self.layout, self.calibration).step()

    def error(self) -> float:
        """Planned over published, less 1."""
        return self.step.tokens_per_second_per_gpu / self.rate - 1.0

    def range(self) -> list[float]:
        """Tokens/s that the plan prints as least and most."""
        return spread(self.layout, self.calibration).rate(self.step.tokens_per_second_per_gpu)


def megatron(name: str, layout: Layout, rate: float, calibration: Calibration = EAGER) -> Row:
    """A row of Megatron-Bridge; eager: nothing replayed from CUDA graphs."""
    return Row(name, layout, rate, calibration)


def hgx(device: str, **changes) -> Layout:
    """256 devices in nodes of 8, PP16 EP8, 4096 sequences, unless said otherwise."""
    return on(device, 256, **{"pp": 16, "ep": 8, "batch": 4096} | changes)


def nvl(device: str, **changes) -> Layout:
    """256 devices in racks of 64, 4096 sequences, unless said otherwise."""
    return on(device, 256, **{"batch": 4096} | changes)


_PLAIN = {"m": WITHOUT_MTP}
_BF16 = {"precision": "bf16"} | _PLAIN
_TWO = {"pp": 2, "ep": 32, "micro": 2}
_OVERLAPPED = {"pp": 8, "ep": 32, "schedule": "dualpipev"}
MEGATRON_FITTED = megatron("256 B200, MXFP8, PP16 EP8 (26.02)", hgx("b200"), 2689)
MEGATRON = (
    megatron("256 GB200, BF16, PP4 EP64 (25.11)", nvl("gb200", pp=4, **_BF16), 3139, GRAPHS),
    megatron("256 GB200, MXFP8, PP8 EP32 (25.11)", nvl("gb200", pp=8, ep=32, **_PLAIN), 4018, GRAPHS),
    megatron("256 GB200, MXFP8, PP4 EP64 (26.02)", nvl("gb200", pp=4), 3955, GRAPHS),
    megatron("256 GB200, MXFP8, PP4 EP64 (26.04.01)", nvl("gb200", pp=4), 4256, GRAPHS),
    megatron("256 GB300, BF16, PP2 EP32 (25.11)", nvl("gb300", pp=2, ep=32, **_BF16), 3848, GRAPHS),
    megatron("256 GB300, MXFP8, PP2 EP32 (25.11)", nvl("gb300", pp=2, ep=32, **_PLAIN), 4357, GRAPHS),
    megatron("256 GB300, MXFP8, PP2 EP32, two sequences (26.02)", nvl("gb300", **_TWO), 4612),
    megatron("1,024 H100, FP8, TP2 PP8 EP64 as PP16 (25.09)", on("h100", 1024, pp=16, batch=8192), 1297),
    megatron("256 B200, MXFP8, PP16 EP8, all-to-all (25.11)", hgx("b200", batch=2048), 2139, ALL_TO_ALL),
    megatron("256 B200, MXFP8, PP16 EP8 (26.04)", hgx("b200"), 2815),
    megatron("256 B200, MXFP8, PP8 EP32, overlapped (26.04.01)", hgx("b200", **_OVERLAPPED), 3328, GRAPHS),
    megatron("256 B300, MXFP8, PP16 EP8 (26.02)", hgx("b300"), 2983),
    megatron("256 B300, MXFP8, PP16 EP8 (26.04)", hgx("b300"), 3131),
    megatron("256 B300, MXFP8, PP8 EP8, two sequences (26.04.01)", hgx("b300", pp=8, micro=2), 3456, GRAPHS),
    megatron("256 B300, MXFP8, PP8 EP8, two sequences (26.06)", hgx("b300", pp=8, micro=2), 3541, GRAPHS),
)
MISSED = (
    megatron("256 GB300, MXFP8, PP2 EP32, two sequences (26.04.01)", nvl("gb300", **_TWO), 4992),
    megatron("256 GB200, MXFP8, PP4 EP64 (26.06)", nvl("gb200", pp=4), 4969, GRAPHS),
    megatron("256 GB300, MXFP8, PP2 EP32 (26.06)", nvl("gb300", pp=2, ep=32), 6338, GRAPHS),
)
"""Planned slower than published: by interleaving, and from 26.06 by attention in FP8 and fused experts."""

_MOONLIGHT = {"m": model("moe_16b"), "pp": 1, "ep": 8, "precision": "bf16", "recompute": "none"}
_MINI = {"m": model("mini"), "pp": 1, "precision": "bf16", "recompute": "none", "micro": 2}
AUTOMODEL = (Row("H100 BF16, Moonlight 16B, EP8", on("h100", 8, batch=256, micro=2, **_MOONLIGHT), 22_898),)
FITTED = Row("1 x H200 BF16, mini", on("h200", 1, ep=1, batch=2, **_MINI), 20_700, BUILT_IN["torchtitan"])
TORCHTITAN = (Row("4 x H200 BF16, mini, EP4", on("h200", 4, ep=4, batch=8, **_MINI), 20_350, BUILT_IN["torchtitan"]),)


_STACK = replace(
    model("mini"), hidden_size=7168, num_attention_heads=128, q_lora_rank=1536, intermediate_size=18432,
    moe_intermediate_size=2048, num_hidden_layers=4, n_routed_experts=8, n_group=1, topk_group=1, num_experts_per_tok=4,
    vocab_size=32768, num_nextn_predict_layers=0,
)  # fmt: skip


@dataclass(frozen=True)
class Ours:
    """A run of this code."""

    row: Row
    gib: float

    def planned_gib(self) -> float:
        """As `compare` counts: without context and slack."""
        cal = self.row.calibration
        return (max(rank.total for rank in Memory(self.row.layout, cal).ranks()) - cal.workspace.value) / GIB


def ours(name: str, m: ModelConfig, precision: str, micro: int, count: int, rate: float, gib: float) -> Ours:
    """A run of docs/benchmarks.md on one H200. count: micro-batches a step; gib: most that torch allocated."""
    layout = on(
        "h200", 1, m=replace(m, num_nextn_predict_layers=0), pp=1, ep=1, precision=precision, recompute="selective",
        micro=micro, batch=micro * count, moment_bytes=2,
    )  # fmt: skip
    return Ours(Row(name, layout, rate), gib)


OURS = (
    ours("`mini`, BF16, one micro-batch a step", model("mini"), "bf16", 2, 1, 52_468, 73.6),
    ours("`mini`, BF16, four", model("mini"), "bf16", 2, 4, 59_389, 73.6),
    ours("`mini`, BF16, eight", model("mini"), "bf16", 2, 8, 61_360, 73.6),
    ours("V3-shaped stack, BF16", _STACK, "bf16", 1, 4, 35_107, 39.9),
    ours("V3-shaped stack, FP8", _STACK, "fp8", 1, 4, 39_816, 46.8),
    ours("`mini`, FP8", model("mini"), "fp8", 2, 4, 60_293, 85.2),
)
