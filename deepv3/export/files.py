"""config.json, generation_config.json and how the small files of an export are written and read.

config.json is written by hand in the spelling of transformers 4 (``torch_dtype``, ``rope_theta``, ``rope_scaling``),
which every reader takes; transformers' own ``save_pretrained`` leaves out fields that vLLM and SGLang read unguarded
(``scoring_func``, ``topk_method``), and without them the router silently computes something else.
"""

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from deepv3.config.schema import ModelConfig, RopeScaling
from deepv3.errors import CheckpointError, ConfigError
from deepv3.export import fp8

MARKER = "deepv3_export.json"
PORTABLE_EPS = 1e-6


def hf_config(cfg: ModelConfig, dtype: str, bos: int | None, eos: int | None) -> dict[str, Any]:
    """config.json for `cfg`, weights in `dtype`: bfloat16, float32 or float8. bos, eos: token ids or None.

    Raises ConfigError for what the format cannot say.
    """
    if cfg.rms_norm_eps != PORTABLE_EPS:
        raise ConfigError(
            f"model.rms_norm_eps = {cfg.rms_norm_eps}, but transformers computes the norms of the latents with "
            f"{PORTABLE_EPS:g} whatever config.json says: a model can be exported only with model.rms_norm_eps=1e-6"
        )
    if cfg.n_shared_experts < 1:
        raise ConfigError(
            "model.n_shared_experts = 0, but every reader builds at least one shared expert: a model can be exported "
            "only with model.n_shared_experts=1 or more"
        )
    if dtype == "float8":
        fp8.require_blockable(cfg)
    own = asdict(cfg)
    same = {f.name: own[f.name] for f in fields(ModelConfig) if f.name in _SAME}
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **same,
        "num_key_value_heads": cfg.num_attention_heads,
        "routed_scaling_factor": float(cfg.routed_scaling_factor),  # transformers 5 refuses a JSON integer
        "rope_scaling": _rope_scaling(cfg.rope_scaling),
        "max_position_embeddings": reach(cfg),
        "rope_interleave": True,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "moe_router_dtype": "float32",
        "seq_aux": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "ep_size": 1,
        "pretraining_tp": 1,
        "use_cache": True,
        "torch_dtype": "bfloat16" if dtype == "float8" else dtype,
        "bos_token_id": bos,
        "eos_token_id": eos,
        **({"quantization_config": fp8.QUANTIZATION_CONFIG} if dtype == "float8" else {}),
    }


# Fields whose name and value are the same on both sides.
_SAME = {
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "first_k_dense_replace", "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group",
    "topk_group", "routed_scaling_factor", "rms_norm_eps", "rope_theta", "max_position_embeddings",
    "num_nextn_predict_layers", "initializer_range", "aux_loss_alpha",
}  # fmt: skip


def reach(cfg: ModelConfig) -> int:
    """max_position_embeddings as readers need it: under YaRN always factor x original.

    A run may train on less of it (the 32K phase has factor 40), but transformers 4 takes the ratio of the two lengths
    for the factor, whatever `factor` says.
    """
    yarn = cfg.rope_scaling
    return cfg.max_position_embeddings if yarn is None else int(yarn.factor * yarn.original_max_position_embeddings)


def _rope_scaling(yarn: RopeScaling | None) -> dict[str, Any] | None:
    """Both spellings of the type (old remote code reads the first, vLLM refuses unequal ones) and both mscales."""
    return None if yarn is None else {"type": "yarn", "rope_type": "yarn", **asdict(yarn)}


def generation_config(bos: int | None, eos: int | None, pad: int | None) -> dict[str, Any]:
    """generation_config.json: greedy by default, as deepv3.generate.sample is. bos, eos, pad: token ids or None."""
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    return {"_from_model_config": False, **ids, "do_sample": False}


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, on disk before the call returns."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Text, on disk before the call returns."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; CheckpointError names the file where it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, not an object")
    return value
