"""launch/generate.py on the three kinds of source, and what it refuses."""

import runpy
from pathlib import Path

import pytest
import torch

from deepv3.config.cli import guarded
from deepv3.export.hf import export
from deepv3.export.opened import open_source
from deepv3.generate.sample import generate

LAUNCH = Path(__file__).parents[2] / "launch" / "generate.py"
PROMPT = "def main(a, b): # 'q'"


def launch(*arguments: str) -> int:
    """launch/generate.py in this process."""
    return guarded(lambda: runpy.run_path(str(LAUNCH))["main"](list(arguments)))


@pytest.fixture
def sources(make_run, tmp_path):
    """A run with averaged weights, its checkpoint, its export in FP32."""
    run = make_run(average=True, num_nextn_predict_layers=2)
    return {
        "run": run.dir, "checkpoint": run.checkpoint, "export": export(run.dir, tmp_path / "export", "float32"),
        "averaged_export": export(run.dir, tmp_path / "averaged", "float32", ema=True),
    }  # fmt: skip


def test_every_kind_of_source_gives_the_same_text_with_every_way_of_decoding(sources, capsys):
    opened = open_source(sources["run"], dtype="float32")
    ids = torch.tensor([opened.tokenizer.encode(PROMPT)])
    wanted = opened.tokenizer.decode(generate(opened.load(), ids, 20)[0].tolist(), skip_special_tokens=True)
    for kind in ("run", "checkpoint", "export"):
        for way in ((), ("speculative=true",), ("cache=false",)):
            fixed = ("max_new_tokens=20", "ignore_eos=true", "dtype=float32")  # in BF16 near ties fall either way
            code = launch(f"source={sources[kind]}", f"prompt={PROMPT}", *fixed, *way)
            told = capsys.readouterr()
            assert (code, told.out.rstrip("\n")) == (0, wanted.rstrip("\n")), (kind, way)
            assert "tokens/s" in told.err and ("acceptance rate depth 1" in told.err) == (way == ("speculative=true",))


def test_several_prompts_are_told_apart(sources, capsys):
    assert launch(f"source={sources['run']}", "prompts=['return 1', 'd']", "max_new_tokens=3") == 0
    out = capsys.readouterr().out
    assert out.startswith("--- 1 ---\nreturn 1") and "\n--- 2 ---\nd" in out


def test_averaged_weights_are_those_of_the_averaged_export(sources):
    average, exported = (
        open_source(sources[name], ema=name == "run", dtype="float32") for name in ("run", "averaged_export")
    )
    tokens = torch.randint(320, (2, 9))
    logits = average.load().logits(tokens)
    torch.testing.assert_close(exported.load().logits(tokens), logits, rtol=0, atol=1e-4)
    assert (open_source(sources["run"], dtype="float32").load().logits(tokens) - logits).abs().max() > 0.1


def test_dtype_decides_weights_and_activations_but_not_router_biases(sources):
    for kind in ("run", "export"):
        model = open_source(sources[kind], dtype="bfloat16").load()
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert {r.e_score_correction_bias.dtype for r in model.routers()} == {torch.float32}


def test_exports_open_in_the_format_they_are_stored_in(make_run, tmp_path):
    blocks = ("hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank")
    run = make_run(**dict.fromkeys(blocks, 128), v_head_dim=64)
    for dtype, wanted in (("bfloat16", torch.bfloat16), ("float8", torch.bfloat16), ("float32", torch.float32)):
        folder = export(run.dir, tmp_path / dtype, dtype)
        assert next(open_source(folder).load().parameters()).dtype == wanted


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["prompt=x", "source=SOMEWHERE"], "no run folder (no checkpoints/), no checkpoint (no manifest.json) and"),
        (["prompt=x", "source=HERE"], "notes.txt; give source=PATH of one of the three"),
        (["prompt=x"], "are needed"),
        (["prompt="], "the prompt is empty"),
        ([], "prompt=TEXT or prompts=[...] are needed"),
        (["prompt=x", "prompts=[y]"], "are needed"),
        (["prompt=x", "max_new_tokens=99"], "model.max_position_embeddings = 64; set max_new_tokens=63"),
        (["prompt=x", "speculative=true", "cache=false"], "cache = false"),
        (["prompt=x", "dtype=float8"], "dtype = 'float8' is none of auto"),
        (["prompt=x", "device=tpu9"], "device = 'tpu9' cannot be used here"),
        (["prompt=x", "ema=true"], "ema"),
        (["prompt=x", "typo=1"], "typo"),
    ],
)  # fmt: skip
def test_refusals_name_the_argument_and_end_with_code_2(make_run, tmp_path, capsys, arguments, told):
    if not any(argument.startswith("source=") for argument in arguments) and told != "are needed":
        arguments = [f"source={make_run().dir}", *arguments]
    (tmp_path / "notes.txt").write_text("no model")
    places = {"source=SOMEWHERE": f"source={tmp_path}/nowhere", "source=HERE": f"source={tmp_path}"}
    assert launch(*(places.get(argument, argument) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error


def test_a_model_without_prediction_modules_does_not_speculate(make_run, capsys):
    run = make_run(num_nextn_predict_layers=0)
    assert launch(f"source={run.dir}", "prompt=x", "max_new_tokens=5", "speculative=true") == 2
    assert "num_nextn_predict_layers = 0" in capsys.readouterr().err
    assert launch(f"source={run.dir}", "prompt=x", "max_new_tokens=5") == 0
