"""config.json of DeepSeek-V3 models by other hands: both spellings give one architecture, anything else is refused."""

import json
from dataclasses import replace

import pytest
from small_run import SMALL

from deepv3.config.schema import RopeScaling
from deepv3.errors import CheckpointError
from deepv3.export import files
from deepv3.export.foreign import read_config

YARN = RopeScaling(factor=4.0, original_max_position_embeddings=16)


def written(**fields) -> dict:
    return json.loads(json.dumps(files.hf_config(replace(SMALL, **fields), "float32", 0, 1)))


def as_version_5(hf: dict) -> dict:
    """How transformers 5 saves it: rope_parameters, and fields left out that it takes for granted."""
    scaling = hf.pop("rope_scaling") or {}
    hf["rope_parameters"] = {"rope_type": "default", "rope_theta": hf.pop("rope_theta"), **scaling}
    for name in ("architectures", "scoring_func", "topk_method", "moe_layer_freq", "torch_dtype", "aux_loss_alpha"):
        hf.pop(name)
    return hf


@pytest.mark.parametrize("yarn", [None, YARN])
def test_both_spellings_of_the_rotary_settings_are_one_architecture(yarn):
    cfg = replace(SMALL, rope_scaling=yarn, rope_theta=5000.0)
    old = written(rope_scaling=yarn, rope_theta=5000.0)
    assert read_config(old) == cfg
    assert read_config(as_version_5(dict(old))) == cfg
    both = old | {"rope_parameters": as_version_5(dict(old))["rope_parameters"]}
    assert read_config(both) == cfg


def test_no_query_latent_is_null_or_zero():
    assert read_config(written(q_lora_rank=None)).q_lora_rank is None
    assert read_config(written() | {"q_lora_rank": 0}).q_lora_rank is None


def test_without_an_original_length_yarn_starts_from_the_whole_one_as_transformers_does():
    hf = written(rope_scaling=YARN)
    del hf["rope_scaling"]["original_max_position_embeddings"]
    scaling = read_config(hf).rope_scaling
    assert scaling is not None and scaling.original_max_position_embeddings == hf["max_position_embeddings"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            r"'llama' model \(LlamaForCausalLM\).*deepsee",
        ),
        ({"model_type": None}, "None model"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax', not 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"norm_topk_prob": False}, "norm_topk_prob = False, not True"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05, not 1e-06"),
        ({"num_key_value_heads": 1}, "num_key_value_heads = 1, not 2"),
        ({"n_group": None}, "lacks n_group"),
        ({"hidden_size": "wide"}, "hidden_size='wide'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "of type 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "mscale = None and mscale_all_dim = None"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 0.7}},
            "mscale_all_dim = 0.7",
        ),
        ({"rope_scaling": {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0}}, "without a factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 1.2}}, "attention_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "novelty": 3}}, "with novelty"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}, "rope_parameters say"),
    ],
)
def test_what_this_model_does_not_compute_is_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        read_config(written() | change)
