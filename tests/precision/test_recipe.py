"""The table is what the model does, and what the user may change of it."""

import pytest
import torch
from test_weights8 import MODEL

from deepv3.config.compose import compose
from deepv3.config.ranges import CHOICES
from deepv3.config.schema import Config
from deepv3.config.validate import validate
from deepv3.errors import ConfigError
from deepv3.model.transformer import build_model
from deepv3.precision.formats import BF16, E5M6, SQUARES, TILES_POW2
from deepv3.precision.recipe import (
    ATTENTION_OUTPUT,
    COMBINE_GRADIENT,
    EXPERT_INPUT,
    GRADIENT,
    RECIPES,
    SWIGLU_INPUT,
    V3,
    recipe_of,
)


def fp8(model=MODEL, **changes) -> Config:
    cfg = Config(model=model)
    cfg.precision.name = "fp8"
    for name, value in changes.items():
        setattr(cfg.precision, name, value)
    return cfg


def test_every_matrix_of_the_model_is_a_row_and_multiplies_as_the_row_says():
    for cfg in (fp8(), fp8(break_even=1e9), fp8(recipe="block_gradients")):
        recipe = recipe_of(cfg)
        for name, module in build_model(cfg, "meta").named_modules():
            weight = getattr(module, "weight", None)
            if weight is not None and weight.ndim > 1:
                role = name.rsplit(".", 1)[-1]
                assert (getattr(module, "fp8", None) is not None) == recipe.fp8(role), name


def test_without_fp8_there_is_no_recipe():
    assert recipe_of(Config(model=MODEL)) is None


def test_power_of_two_scales_are_on_the_tensors_that_the_report_names():
    """V3 3.3.3: W_O's kept input, the experts' input, the gradient dispatched; and what is kept of SwiGLU."""
    pow2 = {role for role, format in V3.items() if format.pow2}
    assert pow2 == {ATTENTION_OUTPUT, EXPERT_INPUT, COMBINE_GRADIENT, SWIGLU_INPUT}
    assert V3[ATTENTION_OUTPUT] == E5M6 and V3[EXPERT_INPUT] == V3[COMBINE_GRADIENT] == TILES_POW2


def test_the_wrong_recipe_differs_in_gradients_only():
    differs = {role: format for role, format in RECIPES["block_gradients"].items() if format != V3[role]}
    assert differs == {GRADIENT: SQUARES, COMBINE_GRADIENT: BF16}


def test_the_schema_offers_the_recipes_there_are():
    assert set(CHOICES["precision.recipe"]) == set(RECIPES)


def test_break_even_keeps_small_key_value_projections_in_bf16():
    """V3: 7168 x 576 has 533, 512 x 32768 has 504."""
    for limit, kept in ((0.0, set()), (510.0, {"kv_b_proj"}), (600.0, {"kv_a_proj_with_mqa", "kv_b_proj"})):
        formats = recipe_of(fp8(Config().model, break_even=limit)).formats
        assert {role for role in formats if formats[role] != V3[role]} == kept


@pytest.mark.parametrize(
    "field, value, told",
    [
        ("hidden_size", 40, "model.hidden_size = 40"),
        ("moe_intermediate_size", 24, "model.moe_intermediate_size = 24"),
        ("qk_rope_head_dim", 8, "kv_lora_rank \\+ qk_rope_head_dim = 24"),
        ("v_head_dim", 4, "v_head_dim = 8"),
    ],
)
def test_widths_that_fp8_rows_cannot_have_are_refused_with_what_mends_them(field, value, told):
    cfg = compose(["+config=tiny", "precision=fp8"])
    for name in ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "qk_rope_head_dim"):
        setattr(cfg.model, name, getattr(MODEL, name))
    validate(cfg, 1, training=False)
    setattr(cfg.model, field, value)
    with pytest.raises(ConfigError, match=f"{told}.* 16 .*precision=bf16"):
        validate(cfg, 1, training=False)
    cfg.precision.name = "bf16"
    validate(cfg, 1, training=False)


def test_presets_train_in_the_formats_they_are_for():
    assert compose(["+config=v3_671b"]).precision.name == "fp8"
    validate(compose(["+config=tiny", "precision=fp8"]), 1)
    assert torch.bfloat16 == next(build_model(fp8(), "meta").parameters()).dtype
