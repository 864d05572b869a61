"""An export computes what the checkpoint computes, by transformers' word; and an export that does not is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import SMALL

from deepv3.config.schema import RopeScaling
from deepv3.errors import CheckpointError, ResourceError
from deepv3.export.hf import export
from deepv3.export.load import load_export
from deepv3.export.ties import choice_margin
from deepv3.export.verify import MEMORY, verify
from deepv3.generate.sample import generate

ARCHITECTURES = {
    "v3": {},
    "without query latent": {"q_lora_rank": None},
    "yarn": {"rope_scaling": RopeScaling(factor=4.0, original_max_position_embeddings=16)},
    "yarn trained short of its reach": {
        "rope_scaling": RopeScaling(factor=8.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=0.7)
    },
    "one group": {"n_group": 1, "topk_group": 1},
    "every group open": {"topk_group": 4},
    "two shared experts": {"n_shared_experts": 2},
    "without MTP": {"num_nextn_predict_layers": 0},
    "two MTP depths": {"num_nextn_predict_layers": 2},
    "moe only": {"first_k_dense_replace": 0},
    "whole scaling factor": {"routed_scaling_factor": 2.0},
    "scaled latents": {"latent_scale_q": 1.7, "latent_scale_kv": 0.6, "attn_out_scale": 0.5},
}


def from_pretrained(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_computes_the_checkpoints_logits(name, dtype, make_run, tmp_path):
    run = make_run(**ARCHITECTURES[name])
    figures = verify(export(run.dir, tmp_path / "hf", dtype), run.dir)
    assert figures["logits_relative_difference"] <= 1e-5
    assert figures["logits_positions"] >= 100
    if run.cfg.model.num_nextn_predict_layers:
        assert figures["mtp_logits_relative_difference"] <= 1e-5
    assert "nothing missing" in figures["summary"]


@pytest.mark.parametrize("depth", [1, 2])
def test_transformers_own_mtp_module_computes_our_mtp_logits(depth, make_run, tmp_path):
    modeling = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(modeling, "MtpModel"):
        pytest.skip("this transformers has no MTP module")
    run = make_run(num_nextn_predict_layers=depth)
    theirs = from_pretrained(export(run.dir, tmp_path / "hf", "float32"))
    # transformers finds MTP weights through a pattern that names layer 61 only.
    theirs._keys_to_ignore_on_load_unexpected = [
        rf"model\.layers\.{SMALL.num_hidden_layers + k}.*" for k in range(depth)
    ]
    mtp = modeling.MtpModel.from_pretrained(theirs)
    tokens = torch.randint(SMALL.vocab_size, (3, 20 + depth), generator=torch.Generator().manual_seed(depth))
    ours = run.model.logits(tokens, mtp=True)
    with torch.no_grad():
        hidden = theirs.model(tokens[:, :20]).last_hidden_state
        for k, layer in enumerate(mtp.layers, 1):
            embedded = mtp.embed_tokens(tokens[:, k : k + 20])
            positions = torch.arange(20)[None]
            tables = mtp.rotary_emb(embedded, position_ids=positions)
            mask = mtp.create_masks_for_mtp_layer(k - 1, embedded, None, positions)["attention_mask"]
            hidden = layer(embedded, hidden, tables, mask, positions, None)
            difference = (mtp._project_to_logits(hidden) - ours[k]).abs().max()
            assert difference <= 1e-5 * ours[k].abs().max(), f"depth {k}"


def test_generate_of_transformers_equals_ours(make_run, tmp_path):
    run = make_run()
    theirs = from_pretrained(export(run.dir, tmp_path / "hf", "float32"))
    tokens = torch.randint(SMALL.vocab_size, (3, 9), generator=torch.Generator().manual_seed(3))
    continued = theirs.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=16,
        min_new_tokens=16,
        eos_token_id=[],
        pad_token_id=0,
    )
    assert torch.equal(continued, generate(run.model, tokens, 16))


def test_export_of_bfloat16_holds_the_rounded_weights_and_fp32_biases(make_run, tmp_path):
    run = make_run()
    tensors = load_file(export(run.dir, tmp_path / "hf", "bfloat16") / "model.safetensors")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert {name for name, t in tensors.items() if t.dtype == torch.float32} == {
        bias, bias.replace(".1.", ".2."), bias.replace(".1.", ".3.")
    }  # fmt: skip
    assert all(t.dtype == torch.bfloat16 for name, t in tensors.items() if not name.endswith("bias"))
    up = run.model.layers[1].mlp.experts.gate_up_proj.weight[5, SMALL.moe_intermediate_size :]
    assert torch.equal(tensors["model.layers.1.mlp.experts.5.up_proj.weight"], up.bfloat16())


def test_biases_are_shifted_to_a_smallest_of_zero_and_keep_their_differences(make_run, tmp_path):
    run = make_run()
    tensors = load_file(export(run.dir, tmp_path / "hf") / "model.safetensors")
    for layer, router in zip((1, 2, 3), run.model.routers()):
        shifted, bias = (
            tensors[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"],
            router.e_score_correction_bias,
        )
        assert bias.min() < 0 and shifted.min() == 0
        torch.testing.assert_close(shifted - shifted[0], bias - bias[0], rtol=0, atol=1e-6)


def test_every_expert_keeps_its_number(make_run, tmp_path):
    run = make_run()
    tensors = load_file(export(run.dir, tmp_path / "hf", "float32") / "model.safetensors")
    experts = run.model.mtp[0].block.mlp.experts
    inner = SMALL.moe_intermediate_size
    for e in range(SMALL.n_routed_experts):
        name = f"model.layers.3.mlp.experts.{e}."
        assert torch.equal(tensors[name + "gate_proj.weight"], experts.gate_up_proj.weight[e, :inner])
        assert torch.equal(tensors[name + "up_proj.weight"], experts.gate_up_proj.weight[e, inner:])
        assert torch.equal(tensors[name + "down_proj.weight"], experts.down_proj.weight[e])


def test_averaged_weights_are_exported_on_request(make_run, tmp_path):
    run = make_run(average=True)
    last = load_file(export(run.dir, tmp_path / "last", "float32") / "model.safetensors")
    mean = load_file(export(run.dir, tmp_path / "mean", "float32", ema=True) / "model.safetensors")
    assert torch.equal(mean["lm_head.weight"], last["lm_head.weight"] / 2)
    assert verify(tmp_path / "mean", run.dir)["logits_relative_difference"] <= 1e-5


def test_float32_export_read_back_is_the_checkpoint(make_run, tmp_path):
    run = make_run(num_nextn_predict_layers=2)
    read = load_export(export(run.dir, tmp_path / "hf", "float32")).state_dict()
    for name, tensor in run.model.state_dict().items():
        if name.endswith("bias"):
            tensor = tensor - tensor.min()
        assert torch.equal(read[name], tensor), name


def edit(folder, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)


def swap(a: str, b: str):
    def change(tensors) -> None:
        tensors[a], tensors[b] = tensors[b], tensors[a]

    return change


def half_split_rotary(tensors) -> None:
    """The rotary rows of the key as a framework that rotates halves has them."""
    weight = tensors[LAYER + "self_attn.kv_a_proj_with_mqa.weight"]
    latent, rotary = weight.split([SMALL.kv_lora_rank, SMALL.qk_rope_head_dim])
    tensors[LAYER + "self_attn.kv_a_proj_with_mqa.weight"] = torch.cat([latent, rotary[0::2], rotary[1::2]])


def hidden_state_first(tensors) -> None:
    """eh_proj in the report's order of its inputs."""
    tensors[MTP + "eh_proj.weight"] = tensors[MTP + "eh_proj.weight"].roll(SMALL.hidden_size, 1)


LAYER, MTP = "model.layers.1.", "model.layers.3."
EXPERTS, BIAS = LAYER + "mlp.experts.", LAYER + "mlp.gate.e_score_correction_bias"
MISTAKES = {
    "gate and up swapped": (swap(EXPERTS + "0.gate_proj.weight", EXPERTS + "0.up_proj.weight"), "logits differ"),
    "two experts swapped": (swap(EXPERTS + "1.down_proj.weight", EXPERTS + "6.down_proj.weight"), "logits differ"),
    "a bias negated": (lambda t: t[BIAS].neg_(), "logits differ"),
    "rotary halves": (half_split_rotary, "logits differ"),
    "the hidden state first in eh_proj": (hidden_state_first, "mtp logits differ"),
    "enorm and hnorm swapped": (swap(MTP + "enorm.weight", MTP + "hnorm.weight"), "mtp logits differ"),
    "a norm missing": (lambda t: t.pop(LAYER + "input_layernorm.weight"), "missing.*layers.1.input_layernorm"),
    "a bias missing": (lambda t: t.pop(BIAS), "missing.*e_score_correction_bias"),
    "an MTP tensor missing": (lambda t: t.pop(MTP + "eh_proj.weight"), "eh_proj.weight is missing"),
    "a stray tensor": (lambda t: t.update({LAYER + "stray": torch.zeros(2)}), "unexpected.*stray"),
    "an MTP copy that differs": (lambda t: t[MTP + "embed_tokens.weight"].mul_(2), "embed_tokens.weight differs"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_verify_refuses_an_export_with(mistake, make_run, tmp_path):
    change, message = MISTAKES[mistake]
    run = make_run()
    folder = export(run.dir, tmp_path / "hf", "float32")
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        verify(folder, run.dir)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("routed_scaling_factor", 1.0, "logits differ"),
        ("topk_group", 1, "logits differ"),
        ("rope_theta", 500.0, "logits differ"),
        ("norm_topk_prob", False, "norm_topk_prob = False, not True"),
    ],
)
def test_verify_refuses_a_config_that_computes_something_else(field, value, message, make_run, tmp_path):
    run = make_run()
    folder = export(run.dir, tmp_path / "hf", "float32")
    hf = json.loads((folder / "config.json").read_text()) | {field: value}
    (folder / "config.json").write_text(json.dumps(hf))
    with pytest.raises(CheckpointError, match=message):
        verify(folder, run.dir)


def test_verify_against_another_step_is_refused(make_run, tmp_path):
    folder = export(make_run(step=7).dir, tmp_path / "hf")
    run = make_run(step=8)
    with pytest.raises(CheckpointError, match="of step 7.*step 8"):
        verify(folder, run.dir)


def test_choice_margin_is_the_distance_to_another_choice():
    cfg = SMALL  # 8 experts in 4 groups of 2, 2 groups open, 3 experts
    scores = torch.tensor([[0.9, 0.8, 0.5, 0.2, 0.6, 0.09, 0.1, 0.1]])  # groups 1.7, 0.7, 0.69, 0.2
    assert choice_margin(scores, cfg).item() == pytest.approx(0.01, abs=1e-6)
    scores = torch.tensor([[0.9, 0.8, 0.5, 0.48, 0.1, 0.1, 0.1, 0.1]])  # the cut between the third and fourth expert
    assert choice_margin(scores, cfg).item() == pytest.approx(0.02, abs=1e-6)


def test_a_model_that_the_host_cannot_hold_is_refused_before_loading(make_run, tmp_path, monkeypatch):
    folder = export(make_run().dir, tmp_path / "hf")
    monkeypatch.setitem(MEMORY, "bfloat16", 1e9)
    with pytest.raises(ResourceError, match="parameters in FP32, which takes .* GiB available"):
        verify(folder)


def test_an_export_whose_checkpoint_is_gone_is_compared_with_its_own_values(make_run, tmp_path):
    figures = verify(export(make_run().dir, tmp_path / "hf"))
    assert figures["logits_relative_difference"] <= 1e-5 and "mtp_logits_max_difference" not in figures
