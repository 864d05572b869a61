"""Throughput that others have published for V3 and its relatives, laid out as this planner can.

Megatron: performance summary of NVIDIA-NeMo/Megatron-Bridge (docs/performance-summary.md and -archive.md), tokens/s per
device, balanced routing, no token dropped. Left out there: rows that drop tokens (25.09 on GB200 and B200).
Interleaved 1F1B (VP > 1) is laid out as plain 1F1B, which has the larger bubble; TP2 x PP8 as PP16.
AutoModel: NVIDIA-NeMo/Automodel's table of DGX-H100 rows. Left out: its V3 rows, whose PP4 x VP8 with 8 micro-batches
no schedule here comes near.
TorchTitan: 0.2.2 on our shape `mini` (5.2 B), measured on H200 with forced balance; middle of the steps' range.
"""

from dataclasses import dataclass, replace

from plans import model, on

from deepv3.planner.calibration import BUILT_IN
from deepv3.planner.layout import Layout
from deepv3.planner.simulate import Simulator

WITHOUT_MTP = replace(model("v3_671b"), num_nextn_predict_layers=0)


@dataclass(frozen=True)
class Row:
    """One published figure. rate: tokens/s per device."""

    name: str
    layout: Layout
    rate: float
    calibration: str = "report"

    def error(self) -> float:
        """Planned over published, less 1."""
        return Simulator(self.layout, BUILT_IN[self.calibration]).step().tokens_per_second_per_gpu / self.rate - 1.0


MEGATRON = (
    Row("GB200 BF16, 25.11, PP4 EP64", on("gb200", 256, pp=4, precision="bf16", batch=4096, m=WITHOUT_MTP), 3139),
    Row("GB200 MXFP8, 25.11, PP8 EP32", on("gb200", 256, pp=8, ep=32, batch=4096, m=WITHOUT_MTP), 4018),
    Row("GB200 MXFP8, 26.02, PP4 EP64", on("gb200", 256, pp=4, batch=4096), 3955),
    Row(
        "GB300 BF16, 25.11, PP2 EP32", on("gb300", 256, pp=2, ep=32, precision="bf16", batch=4096, m=WITHOUT_MTP), 3848
    ),
    Row("GB300 MXFP8, 25.11, PP2 EP32", on("gb300", 256, pp=2, ep=32, batch=4096, m=WITHOUT_MTP), 4357),
    Row("GB300 MXFP8, 26.02, PP2 EP32 mbs 2", on("gb300", 256, pp=2, ep=32, batch=4096, micro=2), 4612),
    Row("H100 FP8, 25.09, TP2 PP8 EP64", on("h100", 1024, pp=16, batch=8192), 1297),
)
MISSED = (
    Row("B200 MXFP8, 25.11, PP16 EP8", on("b200", 256, pp=16, ep=8, batch=2048), 2139),
    Row("B200 MXFP8, 26.02, PP16 EP8", on("b200", 256, pp=16, ep=8, batch=4096), 2689),
    Row("B300 MXFP8, 26.02, PP16 EP8", on("b300", 256, pp=16, ep=8, batch=4096), 2983),
)
"""Out of reach: planned 24 % to 59 % faster. Two releases of the same software lie 26 % apart on one of them."""

_MOONLIGHT = {"m": model("moe_16b"), "pp": 1, "ep": 8, "precision": "bf16", "recompute": "none"}
_MINI = {"m": model("mini"), "pp": 1, "precision": "bf16", "recompute": "none", "micro": 2}
AUTOMODEL = (Row("H100 BF16, Moonlight 16B, EP8", on("h100", 8, batch=256, micro=2, **_MOONLIGHT), 22_898),)
FITTED = Row("1 x H200 BF16, mini", on("h200", 1, ep=1, batch=2, **_MINI), 20_700, "torchtitan")
TORCHTITAN = (Row("4 x H200 BF16, mini, EP4", on("h200", 4, ep=4, batch=8, **_MINI), 20_350, "torchtitan"),)
