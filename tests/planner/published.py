"""Throughput that others have published for V3 and its relatives, laid out as this planner can.

Megatron: performance summary of NVIDIA-NeMo/Megatron-Bridge (docs/performance-summary.md and -archive.md), tokens/s per
device, balanced routing, no token dropped; grid, VP and batch as its tables say. Recipes of the tags v0.2.0 (25.09,
25.11), v0.3.0 (26.02), v0.4.2 (26.04.01) and v0.5.0 (26.06) say what else: stages (pp_layout), which CUDA graphs, how
tokens are dispatched and whether that overlaps (moe_a2a_overlap), fused experts, attention's format, recompute, BF16
gradients (grad_reduce_in_fp32 = False, all rows). TP2 x PP8 x VP4 is laid out as PP16 x VP2: as many stages.
Left out: rows that drop tokens (25.09 on GB200 and B200).
AutoModel: NVIDIA-NeMo/Automodel's table of DGX-H100 rows. Left out: its V3 rows, whose PP4 x VP8 with 8 micro-batches
no schedule here comes near.
Ours: docs/benchmarks.md, one H200 and one H100, planned with `report` constants and with one calibration file a device
(calibrations/, as `bench.py what=calibration` wrote them).
TorchTitan: 0.2.2 on our shape `mini` (5.2 B), measured on H200 with forced balance; middle of the steps' range.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from plans import model, on

from deepv3.config.schema import ModelConfig
from deepv3.planner.calibration import Calibration, Value
from deepv3.planner.hardware import GIB
from deepv3.planner.layout import Layout
from deepv3.planner.measured import read_calibration
from deepv3.planner.megatron import BUILT_IN
from deepv3.planner.memory import Memory
from deepv3.planner.simulate import Simulator, Step
from deepv3.planner.uncertain import spread

WITHOUT_MTP = replace(model("v3_671b"), num_nextn_predict_layers=0)


REPORT, HOPPER, EAGER, GRAPHS, WHOLE, WHOLE_FP8 = (
    BUILT_IN[name]
    for name in (
        "report", "megatron", "megatron_blackwell", "megatron_graphs", "megatron_whole", "megatron_whole_fp8",
    )
)  # fmt: skip
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
    return Row(name, replace(layout, wire="bf16", gradient_bytes=2), rate, calibration)


def hgx(device: str, **changes) -> Layout:
    """256 devices in nodes of 8, PP16 EP8, 4096 sequences, unless said otherwise."""
    return on(device, 256, **{"pp": 16, "ep": 8, "batch": 4096} | changes)


def nvl(device: str, virtual: int, **changes) -> Layout:
    """256 devices in racks of 64, `virtual` stages each, 4096 sequences, unless said otherwise."""
    return on(device, 256, **{"batch": 4096, "schedule": "interleaved", "virtual": virtual} | changes)


_PLAIN = {"m": WITHOUT_MTP}
_BF16 = {"precision": "bf16"} | _PLAIN
_TWO = {"pp": 2, "ep": 32, "micro": 2}
_PAIRS = {"schedule": "interleaved_pairs"}
_OVERLAPPED = {"pp": 8, "ep": 32, "virtual": 2} | _PAIRS
_HOPPER = {"pp": 16, "batch": 8192, "virtual": 2, "split": "E1|2|...|HM"} | _PAIRS
_NEWEST = {"pp": 2, "ep": 32, "recompute": "none"} | _PAIRS
DEEPEP = GRAPHS.changed(
    {"comm_sms": Value(20, 20, 0, "moe_deepep_num_sms = 20 by default; tokens travel nearly all the time")},
    "megatron_graphs, DeepEP",
)
MEGATRON_FITTED = megatron("256 B200, MXFP8, PP16 EP8 (26.02)", hgx("b200"), 2689)
MEGATRON = (
    megatron("256 GB200, BF16, PP4 EP64 (25.11)", nvl("gb200", 4, pp=4, **_BF16), 3139, GRAPHS),
    megatron("256 GB200, MXFP8, PP8 EP32 (25.11)", nvl("gb200", 4, pp=8, ep=32, **_PLAIN), 4018, GRAPHS),
    megatron("256 GB200, MXFP8, PP4 EP64 (26.02)", nvl("gb200", 4, pp=4), 3955, GRAPHS),
    megatron("256 GB200, MXFP8, PP4 EP64 (26.04.01)", nvl("gb200", 4, pp=4), 4256, GRAPHS),
    megatron("256 GB300, BF16, PP2 EP32 (25.11)", nvl("gb300", 4, pp=2, ep=32, **_BF16), 3848, GRAPHS),
    megatron("256 GB300, MXFP8, PP2 EP32 (25.11)", nvl("gb300", 4, pp=2, ep=32, **_PLAIN), 4357, GRAPHS),
    megatron("256 GB300, MXFP8, PP2 EP32, two sequences (26.02)", nvl("gb300", 8, **_TWO), 4612),
    megatron("256 GB300, MXFP8, PP2 EP32, two sequences (26.04.01)", nvl("gb300", 8, **_TWO), 4992),
    megatron("256 GB200, MXFP8, PP4 EP64 (26.06)", nvl("gb200", 4, pp=4, **_PAIRS), 4969, WHOLE),
    megatron("256 GB200, MXFP8, PP4 EP64 (26.08)", nvl("gb200", 4, pp=4, **_PAIRS), 4912, WHOLE),
    megatron("1,024 H100, FP8, TP2 PP8 EP64 as PP16 (25.09)", on("h100", 1024, **_HOPPER), 1297, HOPPER),
    megatron("256 B200, MXFP8, PP16 EP8, all-to-all (25.11)", hgx("b200", batch=2048), 2139, ALL_TO_ALL),
    megatron("256 B200, MXFP8, PP16 EP8 (26.04)", hgx("b200"), 2815),
    megatron("256 B200, MXFP8, PP8 EP32, overlapped (26.04.01)", hgx("b200", **_OVERLAPPED), 3328, DEEPEP),
    megatron("256 B300, MXFP8, PP16 EP8 (26.02)", hgx("b300"), 2983),
    megatron("256 B300, MXFP8, PP16 EP8 (26.04)", hgx("b300"), 3131),
    megatron("256 B300, MXFP8, PP8 EP8, two sequences (26.04.01)", hgx("b300", pp=8, micro=2), 3456, GRAPHS),
    megatron("256 B300, MXFP8, PP8 EP8, two sequences (26.06)", hgx("b300", pp=8, micro=2), 3541, GRAPHS),
    megatron("256 GB300, MXFP8, PP2 EP32 (26.06)", nvl("gb300", 8, **_NEWEST), 6338, WHOLE_FP8),
    megatron("256 GB300, MXFP8, 15,360 sequences (26.06)", nvl("gb300", 8, batch=15_360, **_NEWEST), 6422, WHOLE_FP8),
    megatron("256 GB300, MXFP8, PP2 EP32 (26.08)", nvl("gb300", 8, **_NEWEST), 6288, WHOLE_FP8),
)

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


CALIBRATIONS = Path(__file__).parent / "calibrations"


@dataclass(frozen=True)
class Ours:
    """A run of this code. tried: whether it compared kernels, or knew from an earlier run which are fastest."""

    row: Row
    gib: float
    tried: bool

    def calibrated(self) -> Row:
        """As planned with the one file that `bench.py what=calibration` made on this kind of device."""
        file = CALIBRATIONS / f"{self.row.layout.cluster.device.name}.json"
        return replace(self.row, calibration=read_calibration(str(file)))

    def planned_gib(self) -> float:
        """As `compare` counts: without context and slack."""
        cal = self.row.calibration
        ranks = Memory(self.row.layout, cal).ranks()
        return (max(rank.total if self.tried else rank.needed for rank in ranks) - cal.workspace.value) / GIB


def ours(
    name: str,
    m: ModelConfig,
    precision: str,
    micro: int,
    count: int,
    rate: float,
    gib: float,
    device: str = "h200",
    again: bool = False,
) -> Ours:
    """A run of docs/benchmarks.md on one device. count: micro-batches a step; gib: most that torch allocated; again:
    with CUDA graphs, after other runs on that machine."""
    layout = on(
        device, 1, m=replace(m, num_nextn_predict_layers=0), pp=1, ep=1, precision=precision, recompute="selective",
        micro=micro, batch=micro * count, moment_bytes=2, cuda_graph=again,
    )  # fmt: skip
    return Ours(Row(name, layout, rate), gib, not again)


OURS = (
    ours("`mini`, BF16, one micro-batch a step", model("mini"), "bf16", 2, 1, 52_468, 73.6),
    ours("`mini`, BF16, four", model("mini"), "bf16", 2, 4, 59_389, 73.6),
    ours("`mini`, BF16, eight", model("mini"), "bf16", 2, 8, 61_360, 73.6),
    ours("V3-shaped stack, BF16", _STACK, "bf16", 1, 4, 35_107, 39.9),
    ours("V3-shaped stack, FP8", _STACK, "fp8", 1, 4, 39_816, 46.8),
    ours("`mini`, FP8", model("mini"), "fp8", 2, 4, 60_293, 85.2),
    ours("V3-shaped stack on an H100, BF16", _STACK, "bf16", 1, 4, 34_384, 39.9, "h100"),
    ours("V3-shaped stack on an H100, FP8", _STACK, "fp8", 1, 4, 40_406, 46.8, "h100"),
    ours("`mini`, BF16, CUDA graphs", model("mini"), "bf16", 2, 4, 59_920, 73.7, again=True),
    ours("`mini`, FP8, CUDA graphs", model("mini"), "fp8", 2, 4, 68_540, 81.0, again=True),
)
