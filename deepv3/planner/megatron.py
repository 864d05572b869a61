"""Constants of Megatron's software (Megatron-Bridge, Megatron Core, Transformer Engine), by what a recipe switches on.

`megatron` is `report` with Transformer Engine's launches: it calls each local expert's product and quantisation one by
one (nvte_multi_stream_cublas_gemm, split_quantize). One constant, the seconds per launch, is fitted to one row of
Megatron-Bridge; all others of this file are published measurements, none of them of a training run.

`megatron_blackwell` adds what Blackwell's kernels reach, measured alone: dense products by Transformer Engine's
tutorial (B300, operands quantised beforehand), experts' products by torchao (B200), attention by cuDNN frontend (GB200;
GB300 in the two `softmax` constants). Dense rates are taken over the peak of GB200 and GB300 (2.5 and 5 PFLOP/s): such
chips are held by power, not by the clock of their data sheet, and B300's power is about GB200's. Experts' rates,
measured on the chip with least power, are taken over that chip's own peak (4.5). The other reading of each is in its
range.

`megatron_graphs`: recipes that replay attention and routing from CUDA graphs. `megatron_whole`: recipes of 26.06, whose
whole step is one graph and whose experts' products make SwiGLU and quantise (cuDNN's grouped kernels); and
`megatron_whole_fp8` where attention multiplies in MXFP8 as well.

Given up: MXFP8's finer scales (one per 32) cost nothing here beyond what the `traffic` factors of `report` state.
"""

from deepv3.planner import calibration
from deepv3.planner.calibration import Calibration, Value

TE = "Transformer Engine 2.9 to 2.12, grouped_linear.py and extensions/gemm.cpp: a call per expert"
TUTORIAL = "Transformer Engine, gemm_profiling.rst, B300, pre-quantised"
TORCHAO = "torchao, MXFP8 MoE training, B200 at 1000 W, 131,072 rows, 8 experts of V3"
CUDNN = "cudnn-frontend, sdpa_benchmark_training, 2026-04-24, cuDNN 9.22, V3's heads, 4096 tokens, causal"
CAPTURED = "cuda_graph_scope = attn, moe_router, moe_preprocess: replayed"
WHOLE = "cuda_graph_impl = full_iteration"
NORMS = "from report's to what cuDNN's norms reach on GB200 (cudnn-frontend, benchmark/norms: 6.4 of 8 TB/s)"
FUSED = f"fused kernels that no launch holds up: this code's, timed inside training steps on one H200; range: {NORMS}"
HYBRID = "moe_hybridep_num_sms = 32, while tokens travel: a quarter of a step; low end all of it"


def _none(names: str, source: str) -> dict[str, Value]:
    return {name: Value(0, 0, 0, source) for name in names.split()}


MEGATRON = Calibration().changed(
    {
        "launch": Value(49e-6, 57e-6, 44e-6, "fitted: Megatron-Bridge 26.02, 256 B200 MXFP8; range: 25.11 to 26.04"),
        "expert_calls": Value(1, 1, 1, TE),
    },
    "megatron",
)
BLACKWELL = MEGATRON.changed(
    {
        "fp8_dense": Value(0.54, 0.51, 0.60, f"{TUTORIAL}: 2,702 and 2,666 TFLOP/s"),
        "fp8_dense_wgrad": Value(0.53, 0.50, 0.59, f"{TUTORIAL}: 2,663 TFLOP/s"),
        "fp8_grouped": Value(0.51, 0.46, 0.56, f"{TORCHAO}: 2,303 TFLOP/s"),
        "fp8_grouped_dgrad": Value(0.51, 0.455, 0.55, f"{TORCHAO}: 2,286 TFLOP/s"),
        "fp8_grouped_wgrad": Value(0.41, 0.365, 0.50, f"{TORCHAO}: 1,830 TFLOP/s"),
        "bf16_dense": Value(0.59, 0.56, 0.66, f"{TUTORIAL}: 1,504 and 1,441 TFLOP/s"),
        "bf16_dense_wgrad": Value(0.58, 0.55, 0.64, f"{TUTORIAL}: 1,447 TFLOP/s"),
        "bf16_grouped": Value(0.52, 0.46, 0.61, "estimate: to bf16_dense as on H100, 0.64 to 0.72"),
        "attention": Value(0.562, 0.54, 0.62, f"{CUDNN}: 1,406 TFLOP/s on GB200"),
        "attention_backward": Value(0.423, 0.41, 0.46, f"{CUDNN}: 1,057 TFLOP/s on GB200"),
        "softmax": Value(0.23, 0.0, 0.23, f"{CUDNN}: 0.977 ms on GB200, 0.864 on GB300"),
        "softmax_backward": Value(0.15, 0.0, 0.15, f"{CUDNN}: 3.383 ms on GB200, 3.127 on GB300"),
        "comm_sms": Value(
            0, 20, 0, "all-to-alls stand alone: nothing computes beside them; range: kept free throughout"
        ),
    },
    "megatron_blackwell",
)
GRAPHS = BLACKWELL.changed(_none("kernels_forward kernels_backward", CAPTURED), "megatron_graphs")
WHOLE_STEP = GRAPHS.changed(
    _none("launch expert_calls", WHOLE)
    | {
        "fused_experts": Value(1, 1, 1, "cutedsl_fused_grouped_mlp: grouped_gemm_swiglu, grouped_gemm_dswiglu"),
        "comm_sms": Value(8, 32, 0, HYBRID),
        "traffic_attention": Value(2.2, 3.9, 1.2, FUSED),
        "traffic_experts": Value(1.15, 2.2, 1.15, f"{FUSED}; in BF16, since products make the codes here as well"),
    },
    "megatron_whole",
)
WHOLE_STEP_FP8 = WHOLE_STEP.changed(
    {
        "attention": Value(0.77, 0.70, 0.84, f"{CUDNN}: 1,925 TFLOP/s in MXFP8, 2,095 in FP8 on GB200"),
        "attention_backward": Value(0.546, 0.52, 0.68, f"{CUDNN}: 1,364 TFLOP/s in MXFP8, 1,692 in FP8 on GB200"),
        "softmax": Value(0.47, 0.40, 0.47, f"{CUDNN}: 0.714 ms on GB200, 0.546 on GB300"),
        "softmax_backward": Value(0.21, 0.15, 0.21, f"{CUDNN}: 2.620 ms on GB200, 2.348 on GB300"),
        "attention_codes": Value(
            6.7, 6.7, 4.0, "2 read, 1 + 1 written x 1.7: Transformer Engine's MXFP8 quantisation, 4.1 TB/s on B200"
        ),
    },
    "megatron_whole_fp8",
)
BUILT_IN = calibration.BUILT_IN | {cal.name: cal for cal in (MEGATRON, BLACKWELL, GRAPHS, WHOLE_STEP, WHOLE_STEP_FP8)}
"""All sets by name."""
