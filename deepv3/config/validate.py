"""Combinations that cannot work, refused before any work starts.

Each check is an equation between two fields; its message prints both sides and the values that mend it. All problems
are reported at once. Ranges and enumerations of single fields are tables (ranges.py) and come first, so that the
equations may divide by what they are given.
"""

from collections.abc import Iterator
from pathlib import Path

from deepv3.config.ranges import range_problems
from deepv3.config.schema import BatchRamp, Config, ModelConfig, RopeScaling, Segment
from deepv3.errors import ConfigError

FP8_UNIT = 16  # elements of one byte; what the kernels load at once
SHARED_UNIT = 16  # bytes; what a lane copies at once
FORMATS = ("auto", "text", "parquet", "jsonl", "arrow", "hub")  # of one source of documents


def validate(cfg: Config, world_size: int, training: bool = True) -> None:
    """Raise ConfigError listing every impossible combination.

    world_size: ranks of the run. training: False for what reads a config without data or checkpoint (a plan on paper).
    """
    problems = list(range_problems(cfg))
    if not problems:
        problems += [*_model(cfg.model), *_rope(cfg), *_curves(cfg), *_grid(cfg, world_size), *_train(cfg)]
        problems += [*_precision(cfg)]
        problems += [*_data(cfg), *_resume(cfg), *_profile(cfg)] if training else []
    if problems:
        raise ConfigError("\n".join(problems))


def _profile(cfg: Config) -> Iterator[str]:
    steps, ranks = cfg.logging.profile_steps, cfg.logging.profile_ranks
    if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        yield f"logging.profile_steps = {steps} is no window; give [first,last] with 1 <= first <= last, or []"
    if cfg.logging.profile_memory and not steps:
        yield "logging.profile_memory = true without logging.profile_steps; say which: logging.profile_steps=[5,6]"
    if steps and (not ranks or min(ranks) < 0):
        yield f"logging.profile_ranks = {ranks} names no rank; give ranks from 0 on, such as [0]"


def _indivisible(name: str, value: int, by: str, divisor: int, fix: str) -> str:
    whole, rest = divmod(value, divisor)
    return f"{name} = {value} is not divisible by {by} = {divisor} ({value} = {whole} x {divisor} + {rest}); {fix}"


def _near_divisors(value: int, divisor: int) -> str:
    """The divisors of ``value`` on either side of ``divisor``: 10, 4 -> '2 or 5'."""
    divisors = [d for d in range(1, value + 1) if value % d == 0]
    below = [d for d in divisors if d < divisor][-1:]
    return " or ".join(str(d) for d in below + [d for d in divisors if d > divisor][:1])


def _model(m: ModelConfig) -> Iterator[str]:
    experts, group, per_token = m.n_routed_experts, m.n_group, m.num_experts_per_tok
    if m.first_k_dense_replace > m.num_hidden_layers:
        yield (
            f"model.first_k_dense_replace = {m.first_k_dense_replace} exceeds model.num_hidden_layers = "
            f"{m.num_hidden_layers}; set model.first_k_dense_replace={m.num_hidden_layers} or less"
        )
    if m.qk_rope_head_dim % 2:
        yield (
            f"model.qk_rope_head_dim = {m.qk_rope_head_dim} is odd, and rotary dimensions come in pairs; "
            f"set model.qk_rope_head_dim={m.qk_rope_head_dim + 1}"
        )
    if m.topk_group > group:
        yield f"model.topk_group = {m.topk_group} exceeds model.n_group = {group}; set model.topk_group={group} or less"
    if experts % group:
        fix = f"set model.n_group={_near_divisors(experts, group)}"
        yield _indivisible("model.n_routed_experts", experts, "model.n_group", group, fix)
        return
    if group > 1 and experts // group < 2:
        yield (
            f"model.n_group = {group} leaves {experts // group} of model.n_routed_experts = {experts} per group, and a "
            f"group's score is the sum of its two best; set model.n_group={experts // 2} or less, or 1"
        )
    capacity = min(m.topk_group, group) * (experts // group)
    if per_token > capacity:
        yield (
            f"model.num_experts_per_tok = {per_token} exceeds the {capacity} experts a token may reach "
            f"(model.topk_group = {m.topk_group} groups x {experts // group} experts); set "
            f"model.num_experts_per_tok={capacity} or less, or raise model.topk_group or model.n_routed_experts"
        )


def _precision(cfg: Config) -> Iterator[str]:
    """FP8 rows begin at multiples of 16 bytes; a last block of fewer than 128 is filled with zeros."""
    if cfg.precision.name != "fp8":
        return
    m = cfg.model
    widths = {name: getattr(m, name) for name in ("hidden_size", "kv_lora_rank", "moe_intermediate_size")}
    if m.q_lora_rank is not None:
        widths["q_lora_rank"] = m.q_lora_rank
    if m.first_k_dense_replace:
        widths["intermediate_size"] = m.intermediate_size
    sums = {
        "num_attention_heads x (qk_nope_head_dim + qk_rope_head_dim)": m.qk_nope_head_dim + m.qk_rope_head_dim,
        "num_attention_heads x (qk_nope_head_dim + v_head_dim)": m.qk_nope_head_dim + m.v_head_dim,
        "num_attention_heads x v_head_dim": m.v_head_dim,
    }
    widths |= {name: m.num_attention_heads * width for name, width in sums.items()}
    widths["kv_lora_rank + qk_rope_head_dim"] = m.kv_lora_rank + m.qk_rope_head_dim
    for name, width in widths.items():
        if width % FP8_UNIT:
            fix = f"take a multiple of {FP8_UNIT}, or precision=bf16"
            yield _indivisible(f"model.{name}", width, "the unit of FP8 rows", FP8_UNIT, fix)


def _rope(cfg: Config) -> Iterator[str]:
    reach, scaling = cfg.model.max_position_embeddings, cfg.model.rope_scaling
    if cfg.data.seq_len > reach:
        yield (
            f"data.seq_len = {cfg.data.seq_len} is beyond the rope's reach model.max_position_embeddings = {reach}; "
            f"set data.seq_len={reach} or less, or raise model.max_position_embeddings (with model.rope_scaling to "
            f"extend a trained model)"
        )
    if scaling is not None:
        yield from _yarn(scaling, reach)


def _yarn(scaling: RopeScaling, reach: int) -> Iterator[str]:
    limit = int(scaling.factor * scaling.original_max_position_embeddings)
    product = (
        f"factor x original_max_position_embeddings = {scaling.factor:g} x {scaling.original_max_position_embeddings}"
    )
    if reach > limit:
        yield (
            f"model.max_position_embeddings = {reach} exceeds model.rope_scaling's {product} = {limit}; set "
            f"model.max_position_embeddings={limit} or raise model.rope_scaling.factor"
        )
    if scaling.beta_fast <= scaling.beta_slow:
        yield (
            f"model.rope_scaling.beta_fast = {scaling.beta_fast:g} is not above beta_slow = {scaling.beta_slow:g}; "
            f"V3 has 32 and 1"
        )
    if scaling.mscale != scaling.mscale_all_dim:
        yield (
            f"model.rope_scaling.mscale = {scaling.mscale:g} differs from mscale_all_dim = {scaling.mscale_all_dim:g}, "
            f"which readers of an export treat differently; set both to the same value"
        )


def _curves(cfg: Config) -> Iterator[str]:
    for name in ("lr_schedule", "bias_update_schedule", "mtp_loss_schedule"):
        segments: list[Segment] = getattr(cfg.optim, name)
        for i, segment in enumerate(segments):
            path = f"optim.{name}[{i}]"
            if segment.shape not in ("constant", "linear", "cosine"):
                yield f"{path}.shape = {segment.shape!r} is none of constant, linear, cosine"
            elif segment.shape != "constant" and segment.to is None:
                yield f"{path} is {segment.shape} but has no value to go to; set its `to`"
            if not 0 < segment.tokens < float("inf"):
                yield f"{path}.tokens = {segment.tokens:g} is no length; give a positive number of tokens"
            if segment.to is not None and not 0 <= segment.to < float("inf"):
                yield f"{path}.to = {segment.to:g} is not a finite value of 0 or more"


def _grid(cfg: Config, world_size: int) -> Iterator[str]:
    pp, ep, m = cfg.parallel.pp_size, cfg.parallel.ep_size, cfg.model
    if pp > m.num_hidden_layers:
        yield (
            f"parallel.pp_size = {pp} exceeds model.num_hidden_layers = {m.num_hidden_layers}, and a stage needs a "
            f"layer; set parallel.pp_size={m.num_hidden_layers} or less"
        )
        return
    if world_size % pp:
        fix = f"start a multiple of {pp} ranks or set parallel.pp_size={_near_divisors(world_size, pp)}"
        yield _indivisible("the world size", world_size, "parallel.pp_size", pp, fix)
        return
    dp = world_size // pp
    ranks = f"the data-parallel size (world size {world_size} / parallel.pp_size {pp})"
    if m.n_routed_experts % ep:
        fix = f"set parallel.ep_size={_near_divisors(m.n_routed_experts, ep)}"
        yield _indivisible("model.n_routed_experts", m.n_routed_experts, "parallel.ep_size", ep, fix)
    elif dp % ep:
        fix = f"start a multiple of {pp * ep} ranks or set parallel.ep_size={_near_divisors(dp, ep)}"
        yield _indivisible(ranks, dp, "parallel.ep_size", ep, fix)
    yield from _shared_memory(cfg)
    yield from _batches(cfg, dp)


def _shared_memory(cfg: Config) -> Iterator[str]:
    """Whether rows can travel through memory that the ranks of a node share."""
    parallel = cfg.parallel
    if parallel.dispatcher != "symmetric":
        return
    if 0 < parallel.ranks_per_node < parallel.ep_size:
        yield (
            f"parallel.ep_size = {parallel.ep_size} exceeds parallel.ranks_per_node = {parallel.ranks_per_node}, and "
            f"parallel.dispatcher = symmetric works inside a node; set parallel.ep_size={parallel.ranks_per_node} or "
            f"less, or parallel.dispatcher=all_to_all"
        )
    size = 4 if cfg.precision.name == "fp32" else 2
    if cfg.model.hidden_size * size % SHARED_UNIT:
        fix = "take another width, or parallel.dispatcher=all_to_all"
        name = f"model.hidden_size x {size} bytes"
        yield _indivisible(name, cfg.model.hidden_size * size, "the unit of shared rows in bytes", SHARED_UNIT, fix)


def _batches(cfg: Config, dp: int) -> Iterator[str]:
    train = cfg.train
    unit = train.micro_batch_size * dp
    by = f"train.micro_batch_size x data-parallel size ({train.micro_batch_size} x {dp})"
    named: dict[str, int] = {}
    if train.global_batch_size is not None:
        named["train.global_batch_size"] = train.global_batch_size
    elif train.batch_ramp is not None:
        unfit = [size for size in ramp_sizes(train.batch_ramp) if size % unit]
        named |= {f"train.batch_ramp's step of {size} sequences": size for size in unfit[:3]}  # of up to 97
    else:
        yield "train.global_batch_size and train.batch_ramp are both null; set train.global_batch_size=N sequences"
    if train.eval_every:
        named["train.eval_sequences"] = train.eval_sequences
    for name, size in named.items():
        if size % unit:
            multiples = f"{size // unit * unit} or {(size // unit + 1) * unit}" if size > unit else str(unit)
            fix = f"take {multiples} sequences, {_other_grid(cfg, size, dp)}or another train.micro_batch_size"
            yield _indivisible(name, size, by, unit, fix)


def _other_grid(cfg: Config, size: int, dp: int) -> str:
    """The nearest smaller data-parallel size that the batch fits, and the pp_size that keeps the number of ranks."""
    pp, rows = cfg.parallel.pp_size, size // cfg.train.micro_batch_size
    fits = max((d for d in range(1, dp) if rows % d == 0), default=0)
    if size % cfg.train.micro_batch_size or not fits:
        return ""
    same = f", or parallel.pp_size={pp * dp // fits} on as many" if pp * dp % fits == 0 else ""
    experts = "" if fits % cfg.parallel.ep_size == 0 else "; parallel.ep_size must divide it"
    return f"or a data-parallel size of {fits} ({pp * fits} ranks{same}{experts}), "


def ramp_sizes(ramp: BatchRamp) -> list[int]:
    """Every batch size, in sequences, that a ramp passes through: start, start + increment, ..., end."""
    return [*range(ramp.start, ramp.end, ramp.increment), ramp.end]


def _train(cfg: Config) -> Iterator[str]:
    train = cfg.train
    if train.steps is None and train.tokens is None:
        yield "train.steps and train.tokens are both null, so the run has no end; set one of them"
    if train.spike == "rewind" and not cfg.checkpoint.every:
        yield (
            f"train.spike = rewind winds back to the state of the last save, and checkpoint.every = "
            f"{cfg.checkpoint.every} never saves under way; set checkpoint.every=N steps or train.spike=warn"
        )
    parallel = cfg.parallel
    if train.cuda_graph and (parallel.pp_size, parallel.ep_size, parallel.schedule == "dualpipev") != (1, 1, False):
        yield (
            f"train.cuda_graph = true records a whole model on one device, and parallel.pp_size = {parallel.pp_size}, "
            f"parallel.ep_size = {parallel.ep_size}, parallel.schedule = {parallel.schedule} cut it up; set "
            "train.cuda_graph=null, or both sizes to 1 with parallel.schedule=1f1b"
        )
    ramp = train.batch_ramp
    if ramp is not None and ramp.end < ramp.start:
        yield f"train.batch_ramp.end = {ramp.end} is below its start = {ramp.start}; a batch only grows"
    if "verify" in train.finish and "export" not in train.finish[: train.finish.index("verify")]:
        yield f"train.finish = {train.finish} verifies an export that does not exist; put export before verify"
    if train.finish and cfg.checkpoint.every is None:
        yield f"train.finish = {train.finish} reads a checkpoint, and checkpoint.every = null saves none; set it to 0"
    if len(set(train.finish)) < len(train.finish):
        yield f"train.finish = {train.finish} names a stage twice; name each once"


def _resume(cfg: Config) -> Iterator[str]:
    resume = cfg.train.resume
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        yield f"train.resume = {resume} is no folder; give auto, never or the path of a checkpoint"


def _data(cfg: Config) -> Iterator[str]:
    data, vocabulary = cfg.data, cfg.model.vocab_size
    if not data.sources:
        yield "data.sources is empty; give e.g. data.sources=[{path: /corpus}]"
    for name in ("sources", "validation_sources"):
        for i, source in enumerate(getattr(data, name)):
            if not source.path:
                yield f"data.{name}[{i}].path is empty; give a folder, file, glob or hub name"
            if source.format not in FORMATS:
                yield f"data.{name}[{i}].format = {source.format!r} is none of {', '.join(FORMATS)}"
            if not 0 < source.weight < float("inf"):
                yield f"data.{name}[{i}].weight = {source.weight:g} is not positive; leave the source out instead"
    if data.tokenizer_vocab_size > vocabulary:
        yield (
            f"data.tokenizer_vocab_size = {data.tokenizer_vocab_size} exceeds model.vocab_size = {vocabulary}; lower "
            f"it, or set model.vocab_size={data.tokenizer_vocab_size} or more"
        )
    if cfg.train.eval_every and not data.validation_fraction and not data.validation_sources:
        yield (
            f"train.eval_every = {cfg.train.eval_every} but data.validation_fraction = 0 and data.validation_sources "
            f"is empty; give one of them, or train.eval_every=0"
        )
