"""config.json of any DeepSeek-V3 checkpoint -> our architecture, or a refusal that names what we do not compute.

Both spellings of the rotary settings are read: ``rope_theta`` and ``rope_scaling`` (transformers 4, what we write), and
``rope_parameters`` (what transformers 5 saves). Fields that only say what every DeepSeek-V3 does may be absent, since
transformers' own ``save_pretrained`` leaves several out; where they are there they must say it.
"""

from dataclasses import fields
from typing import Any

from deepv3.config.schema import ModelConfig, RopeScaling
from deepv3.config.typed import build
from deepv3.errors import CheckpointError, ConfigError

MODEL_TYPE = "deepseek_v3"
# What an exported model computes whatever its sizes; the value is also what an absent field means.
FIXED: dict[str, Any] = {
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "hidden_act": "silu",
    "attention_bias": False, "tie_word_embeddings": False, "moe_layer_freq": 1, "rope_interleave": True,
    "rms_norm_eps": 1e-6,
}  # fmt: skip
NEEDED = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "first_k_dense_replace", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
    "v_head_dim", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group",
    "topk_group", "routed_scaling_factor", "max_position_embeddings",
)  # fmt: skip
OPTIONAL = ("num_nextn_predict_layers", "initializer_range", "aux_loss_alpha")  # absent: our default
YARN = {f.name for f in fields(RopeScaling)}
HARMLESS = {"type", "rope_type", "rope_theta", "truncate", "attention_factor", "partial_rotary_factor"}


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Our architecture. Raises CheckpointError for another architecture, an absent field, or what we cannot compute.

    num_nextn_predict_layers is what the file says; the tensors decide (folder.py).
    """
    kind = hf.get("model_type")
    if kind != MODEL_TYPE:
        raise CheckpointError(
            f"config.json is of a {kind!r} model ({', '.join(hf.get('architectures') or ['no architecture named'])}); "
            f"only {MODEL_TYPE!r} has the layers of this project's model"
        )
    fixed = FIXED | {"num_key_value_heads": hf.get("num_attention_heads")}
    wrong = [f"{k} = {hf[k]!r}, not {value!r}" for k, value in fixed.items() if hf.get(k) not in (None, value)]
    if wrong:
        raise CheckpointError(f"config.json says {'; '.join(wrong)}: this project's model does not compute that")
    lacking = [name for name in NEEDED if hf.get(name) is None]
    lacking += ["q_lora_rank"] if "q_lora_rank" not in hf else []
    if lacking:
        raise CheckpointError(f"config.json lacks {', '.join(lacking)}: damaged, or not a whole config")
    values = {name: hf[name] for name in (*NEEDED, *OPTIONAL) if hf.get(name) is not None}
    values["q_lora_rank"] = hf["q_lora_rank"] or None  # DeepSeek's own code writes 0 for none
    values["rope_theta"], yarn = _rope(hf)
    try:
        cfg = build(ModelConfig, values)
    except ConfigError as error:
        raise CheckpointError(f"config.json: {error}") from None
    cfg.rope_scaling = yarn
    return cfg


def _rope(hf: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and YaRN settings, from whichever spelling is there; raises where both are and they disagree."""
    found = []
    if "rope_parameters" in hf:
        new = hf["rope_parameters"] or {}
        found.append((float(new.get("rope_theta", 10000.0)), _yarn(new, hf)))
    if "rope_theta" in hf or "rope_scaling" in hf or not found:
        found.append((float(hf.get("rope_theta", 10000.0)), _yarn(hf.get("rope_scaling") or {}, hf)))
    if len(found) == 2 and found[0] != found[1]:
        raise CheckpointError(f"config.json: rope_parameters say {found[0]}, rope_theta and rope_scaling {found[1]}")
    return found[0]


def _yarn(given: dict[str, Any], hf: dict[str, Any]) -> RopeScaling | None:
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return None
    reason = None
    if kind != "yarn":
        reason = f"of type {kind!r}; this project's model knows default and yarn"
    elif unknown := sorted(given.keys() - YARN - HARMLESS):
        reason = f"with {', '.join(unknown)}, which this project's model does not know"
    elif given.get("truncate") is False or given.get("attention_factor") is not None:
        reason = "with truncate=false or an attention_factor, which this project's model does not compute"
    elif not given.get("mscale") or given["mscale"] != given.get("mscale_all_dim"):
        reason = (
            f"with mscale = {given.get('mscale')} and mscale_all_dim = {given.get('mscale_all_dim')}; only two equal "
            "values mean the same to every reader"
        )
    elif "factor" not in given:
        reason = "without a factor"
    if reason:
        raise CheckpointError(f"config.json has rotary settings {reason}")
    original = given.get("original_max_position_embeddings") or hf["max_position_embeddings"]
    values = {name: given[name] for name in YARN if given.get(name) is not None}
    return RopeScaling(**values | {"original_max_position_embeddings": int(original)})
