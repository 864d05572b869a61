"""What software reaches of the hardware: fractions and times measured once, as data with sources and ranges.

A `Calibration` is a set of constants. Several are built in, each from its own source; a file of measured rows replaces
those constants it has rows for (`measured.py`). Fractions are of the nominal peak of the multiprocessors in use.

`report` is DeepSeek's own software on H800. Its GEMM and attention fractions are kernel durations of their published
trace (profile-data, train.json; 112 of 132 multiprocessors) against the FLOPs of the shapes; the traffic factors come
from the trace's *forward* slots alone, so its backward slots check them. One constant is fitted to the training-time
table (HW Table 4): `interference`, from the time of its overlapped pairs. All other figures of that table are
predictions; docs/planner.md lists them.

`torchtitan` changes what differs in TorchTitan 0.2.2: its attention is FlexAttention, its optimizer state FP32, and one
constant, the seconds per layer and pass outside the modelled kernels, is fitted to its run on one H200.

The sets of Megatron's software are in `megatron.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple


class Value(NamedTuple):
    """A constant with the range it may lie in; low is the value that makes a plan slower or larger, if it matters."""

    value: float
    low: float
    high: float
    source: str


def constant(default: Value) -> Value:
    """A dataclass field holding a constant."""
    return field(default=default)  # type: ignore[no-any-return]


TRACE = "kernel durations of profile-data's train.json, H800"
OWN_H100 = "measured on H100, torch 2.11, cuBLAS 13.1, cuDNN 9.19"


@dataclass(frozen=True)
class Calibration:
    """All constants. GEMM classes: dense (one matrix) or grouped (experts), FP8 or BF16, by which of the three GEMMs.

    Fractions of peak: the names below. traffic_*: bytes moved over the fewest bytes that fused kernels need, in
    attention's, the experts' and the head's memory-bound kernels. hbm, nvlink, nic: fraction of the nominal bandwidth.
    interference: an overlapped pair's time over that of its slots. sync_nic, sync_nvlink: seconds that an all-to-all
    takes besides moving bytes (notification, skew). comm_sms: multiprocessors kept for communication where there is
    expert parallelism. layer_overhead: seconds per layer and pass (forward, backward) that no modelled kernel explains:
    host waits, unfused operations. launch: seconds the host takes per kernel, on a core of 4 GHz. kernels_forward,
    kernels_backward: launches of a layer and pass besides those per expert. expert_calls: launches per local expert for
    each of its products (two forward, four backward) and, in FP8, each operand quantised (two and two). update_bytes:
    the optimizer's traffic per parameter of the shard. codes_bytes: traffic per FP8 parameter that a rank holds, once
    a step, of making its codes. imbalance: the busiest rank's expert rows over the mean. workspace: bytes of context,
    NCCL and allocator slack.

    attention is a fraction of the BF16 peak whatever the core's format. softmax, softmax_backward: the share of the
    core's time that a device with twice the exponentials per clock halves. attention_codes: traffic per element that
    the core reads, of making its FP8 operands; 0 where it reads BF16. fused_experts: 1 where SwiGLU and quantisation
    are part of the experts' products, so that they move nothing of their own; 0 where they are kernels.
    """

    name: str = "report"
    fp8_dense: Value = constant(Value(0.555, 0.51, 0.60, f"{TRACE}: 923 (MLA), 955 (shared) TFLOP/s of 1679"))
    fp8_dense_wgrad: Value = constant(Value(0.40, 0.38, 0.42, f"{TRACE}: 633-691 TFLOP/s"))
    fp8_grouped: Value = constant(Value(0.607, 0.575, 0.625, f"{TRACE}: 1050 and 965 TFLOP/s"))
    fp8_grouped_dgrad: Value = constant(Value(0.528, 0.50, 0.56, f"{TRACE}: 1826 GFLOP in 2.16 ms, 913 in 0.93 ms"))
    fp8_grouped_wgrad: Value = constant(Value(0.48, 0.455, 0.505, f"{TRACE}: 684-741 TFLOP/s less the sums"))
    bf16_dense: Value = constant(Value(0.72, 0.64, 0.82, f"{OWN_H100}: 629-815 TFLOP/s of 989"))
    bf16_dense_wgrad: Value = constant(Value(0.70, 0.64, 0.78, f"{OWN_H100}: taken as bf16_dense less the FP32 sum"))
    bf16_grouped: Value = constant(Value(0.64, 0.56, 0.71, f"{OWN_H100}: grouped_mm 601-701 TFLOP/s"))
    attention: Value = constant(Value(0.659, 0.65, 0.67, f"{TRACE}: 551-555 TFLOP/s causal, forward"))
    attention_backward: Value = constant(Value(0.524, 0.50, 0.55, f"{TRACE}: 440 TFLOP/s with its pre and post"))
    softmax: Value = constant(Value(0.0, 0.0, 0.0, "no device of this set has more exponentials than another"))
    softmax_backward: Value = constant(Value(0.0, 0.0, 0.0, "as softmax"))
    attention_codes: Value = constant(Value(0.0, 0.0, 0.0, "BF16 attention (V3 3.3.1)"))
    fused_experts: Value = constant(Value(0, 0, 0, "SwiGLU and quantisation are kernels of the trace"))
    traffic_attention: Value = constant(
        Value(3.9, 3.4, 4.1, f"{TRACE}: forward slot less GEMMs and attention, 1.49 ms")
    )
    traffic_experts: Value = constant(Value(2.2, 1.8, 2.4, f"{TRACE}: forward slot less GEMMs, 1.6 ms"))
    traffic_head: Value = constant(Value(1.0, 1.3, 1.0, "three passes over the logits; embedding left out"))
    hbm: Value = constant(Value(0.895, 0.85, 0.92, f"{OWN_H100}: copy 3.00 of 3.35 TB/s"))
    nvlink: Value = constant(Value(0.80, 0.70, 0.82, "HW 4.3: 160 of 200 GB/s; H200 all-to-all 308, copy 369 of 450"))
    nic: Value = constant(Value(0.80, 0.70, 1.0, "HW 4.3: 40 of 50 GB/s; DeepEP 43-58 GB/s 'logical'"))
    interference: Value = constant(
        Value(1.05, 1.12, 1.03, "fitted: 97 pairs in 13.95 s (HW T4); the trace alone: 1.03")
    )
    sync_nic: Value = constant(Value(1.0e-3, 0.8e-3, 1.4e-3, f"{TRACE}: shortest waits of its all-to-alls"))
    sync_nvlink: Value = constant(Value(60e-6, 40e-6, 100e-6, "4 x H200: all_to_all of 1 MiB takes 58 us"))
    comm_sms: Value = constant(Value(20, 20, 20, "V3 3.2.2: 20 of 132 multiprocessors"))
    layer_overhead: Value = constant(Value(0.0, 0.0, 0.0, "the trace's gaps are in the slots' times"))
    launch: Value = constant(Value(8e-6, 15e-6, 5e-6, "assumed: seconds the host takes to launch a kernel from Python"))
    kernels_forward: Value = constant(Value(45, 45, 45, f"{TRACE}: about what it shows"))
    kernels_backward: Value = constant(Value(90, 90, 90, f"{TRACE}: about what it shows"))
    expert_calls: Value = constant(Value(0, 0, 0, "one grouped kernel for all experts"))
    update_bytes: Value = constant(Value(22.0, 22.0, 22.0, "FP32 gradient and master, BF16 moments and weight"))
    codes_bytes: Value = constant(Value(4.0, 5.0, 4.0, "BF16 read, E4M3 written twice"))
    imbalance: Value = constant(Value(1.0, 1.2, 1.0, "force-balanced trace; real skew is inside interference"))
    workspace: Value = constant(Value(2.5e9, 3.5e9, 1.5e9, "assumed: CUDA context, NCCL channels, fragmentation"))

    def constants(self) -> dict[str, Value]:
        """Name -> constant."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}

    def changed(self, constants: Mapping[str, Value], name: str = "") -> "Calibration":
        """The same with other values for some constants, and a name of its own if one is given."""
        return replace(self, **{"name": name or self.name, **constants})  # type: ignore[arg-type]


FITTED_H200 = "fitted: 8,192 tokens of mini in 0.396 s on one H200 (20.0-21.4 K tokens/s)"
TORCHTITAN = Calibration().changed(
    {
        "attention": Value(0.295, 0.28, 0.31, f"{OWN_H100}: FlexAttention forward 292 TFLOP/s"),
        "attention_backward": Value(0.14, 0.13, 0.15, f"{OWN_H100}: FlexAttention forward and backward 167 TFLOP/s"),
        "update_bytes": Value(28.0, 28.0, 36.0, "FP32 gradient, weight and both moments: 16 read, 12 written"),
        "layer_overhead": Value(8.1e-3, 8.5e-3, 7.6e-3, FITTED_H200),
    },
    "torchtitan",
)
BUILT_IN = {cal.name: cal for cal in (Calibration(), TORCHTITAN)}
"""By name; `megatron.BUILT_IN` has more."""
