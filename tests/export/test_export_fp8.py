"""The FP8 export against the released checkpoint's list, a quantiser written out block by block, and transformers."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import BLOCKED, SMALL

from deepv3.config.schema import ModelConfig
from deepv3.errors import CheckpointError, ConfigError
from deepv3.export import fp8
from deepv3.export.hf import encode, export, planned, units
from deepv3.export.load import load_export
from deepv3.export.verify import verify
from deepv3.model.transformer import Transformer


@pytest.fixture(scope="module")
def released() -> dict[str, torch.Tensor]:
    """What an FP8 export of the 671B model would store, as meta tensors by name."""
    cfg = ModelConfig()
    state = Transformer(cfg, device="meta", dtype=torch.bfloat16).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return {name: tensor for unit in units(shapes, cfg, "float8") for name, tensor in unit.tensors.items()}


def test_fp8_export_of_v3_has_the_released_names_and_elements(released):
    assert len(released) == 91_991
    assert sum(tensor.numel() for tensor in released.values()) == 684_531_386_000


def test_fp8_export_of_v3_has_the_released_formats_and_scale_grids(released):
    scales = {name for name in released if name.endswith("_scale_inv")}
    codes = {name for name, tensor in released.items() if tensor.dtype == torch.float8_e4m3fn}
    assert {name.removesuffix("_scale_inv") for name in scales} == codes
    for name in codes:
        rows, columns = released[name].shape
        scale = released[name + "_scale_inv"]
        assert scale.dtype == torch.float32 and scale.shape == (math.ceil(rows / 128), math.ceil(columns / 128))
    assert released["model.layers.3.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 56)
    assert released["model.layers.61.mlp.experts.255.up_proj.weight_scale_inv"].shape == (16, 56)
    wide = {name for name, t in released.items() if t.dtype == torch.float32} - scales
    assert wide == {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in range(3, 62)}
    rest = {name.split(".")[-2] for name in released.keys() - codes - scales - wide}
    assert rest == {
        "embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm", "q_a_layernorm",
        "kv_a_layernorm", "gate", "enorm", "hnorm", "eh_proj", "head",
    }  # fmt: skip


def test_the_plan_is_what_is_written():
    for dtype in ("bfloat16", "float8", "float32"):
        for name, shape in {
            "a.down_proj.weight": (130, 260),
            "a.norm.weight": (7,),
            "a.mlp.gate.weight": (3, 9),
        }.items():
            plan, made = planned(name, shape, dtype), encode(name, torch.ones(shape), dtype)
            assert {k: (t.shape, t.dtype) for k, t in plan.items()} == {k: (t.shape, t.dtype) for k, t in made.items()}


def test_every_block_is_scaled_by_its_own_largest_value():
    weight = torch.randn(200, 300) * torch.logspace(-3, 1, 300)
    weight[128:, :128] = 0
    codes, scales = fp8.quantise(weight)
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == weight.shape and scales.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            rows, columns = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            block, scale = weight[rows, columns], scales[i, j]
            assert scale > 0 and torch.isclose(scale, block.abs().max().clamp(min=2.0**-80) / 448, rtol=1e-6)
            value = codes[rows, columns].float() * scale
            # E4M3 has 4 significant bits: half a step is 1/16 of the value, or of the smallest normal 2^-6.
            assert ((value - block).abs() <= block.abs().clamp(min=scale * 2**-6) / 16 * 1.001).all()
            assert torch.equal(fp8.dequantise_blocks(codes, scales)[rows, columns], value)


def test_gaussian_weights_lose_two_to_three_percent():
    weight = torch.randn(256, 512)
    error = fp8.dequantise_blocks(*fp8.quantise(weight)) - weight
    assert 0.02 < (error.norm() / weight.norm()).item() < 0.03


@pytest.mark.parametrize(
    "fields", [{}, {"q_lora_rank": None}, {"num_nextn_predict_layers": 2}, {"latent_scale_q": 1.7}]
)
def test_fp8_export_computes_the_checkpoints_rounded_weights(fields, make_run, tmp_path):
    run = make_run(**BLOCKED | fields)
    figures = verify(export(run.dir, tmp_path / "hf", "float8"), run.dir)
    assert figures["logits_relative_difference"] <= 1e-5 and figures["mtp_logits_relative_difference"] <= 1e-5
    exact = run.model.logits(tokens := torch.randint(320, (2, 20)))
    rounded = load_export(tmp_path / "hf").logits(tokens)
    assert ((rounded - exact).norm() / exact.norm()).item() > 1e-3, "FP8 must differ from the checkpoint"


def test_fp8_export_is_quantised_from_the_master_and_says_so(make_run, tmp_path):
    run = make_run(**BLOCKED)
    folder = export(run.dir, tmp_path / "hf", "float8")
    tensors = load_file(folder / "model.safetensors")
    down = run.model.mtp[0].block.mlp.experts.down_proj.weight[3]
    name = "model.layers.3.mlp.experts.3.down_proj.weight"
    codes, scales = fp8.quantise(down.detach())
    assert torch.equal(tensors[name].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(tensors[name + "_scale_inv"], scales)
    hf = json.loads((folder / "config.json").read_text())
    assert hf["torch_dtype"] == "bfloat16" and hf["quantization_config"] == {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]
    }  # fmt: skip
    card = (folder / "README.md").read_text()
    assert "| dtype | float8 |" in card and "weight_scale_inv" in card


def times(name: str, factor: float):
    def change(tensors) -> None:
        tensors[name] *= factor

    return change


def codes_of(name: str, other: str):
    """The codes of one matrix with the scales of another."""

    def change(tensors) -> None:
        tensors[name + "_scale_inv"] = tensors[other + "_scale_inv"]

    return change


EXPERTS = "model.layers.1.mlp.experts."
MISTAKES = {
    "a scale doubled": (times("model.layers.1.self_attn.o_proj.weight_scale_inv", 2.0), "hf: logits differ"),
    "a scale of the MTP layer halved": (times("model.layers.3.self_attn.o_proj.weight_scale_inv", 0.5), "mtp logits"),
    "a scale of an expert that the sample does not choose": (
        times(EXPERTS + "2.up_proj.weight_scale_inv", 2.0),
        "experts.2.up_proj.weight is not what",
    ),
    "the scales of another expert": (
        codes_of(EXPERTS + "0.down_proj.weight", EXPERTS + "1.down_proj.weight"),
        "differ",
    ),
    "a scale missing": (
        lambda t: t.pop(EXPERTS + "3.up_proj.weight_scale_inv"),
        "3.up_proj.weight_scale_inv is missing",
    ),
    "a scale too many": (
        lambda t: t.update({"lm_head.weight_scale_inv": torch.ones(3, 1)}),
        "lm_head.weight_scale_inv",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_verify_refuses_an_fp8_export_with(mistake, make_run, tmp_path):
    change, message = MISTAKES[mistake]
    run = make_run(**BLOCKED)
    folder = export(run.dir, tmp_path / "hf", "float8")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        verify(folder, run.dir)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"moe_intermediate_size": 192}, r"model.moe_intermediate_size = 192 = 1 x 128 \+ 64"),
        ({"q_lora_rank": 100}, "model.q_lora_rank = 100"),
        ({"kv_lora_rank": 64}, "model.kv_lora_rank = 64"),
        ({"num_attention_heads": 3}, "model.num_attention_heads x model.v_head_dim = 192"),
        (vars(SMALL), "model.hidden_size = 32.*model.intermediate_size = 48.*dtype=bfloat16"),
    ],
)
def test_sizes_that_readers_cannot_block_are_refused(fields, message, make_run, tmp_path):
    run = make_run(**BLOCKED | fields)
    with pytest.raises(ConfigError, match=message):
        export(run.dir, tmp_path / "hf", "float8")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
