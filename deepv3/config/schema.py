"""Typed schema of every knob. Values live in ``configs/``; this file gives types, defaults, units and sources.

Names under ``model`` are the published DeepSeek-V3 config's; ours are added where the config has none.
Each field carries its one-line text in ``metadata['doc']``; ``docs/config.md`` is generated from it.
Sources: "V3 x" is section x of the DeepSeek-V3 technical report, "HW" the ISCA'25 paper, "released" the published code.
"""

from dataclasses import dataclass, field
from typing import Any, Optional


def knob(default: Any, doc: str) -> Any:
    """A dataclass field with its documentation; mutable defaults are copied per instance."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"doc": doc})
    if isinstance(default, type):
        return field(default_factory=default, metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


@dataclass
class RopeScaling:
    """YaRN (V3 4.3), applied to the decoupled rotary parts of queries and of the shared key."""

    factor: float = knob(40.0, "Stretch s of the context: max_position_embeddings = s x original (V3 4.3).")
    original_max_position_embeddings: int = knob(4096, "Context length, tokens, before the extension (V3 4.3).")
    beta_fast: float = knob(32.0, "Turns over the original context above which a frequency is kept (V3 4.3, beta).")
    beta_slow: float = knob(1.0, "Turns below which a frequency is divided by factor (V3 4.3, alpha).")
    mscale: float = knob(1.0, "m in sqrt(t) = 0.1 m ln s + 1; must equal mscale_all_dim (readers disagree otherwise).")
    mscale_all_dim: float = knob(1.0, "m of the softmax scale; multiplies it by (0.1 m ln s + 1)^2 (released).")


@dataclass
class ModelConfig:
    """The architecture, in the published config's vocabulary (V3 4.2), then our training-only additions."""

    vocab_size: int = knob(129280, "Rows of embedding and head, tokens (released).")
    hidden_size: int = knob(7168, "Width d of the residual stream (V3 4.2).")
    intermediate_size: int = knob(18432, "Inner width of the dense SwiGLU layers (released).")
    moe_intermediate_size: int = knob(2048, "Inner width of one expert, routed or shared (V3 4.2).")
    num_hidden_layers: int = knob(61, "Main layers, MTP not counted (V3 4.2).")
    first_k_dense_replace: int = knob(3, "Leading layers with a dense feed-forward instead of experts (V3 4.2).")
    num_attention_heads: int = knob(128, "Attention heads n_h (V3 4.2).")
    q_lora_rank: Optional[int] = knob(1536, "Query latent width d_c'; null for one full q_proj (V3 4.2).")
    kv_lora_rank: int = knob(512, "Key-value latent width d_c (V3 4.2).")
    qk_nope_head_dim: int = knob(128, "Per-head query/key width without rotation d_h (V3 4.2).")
    qk_rope_head_dim: int = knob(
        64, "Rotated per-head width d_h^R, even; the key part is shared by all heads (V3 4.2)."
    )
    v_head_dim: int = knob(128, "Per-head value width (V3 4.2).")
    n_routed_experts: int = knob(256, "Routed experts N_r per MoE layer (V3 4.2).")
    n_shared_experts: int = knob(
        1, "Shared experts N_s, fused in one feed-forward of N_s x moe_intermediate_size (V3 4.2)."
    )
    num_experts_per_tok: int = knob(8, "Routed experts K_r active per token (V3 4.2).")
    n_group: int = knob(8, "Expert groups (nodes); n_routed_experts is divisible by it (V3 4.2).")
    topk_group: int = knob(4, "Groups M a token may reach; score of a group = sum of its two best experts (V3 2.1.2).")
    routed_scaling_factor: float = knob(
        2.5, "Factor on the normalised gates (released; one of V3 4.2's bottleneck factors)."
    )
    rms_norm_eps: float = knob(1e-6, "Epsilon of every RMSNorm (released).")
    rope_theta: float = knob(10000.0, "Base of the rotary frequencies (released).")
    rope_scaling: Optional[RopeScaling] = knob(
        None, "YaRN settings; null is plain RoPE, as in 4K pre-training (V3 4.3)."
    )
    max_position_embeddings: int = knob(
        4096, "Longest position the rope serves, tokens; data.seq_len must not exceed it."
    )
    num_nextn_predict_layers: int = knob(1, "Multi-token-prediction depth D (V3 2.2).")
    initializer_range: float = knob(0.006, "Standard deviation of every initial weight matrix (V3 4.2).")
    latent_scale_q: float = knob(
        1.0, "Factor on the normed query latent (V3 4.2 'scaling factors'; value not published)."
    )
    latent_scale_kv: float = knob(1.0, "Factor on the normed key-value latent (V3 4.2; value not published).")
    attn_out_scale: float = knob(1.0, "Factor on the attention output projection (V3 4.2; value not published).")
    aux_loss_alpha: float = knob(1e-4, "Weight alpha of the sequence-wise balance loss (V3 Eq. 17, 4.2).")
    bias_update_speed: float = knob(1e-3, "gamma: step of the router bias, once per optimizer step (V3 2.1.2, 4.2).")
    mtp_loss_weight: float = knob(0.3, "lambda: weight of the mean MTP loss (V3 Eq. 25, 4.2).")
    force_balance: bool = knob(
        False, "Benchmarks only: ignore the router's choice and spread tokens evenly over experts."
    )


@dataclass
class Segment:
    """One stretch of a curve over tokens seen. Curves start at their base value and hold the last one for ever."""

    shape: str = knob("constant", "constant | linear | cosine: how the value moves over this stretch.")
    tokens: float = knob(0.0, "Length of the stretch, tokens.")
    to: Optional[float] = knob(None, "Value at the end (constant: throughout); null keeps the value reached so far.")


@dataclass
class OptimConfig:
    """AdamW and the curves of V3 4.2, all functions of tokens seen except the warm-up."""

    lr: float = knob(2.2e-4, "Learning rate after warm-up (V3 4.2).")
    warmup_steps: int = knob(2000, "Linear warm-up from 0, optimizer steps (V3 4.2).")
    lr_schedule: list[Segment] = knob([], "Curve of the learning rate over tokens, starting at lr (V3 4.2).")
    bias_update_schedule: list[Segment] = knob([], "Curve of gamma, starting at model.bias_update_speed (V3 4.2).")
    mtp_loss_schedule: list[Segment] = knob([], "Curve of lambda, starting at model.mtp_loss_weight (V3 4.2).")
    beta1: float = knob(0.9, "AdamW beta1 (V3 4.2).")
    beta2: float = knob(0.95, "AdamW beta2 (V3 4.2).")
    eps: float = knob(1e-8, "AdamW epsilon (not stated in the report).")
    weight_decay: float = knob(0.1, "Decoupled weight decay on matrices; norm gains and biases have none (V3 4.2).")
    clip_norm: float = knob(1.0, "Global gradient norm above which gradients are scaled down (V3 4.2).")
    moment_dtype: str = knob("bfloat16", "bfloat16 | float32: storage of both AdamW moments (V3 3.3.3: BF16).")
    ema_decay: float = knob(
        0.0, "Decay of the CPU weight average, per optimizer step; 0 is off (V3 3.2.3; value not stated)."
    )


@dataclass
class SourceConfig:
    """One source of documents, read by the datasets library."""

    path: str = knob("", "Folder, file, glob or hub name; 'python-stdlib' is the running Python's own sources.")
    format: str = knob("auto", "auto | text | parquet | jsonl | arrow | hub: auto goes by the file suffixes.")
    name: Optional[str] = knob(None, "Configuration of a hub dataset.")
    split: str = knob("train", "Split of a hub dataset or a saved dataset dictionary.")
    field: str = knob("text", "Column that holds the document's text.")
    suffixes: list[str] = knob(
        [], "For folders of text: file suffixes taken, such as [.py, .h]; empty takes .txt and .md."
    )
    folders: list[str] = knob([], "Further folders, read with the folder at path as one source.")
    unique: bool = knob(False, "Read files with the same bytes once, the first of them.")
    weight: float = knob(1.0, "Share of training tokens drawn from this source, relative to the other sources.")
    streaming: bool = knob(False, "Read documents while training instead of tokenising them into the cache first.")


@dataclass
class DataConfig:
    """Documents to packed sequences (V3 4.1)."""

    sources: list[SourceConfig] = knob([], "Documents to train on, blended by weight.")
    validation_sources: list[SourceConfig] = knob(
        [], "Documents to validate on; empty splits validation_fraction off sources."
    )
    validation_fraction: float = knob(
        0.01, "Share of each source's documents held out, chosen by a hash of their number."
    )
    tokenizer: Optional[str] = knob(
        None, "Folder or hub name for AutoTokenizer; null trains a byte-level BPE on the sources."
    )
    tokenizer_vocab_size: int = knob(0, "Vocabulary of a trained tokenizer, tokens; 0 takes model.vocab_size.")
    tokenizer_train_bytes: int = knob(20_000_000, "Text read to train the tokenizer, bytes.")
    seq_len: int = knob(4096, "Trained positions per sequence T, tokens (V3 4.2); rows hold T + 1 + MTP depth tokens.")
    fim_rate: float = knob(0.1, "Share of documents rewritten prefix-suffix-middle before packing (V3 4.1).")
    mask_documents: bool = knob(False, "Forbid attention across documents of one sequence (V3 4.1: no mask).")
    bad_documents: str = knob(
        "skip", "skip | stop: what a document that cannot be read does; skipped ones are named and counted."
    )
    cache_dir: str = knob(".cache", "Where trained tokenizers and tokenised data are kept between runs.")
    num_proc: int = knob(0, "Processes that tokenise; 0 takes the machine's cores, at most 8.")
    shuffle: bool = knob(True, "Visit sequences in a seeded random order, another one each epoch.")


@dataclass
class ParallelConfig:
    """The rank grid: world size = pp_size x dp, expert parallelism inside dp (V3 3.2)."""

    pp_size: int = knob(1, "Pipeline ranks; world size must be divisible by it (V3 3.2: 16).")
    ep_size: int = knob(1, "Ranks that share one set of experts; divides dp and n_routed_experts (V3 3.2: 64).")
    schedule: str = knob("1f1b", "1f1b | zb1p | dualpipe | dualpipev: order of forward and backward chunks (V3 3.2.1).")
    layout: str = knob("", "Layers per stage as text, such as E4|4|...|1HM (docs/schedules.md); empty splits evenly.")
    ranks_per_node: int = knob(
        0, "Consecutive ranks with a fast network between them (V3 3.2: 8); 0 takes what torchrun started per node."
    )
    dispatcher: str = knob(
        "all_to_all",
        "all_to_all | symmetric: how tokens reach experts; symmetric goes through memory that a node's ranks share and "
        "no device waits for the host; needs ep_size <= ranks_per_node (docs/expert-parallelism.md).",
    )
    strict: bool = knob(
        False, "Refuse micro-batch counts with which the schedule would run less than fully overlapped."
    )


@dataclass
class PrecisionConfig:
    """Number formats of parameters and GEMMs; master weights and gradients are FP32 throughout (V3 3.3)."""

    name: str = knob("bf16", "fp32 | bf16 | fp8: operands of GEMMs; fp8 has BF16 parameters and activations (V3 3.3).")
    recipe: str = knob("v3", "v3 | block_gradients: formats of fp8; the second is the mistake of V3 B.2, for tests.")
    break_even: float = knob(
        0.0, "fp8: key-value projections with in x out / (in + out) below this stay BF16; 0: none (V3)."
    )


@dataclass
class BatchRamp:
    """Batch size as a function of tokens seen (V3 4.2: 3072 to 15360 over 469B tokens)."""

    start: int = knob(3072, "Sequences per step at the start (V3 4.2).")
    end: int = knob(15360, "Sequences per step from `tokens` on (V3 4.2).")
    tokens: float = knob(469e9, "Length of the ramp, tokens (V3 4.2).")
    increment: int = knob(
        128, "Batch grows in steps of this many sequences, a multiple of dp x micro_batch_size (not stated)."
    )


@dataclass
class TrainConfig:
    """Length, batch, validation and what follows a run."""

    steps: Optional[int] = knob(None, "Optimizer steps after which the run ends; null leaves it to tokens.")
    tokens: Optional[float] = knob(None, "Tokens seen after which the run ends; with steps, whichever comes first.")
    micro_batch_size: int = knob(1, "Sequences per forward pass on one rank (V3: 1).")
    global_batch_size: Optional[int] = knob(None, "Sequences per optimizer step; setting it switches batch_ramp off.")
    batch_ramp: Optional[BatchRamp] = knob(None, "Batch size over tokens, where global_batch_size is null (V3 4.2).")
    resume: str = knob("auto", "auto | never | PATH of a checkpoint: auto takes run_dir's newest complete one.")
    finish: list[str] = knob([], "What follows the run, in order: any of sample, export, verify.")
    deterministic: bool = knob(False, "Refuse kernels whose result depends on the order of threads; slower.")
    cuda_graph: Optional[bool] = knob(
        None, "Start a micro-batch's forward and backward as one CUDA graph; null: where a GPU holds the whole model."
    )
    recompute: str = knob("selective", "none | selective | full: what backward computes again (V3 3.2.3: selective).")
    loss_chunk: int = knob(2048, "Rows of logits that exist at once in the loss, tokens.")
    eval_every: int = knob(1000, "Steps between validations; 0 never validates.")
    eval_sequences: int = knob(64, "Validation sequences read each time.")
    max_skipped_steps: int = knob(20, "Steps in a row with a non-finite gradient norm after which the run stops.")
    hang_seconds: float = knob(
        900.0, "Seconds without a finished step, validation or save after which a run counts as hung; 0 never."
    )
    spike: str = knob("warn", "off | warn | rewind: what a spike of loss or gradient norm does (docs/reliability.md).")
    spike_threshold: float = knob(
        10.0, "Robust standard deviations above the median of the last steps that make a spike."
    )
    spike_window: int = knob(128, "Finished steps that a spike is told by.")
    prompt: str = knob("def main(", "Prompt of finish=[sample].")
    sample_tokens: int = knob(64, "Tokens generated by finish=[sample].")


@dataclass
class CheckpointConfig:
    """When state is saved and how much of it is kept."""

    every: Optional[int] = knob(1000, "Steps between checkpoints; 0 saves only at the end, null never (benchmarks).")
    keep: int = knob(2, "Newest checkpoints kept; older ones are removed after the next is published.")
    keep_every: int = knob(0, "Checkpoints of every so many steps are kept for good beside those; 0 keeps none.")
    asynchronous: bool = knob(True, "Write from a copy in host memory while training goes on; false: training waits.")


@dataclass
class LoggingConfig:
    """Where the figures of a run go besides run_dir/metrics.jsonl."""

    wandb: str = knob("offline", "offline | online | disabled.")
    project: str = knob("deepv3", "wandb project.")
    straggler_ratio: float = knob(
        1.25, "A rank's time a step, as a multiple of the median rank's, from which on it is named as slow; 0 never."
    )
    progress: bool = knob(True, "Show the live line with loss, tokens/s, expert balance and time left.")
    plot_every: int = knob(20, "Steps between refreshes of report.html and the PNGs in run_dir, as far as 2 % allow.")
    profile_steps: list[int] = knob([], "[first, last] step under the profiler, into run_dir/profile/; empty is off.")
    profile_ranks: list[int] = knob([0], "Ranks that profile_steps records, each into files of its own.")
    profile_memory: bool = knob(False, "Record every allocation of profile_steps as well (CUDA only).")


@dataclass
class ClusterConfig:
    """The machines a run uses, as far as software cannot see it."""

    nproc_per_node: int = knob(1, "Processes per node that a sweep (-m) starts for each job.")
    peak_tflops: float = knob(0.0, "BF16 dense peak of one device for MFU, TFLOP/s; 0 looks the device name up.")
    device: str = knob("", "Device type that a plan computes with, a row of deepv3/planner/hardware.py (plan only).")
    devices: int = knob(0, "Devices that a plan spreads the run over; 0 is not known (plan only).")
    network: str = knob(
        "mpft", "mpft | ft2 | ft3: multi-plane, two- or three-layer fat-tree between the nodes of a plan (HW 5.1)."
    )


@dataclass
class Config:
    """A whole run."""

    run_dir: str = knob("runs/default", "Folder that holds everything the run writes.")
    seed: int = knob(0, "Seed of weights, data order and sampling.")
    model: ModelConfig = knob(ModelConfig, "Architecture.")
    data: DataConfig = knob(DataConfig, "Data.")
    optim: OptimConfig = knob(OptimConfig, "Optimizer and curves.")
    parallel: ParallelConfig = knob(ParallelConfig, "Rank grid.")
    precision: PrecisionConfig = knob(PrecisionConfig, "Number formats.")
    train: TrainConfig = knob(TrainConfig, "Training.")
    checkpoint: CheckpointConfig = knob(CheckpointConfig, "Checkpoints.")
    logging: LoggingConfig = knob(LoggingConfig, "Logging.")
    cluster: ClusterConfig = knob(ClusterConfig, "Machines.")
