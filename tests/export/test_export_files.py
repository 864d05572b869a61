"""config.json field by field, and the figures of the model card."""

import json
from dataclasses import replace

import pytest
from small_run import SMALL

from deepv3.config.schema import ModelConfig, RopeScaling
from deepv3.errors import CheckpointError, ConfigError
from deepv3.export import card, files
from deepv3.export.foreign import read_config


def test_config_json_of_v3_has_the_released_values():
    hf = files.hf_config(ModelConfig(max_position_embeddings=4096), "bfloat16", bos=0, eos=1)
    released = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280,
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
        "first_k_dense_replace": 3, "moe_layer_freq": 1, "num_nextn_predict_layers": 1, "num_attention_heads": 128,
        "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False, "rope_theta": 10000.0,
        "rope_scaling": None, "rope_interleave": True, "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "pretraining_tp": 1, "use_cache": True,
    }  # fmt: skip
    assert {name: hf.get(name, "absent") for name in released} == released
    assert {"head_dim", "auto_map", "quantization_config"}.isdisjoint(hf)


def test_whole_routed_scaling_factor_is_written_as_a_float():
    text = json.dumps(files.hf_config(replace(SMALL, routed_scaling_factor=1), "float32", 0, 1))
    assert '"routed_scaling_factor": 1.0' in text


def test_no_mtp_and_no_query_latent_are_said_in_so_many_words():
    hf = files.hf_config(replace(SMALL, num_nextn_predict_layers=0, q_lora_rank=None), "float32", 0, 1)
    assert hf["num_nextn_predict_layers"] == 0 and hf["q_lora_rank"] is None


def test_yarn_names_its_type_twice_and_both_mscales():
    yarn = RopeScaling(factor=40.0, original_max_position_embeddings=4096)
    hf = files.hf_config(replace(SMALL, rope_scaling=yarn, max_position_embeddings=32768), "float32", 0, 1)
    assert hf["rope_scaling"] == {
        "type": "yarn", "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    }  # fmt: skip
    # A shorter training length must not become the ratio that transformers 4 takes for the factor.
    assert hf["max_position_embeddings"] == 163840


@pytest.mark.parametrize("yarn", [None, RopeScaling(factor=4.0, original_max_position_embeddings=16)])
def test_architecture_is_read_back_from_config_json(yarn):
    cfg = replace(SMALL, rope_scaling=yarn)
    hf = json.loads(json.dumps(files.hf_config(cfg, "float32", 0, 1)))
    assert read_config(hf) == cfg


def test_a_config_json_that_lacks_fields_is_refused():
    hf = files.hf_config(SMALL, "float32", 0, 1)
    del hf["n_group"]
    with pytest.raises(CheckpointError, match="lacks n_group"):
        read_config(hf)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05.*1e-06.*rms_norm_eps=1e-6"),
        ({"n_shared_experts": 0}, "n_shared_experts = 0.*n_shared_experts=1"),
    ],
)
def test_what_the_format_cannot_say_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        files.hf_config(replace(SMALL, **fields), "float32", 0, 1)


def test_model_card_holds_the_figures_of_the_exported_step_only(tmp_path):
    rows = [{"step": s, "loss": 9.0 - s, "loss_main": 8.0 - s, "loss_mtp": 7.5 - s, "lr": 1e-3} for s in (1, 2, 3)]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 2, "loss": 1'  # a run that goes on
    (tmp_path / "metrics.jsonl").write_text(text)
    (tmp_path / "validation.jsonl").write_text('{"step": 2, "val_loss": 6.25}\n')
    figures = card.run_figures(tmp_path, 2)
    assert figures == {"loss": 7.0, "loss_main": 6.0, "loss_mtp": 5.5, "lr": 1e-3, "validation_loss": 6.25}
    text = card.model_card("mine", SMALL, {"training_step": 2}, figures)
    assert "| validation loss | 6.25 |" in text and "| training step | 2 |" in text
    assert text.startswith("---\nlicense:") and "library_name: transformers\n" in text.split("---")[1]


def test_model_card_of_a_run_without_metrics_is_whole(tmp_path):
    assert card.run_figures(tmp_path, 2) == {}
    assert "DeepSeek-V3" in card.model_card("mine", SMALL, {}, {})
