"""Import is export backwards, from every spelling of the format; a damaged or foreign folder leaves nothing behind."""

import importlib.util
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import BLOCKED, SMALL

from deepv3.checkpoint.reader import Reader
from deepv3.data.tokenizer import read_tokenizer, save_tokenizer, train
from deepv3.errors import CheckpointError, ConfigError, ResourceError
from deepv3.export import fp8
from deepv3.export.hf import export
from deepv3.export.importer import import_hf
from deepv3.export.load import load_export

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHAPES = {
    "v3": {},
    "without query latent": {"q_lora_rank": None},
    "without MTP": {"num_nextn_predict_layers": 0},
    "two MTP depths": {"num_nextn_predict_layers": 2},
    "two shared experts": {"n_shared_experts": 2},
    "scaled latents": {"latent_scale_q": 1.7, "attn_out_scale": 0.5},
}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def checkpoint(run_dir: Path) -> Reader:
    reader = Reader(run_dir / "checkpoints" / "step-00000000")
    assert reader.verify() == ([], [])
    return reader


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a folder of one file; change takes and gives a dictionary."""
    tensors = change(load_file(folder / WEIGHTS))
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def reconfigure(folder: Path, **fields) -> None:
    hf = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(hf))


# -- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", SHAPES)
def test_an_export_imported_and_exported_again_is_the_same_tensor_for_tensor(name, dtype, make_run, tmp_path):
    first = export(make_run(**SHAPES[name]).dir, tmp_path / "hf", dtype)
    made = import_hf(first, tmp_path / "imported")
    again = export(made.path, tmp_path / "again", dtype)
    assert same(tensors_of(first), tensors_of(again))
    assert json.loads((first / "config.json").read_text()) == json.loads((again / "config.json").read_text())
    assert (first / "tokenizer.json").read_text() == (again / "tokenizer.json").read_text()


def test_an_fp8_export_comes_back_as_the_values_it_stands_for(make_run, tmp_path):
    first = export(make_run(**BLOCKED).dir, tmp_path / "hf", "float8")
    made = import_hf(first, tmp_path / "imported")
    stored, again = tensors_of(first), tensors_of(export(made.path, tmp_path / "again", "float32"))
    assert {n for n in stored if not n.endswith("_scale_inv")} == again.keys()
    for name, value in again.items():
        scale = stored.get(name + "_scale_inv")
        wanted = stored[name].float() if scale is None else fp8.dequantise_blocks(stored[name], scale)
        assert torch.equal(value, wanted), name


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_a_float32_export_imported_is_the_checkpoint_up_to_the_biases_shift(shard_bytes, make_run, tmp_path):
    run = make_run(num_nextn_predict_layers=2)
    made = import_hf(export(run.dir, tmp_path / "hf", "float32"), tmp_path / "imported", shard_bytes)
    reader = checkpoint(made.path)
    assert len(reader.manifest.shards) == 1 if shard_bytes > 10**6 else len(reader.manifest.shards) > 10
    own = Reader(run.checkpoint)
    assert reader.shapes == own.shapes and set(reader.buffers) == set(own.buffers)
    for name in own.shapes:
        assert torch.equal(reader.read(name), own.read(name)), name
        assert not reader.read(name, "exp_avg").any() and not reader.read(name, "exp_avg_sq").any()
    for name in own.buffers:
        bias = own.buffer(name)
        assert torch.equal(reader.buffer(name), bias - bias.min())


def test_an_imported_model_routes_as_the_exported_one(make_run, tmp_path):
    run = make_run()
    made = import_hf(export(run.dir, tmp_path / "hf", "float32"), tmp_path / "imported")
    imported = load_export(export(made.path, tmp_path / "again", "float32"))
    tokens = torch.randint(SMALL.vocab_size, (4, 40))
    routings = [model.trunk(tokens, model.layout(4, 40, tokens.device))[1] for model in (run.model, imported)]
    assert len(routings[0]) == 2
    for ours, theirs in zip(*routings):
        assert torch.equal(ours.indices, theirs.indices)


# -- spellings -------------------------------------------------------------------------------------------------------


def fused(tensors: dict) -> dict:
    """One tensor a layer for all experts, as transformers 5 holds them."""
    out = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in {name.split("experts.")[0] for name in tensors if ".mlp.experts." in name}:
        for suffix in ("", "_scale_inv"):
            parts = {
                part: [tensors[f"{layer}experts.{e}.{part}_proj.weight{suffix}"] for e in range(SMALL.n_routed_experts)]
                for part in ("gate", "up", "down")
                if f"{layer}experts.0.{part}_proj.weight{suffix}" in tensors
            }
            if parts:
                pairs = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"])]
                out[f"{layer}experts.gate_up_proj{suffix}"] = torch.stack(pairs)
                out[f"{layer}experts.down_proj{suffix}"] = torch.stack(parts["down"])
    return out


def bf16_bias(tensors: dict) -> dict:
    return {name: tensor.bfloat16() if name.endswith("bias") else tensor for name, tensor in tensors.items()}


def without_copies(tensors: dict) -> dict:
    copies = ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")
    return {name: tensor for name, tensor in tensors.items() if name not in copies}


def with_inv_freq(tensors: dict) -> dict:
    return tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}


@pytest.mark.parametrize("change", [fused, without_copies, with_inv_freq], ids=lambda change: change.__name__)
def test_every_spelling_is_the_same_checkpoint(change, make_run, tmp_path):
    folder = export(make_run().dir, tmp_path / "hf", "float32")
    plain = import_hf(folder, tmp_path / "plain")
    rewrite(folder, change)
    other = import_hf(folder, tmp_path / "other")
    a, b = checkpoint(plain.path), checkpoint(other.path)
    assert all(torch.equal(a.read(name), b.read(name)) for name in a.shapes)


def test_fused_fp8_experts_are_cut_and_dequantised(make_run, tmp_path):
    folder = export(make_run(**BLOCKED).dir, tmp_path / "hf", "float8")
    plain = import_hf(folder, tmp_path / "plain")
    rewrite(folder, fused)
    a, b = checkpoint(plain.path), checkpoint(import_hf(folder, tmp_path / "other").path)
    assert all(torch.equal(a.read(name), b.read(name)) for name in a.shapes)


def test_scales_may_lie_in_another_file(make_run, tmp_path):
    folder = export(make_run(**BLOCKED).dir, tmp_path / "hf", "float8")
    plain = import_hf(folder, tmp_path / "plain")
    tensors = load_file(folder / WEIGHTS)
    where = {name: f"{'scales' if name.endswith('_scale_inv') else 'codes'}.safetensors" for name in tensors}
    for file in set(where.values()):
        save_file({name: t for name, t in tensors.items() if where[name] == file}, folder / file)
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    a, b = checkpoint(plain.path), checkpoint(import_hf(folder, tmp_path / "other").path)
    assert all(torch.equal(a.read(name), b.read(name)) for name in a.shapes)


def test_router_biases_of_another_float_format_come_in(make_run, tmp_path):
    folder = export(make_run().dir, tmp_path / "hf", "float32")
    rewrite(folder, bf16_bias)
    reader = checkpoint(import_hf(folder, tmp_path / "imported").path)
    bias = load_file(folder / WEIGHTS)["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert torch.equal(reader.buffer("layers.1.mlp.gate.e_score_correction_bias"), bias.float())


def test_what_transformers_saves_comes_in_without_the_mtp_layers_it_drops(make_run, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = export(make_run().dir, tmp_path / "hf", "float32")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    made = import_hf(tmp_path / "saved", tmp_path / "imported")
    assert made.cfg.num_nextn_predict_layers == 0 and not made.tokenizer
    whole = checkpoint(import_hf(folder, tmp_path / "whole").path)
    reader = checkpoint(made.path)
    assert {name for name in whole.shapes if not name.startswith("mtp.")} == set(reader.shapes)
    assert all(torch.equal(reader.read(name), whole.read(name)) for name in reader.shapes)


def test_the_tokenizer_is_read_from_its_own_file_whatever_class_it_names(make_run, tmp_path):
    folder = export(make_run().dir, tmp_path / "hf", "float32")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"tokenizer_class": "LlamaTokenizerFast", "eos_token": {"content": config["eos_token"], "lstrip": False}}
    path.write_text(json.dumps(config))
    made = import_hf(folder, tmp_path / "imported")
    ours, theirs = read_tokenizer(folder), read_tokenizer(made.path / "tokenizer")
    assert theirs.encode("def main(): 123") == ours.encode("def main(): 123") and theirs.eos == 1


# -- bad input -------------------------------------------------------------------------------------------------------

EXPERT = "model.layers.1.mlp.experts.5."


def lacking(*names: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def changed(name: str, act):
    return lambda tensors: tensors | {name: act(tensors[name])}


def set_first(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[0] = value
    return tensor


DAMAGE = {
    "a missing expert": (
        lacking(*(f"{EXPERT}{p}_proj.weight" for p in ("gate", "up", "down"))),
        r"layers.1.mlp.experts.5.gate_proj.weight is missing, and 2 others",
    ),
    "a missing bias": (lacking("model.layers.2.mlp.gate.e_score_correction_bias"), "layers.2.*bias is missing$"),
    "a missing head": (lacking("lm_head.weight"), "lm_head.weight is missing"),
    "half of an MTP layer": (lacking("model.layers.3.eh_proj.weight"), "layers.3.eh_proj.weight is missing"),
    "a stray tensor": (lambda t: t | {"model.vision.weight": torch.ones(2)}, "1 tensors.*model.vision.weight"),
    "another shape": (
        changed(f"{EXPERT}down_proj.weight", lambda t: t.T),
        r"experts.5.down_proj.weight is \[16, 32\], config.json asks for \[32, 16\]",
    ),
    "an integer format": (changed("model.norm.weight", lambda t: t.to(torch.int8)), "norm.weight is stored as I8"),
    "FP8 without its scale": (
        changed("lm_head.weight", lambda t: t.to(torch.float8_e4m3fn)),
        "lm_head.weight_scale_inv is missing",
    ),
    "an MTP copy that differs": (changed("model.layers.3.embed_tokens.weight", lambda t: t * 2), "differs from embed"),
    "a value that is not finite": (
        changed(f"{EXPERT}up_proj.weight", lambda t: set_first(t, torch.nan)),
        "experts.5.gate_proj.weight holds values that are not finite",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused_and_nothing_is_left_behind(name, make_run, tmp_path):
    change, message = DAMAGE[name]
    folder = export(make_run().dir, tmp_path / "hf", "float32")
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        import_hf(folder, tmp_path / "imported")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "hf"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM.*only 'deepseek_v3'"),
        ({"num_hidden_layers": 4}, "6 tensors are not this model's, the first is model.layers.3.eh_proj.weight"),
        ({"n_routed_experts": 16}, "is missing|config.json asks for"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised as 'gptq'"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [1, 128]}}, r"\[1, 128\].*128 x 128"),
    ],
)
def test_a_config_of_something_else_is_refused(fields, message, make_run, tmp_path):
    folder = export(make_run().dir, tmp_path / "hf", "float32")
    reconfigure(folder, **fields)
    with pytest.raises(CheckpointError, match=message):
        import_hf(folder, tmp_path / "imported")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "hf"}


def test_a_tokenizer_larger_than_the_vocabulary_is_refused_both_ways(make_run, tmp_path):
    run = make_run()
    folder = export(run.dir, tmp_path / "hf")
    large = train(iter([" ".join(f"word{n} name{n}" for n in range(3000))]), 600)
    assert large.size > SMALL.vocab_size
    save_tokenizer(large, folder)
    with pytest.raises(CheckpointError, match=f"need {large.size} rows, but vocab_size = 320"):
        import_hf(folder, tmp_path / "imported")
    save_tokenizer(large, run.dir / "tokenizer")
    with pytest.raises(CheckpointError, match=f"{large.size} rows, but model.vocab_size = 320"):
        export(run.dir, tmp_path / "again")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "hf"}


@pytest.mark.parametrize("what", ["truncated", "absent", "index"])
def test_a_damaged_file_is_refused_by_its_name(what, make_run, tmp_path):
    folder = export(make_run().dir, tmp_path / "hf", shard_bytes=40_000)
    file = sorted(folder.glob("*.safetensors"))[1]
    if what == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    elif what == "absent":
        file.unlink()
    else:
        file = folder / INDEX
        file.write_text("{}")
    with pytest.raises(CheckpointError, match=file.name):
        import_hf(folder, tmp_path / "imported")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "hf"}


def test_an_import_replaces_nothing(make_run, tmp_path):
    folder = export(make_run().dir, tmp_path / "hf")
    for output in (folder, tmp_path / "run"):
        before = sorted(path.name for path in output.iterdir())
        with pytest.raises(ConfigError, match="exists already"):
            import_hf(folder, output)
        assert sorted(path.name for path in output.iterdir()) == before


def test_too_small_a_disk_is_refused_before_anything_is_written(make_run, tmp_path, monkeypatch):
    folder = export(make_run().dir, tmp_path / "hf")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30 - 2**20, 2**20))
    with pytest.raises(ResourceError, match="the import needs 0.06 GiB, but .* has 0.00 GiB free"):
        import_hf(folder, tmp_path / "imported")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "hf"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["output=x"], "source and output are both needed"), (["source=x", "outptu=x"], "Did you mean output")],
)
def test_the_command_refuses(arguments, message):
    path = Path(__file__).parents[2] / "launch" / "import_hf.py"
    spec = importlib.util.spec_from_file_location("launch_import_hf", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ConfigError, match=message):
        module.main(arguments)
