"""Ranges and enumerations of single fields, as tables: what each value may be on its own, whatever the others are."""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from deepv3.config.schema import Config

CHOICES: dict[str, tuple[str, ...]] = {
    "optim.moment_dtype": ("bfloat16", "float32"),
    "data.bad_documents": ("skip", "stop"),
    "parallel.dispatcher": ("all_to_all", "symmetric"),
    "parallel.schedule": ("1f1b", "zb1p", "dualpipe", "dualpipev"),
    "precision.name": ("fp32", "bf16", "fp8"),
    "precision.recipe": ("v3", "block_gradients"),
    "train.recompute": ("none", "selective", "full"),
    "train.spike": ("off", "warn", "rewind"),
    "train.finish": ("sample", "export", "verify"),  # each entry of the list
    "logging.wandb": ("offline", "online", "disabled"),
    "cluster.network": ("mpft", "ft2", "ft3"),
}

# 0 <= value <= 1, or < 1 where 1 would switch the mechanism off for ever.
FRACTIONS = ("data.fim_rate",)
BELOW_ONE = ("data.validation_fraction", "optim.beta1", "optim.beta2", "optim.ema_decay")

# 0 has a meaning of its own (off, or "derive it"); every other number must be positive.
ZERO_ALLOWED = frozenset({
    "seed", "model.first_k_dense_replace", "model.n_shared_experts", "model.num_nextn_predict_layers",
    "model.aux_loss_alpha", "model.bias_update_speed", "model.mtp_loss_weight", "data.tokenizer_vocab_size",
    "data.num_proc", "parallel.ranks_per_node", "optim.lr", "optim.warmup_steps", "optim.weight_decay", "train.steps",
    "train.tokens",
    "train.eval_every", "checkpoint.every", "checkpoint.keep_every",
    "train.hang_seconds", "logging.straggler_ratio", "logging.plot_every", "cluster.peak_tflops",
    "cluster.devices", "precision.break_even", *FRACTIONS, *BELOW_ONE,
})  # fmt: skip


def range_problems(cfg: Config) -> Iterator[str]:
    """One message per field whose value is impossible on its own."""
    for path, value in _leaves(cfg):
        if path in CHOICES:
            for item in value if isinstance(value, list) else [value]:
                if item not in CHOICES[path]:
                    yield f"{path} = {item!r} is none of {', '.join(CHOICES[path])}"
        elif isinstance(value, bool) or not isinstance(value, int | float):
            continue
        elif not math.isfinite(value):
            yield f"{path} = {value} is not a finite number"
        elif value < 0 or (value == 0 and path not in ZERO_ALLOWED):
            yield f"{path} = {value} is out of range; it must be {'0 or more' if path in ZERO_ALLOWED else 'above 0'}"
        elif path in FRACTIONS and value > 1:
            yield f"{path} = {value} is out of range; it is a share, from 0 to 1"
        elif path in BELOW_ONE and value >= 1:
            yield f"{path} = {value} is out of range; it must be at least 0 and below 1"
    if not cfg.run_dir:
        yield "run_dir is empty; give the folder that holds what the run writes"


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every field; lists are values (the entries of lists are checked by validate.py)."""
    for f in fields(node):
        value = getattr(node, f.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value
