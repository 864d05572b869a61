"""What a command line may say, and what it is told otherwise."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from deepv3.config import compose as composing
from deepv3.config.compose import compose, config_hash, differences, from_yaml, to_dict, to_yaml
from deepv3.config.schema import Config
from deepv3.errors import ConfigError


def refusal(*argv: str) -> str:
    """The message that a command line is refused with."""
    with pytest.raises(ConfigError) as caught:
        compose(argv)
    return str(caught.value)


def test_composing_gives_the_typed_schema():
    cfg = compose(["+config=tiny"])
    assert type(cfg) is Config
    assert cfg.precision.name == "fp32" and cfg.run_dir == "runs/tiny"
    assert [type(source).__name__ for source in cfg.data.sources] == ["SourceConfig"]


def test_values_overrule_presets_and_later_values_overrule_earlier_ones():
    cfg = compose(["seed=1", "train.steps=3", "+config=tiny", "seed=2", "train.tokens=1e6"])
    assert (cfg.train.steps, cfg.seed, cfg.train.tokens) == (3, 2, 1e6)


def test_a_group_takes_another_file():
    assert compose(["+config=tiny", "precision=bf16"]).precision.name == "bf16"
    assert compose(["+config=v3_671b", "parallel=single"]).parallel.pp_size == 1


def test_a_preset_of_a_preset_overrules_its_parent():
    first, second = compose(["+config=v3_671b_32k"]), compose(["+config=v3_671b_128k"])
    assert (first.data.seq_len, second.data.seq_len) == (32768, 131072)
    assert first.optim.lr == second.optim.lr == 7.3e-6
    assert second.parallel.ep_size == 32


def test_lists_of_sections_are_written_whole():
    sources = compose(["data.sources=[{path: /a, weight: 2}, {path: /b, suffixes: [.md]}]"]).data.sources
    assert [(s.path, s.weight, s.suffixes) for s in sources] == [("/a", 2.0, []), ("/b", 1.0, [".md"])]


def test_setting_a_field_below_a_null_section_creates_it():
    assert compose(["model.rope_scaling.factor=8"]).model.rope_scaling.factor == 8.0
    assert compose(["train=fixed", "train.batch_ramp.start=4"]).train.batch_ramp.start == 4


def test_null_empties_what_may_be_null():
    cfg = compose(["model.q_lora_rank=null", "train.batch_ramp=null"])
    assert cfg.model.q_lora_rank is None and cfg.train.batch_ramp is None


def test_a_value_may_refer_to_another():
    assert compose(["seed=7", "run_dir=runs/seed-${seed}"]).run_dir == "runs/seed-7"
    assert "run_dir" in refusal("run_dir=${sed}")


@pytest.mark.parametrize(
    "argument, words",
    [
        ("typo=1", ["typo=1", "no such field"]),
        ("+typo=1", ["typo=1", "no such field"]),
        ("++typo=1", ["typo=1", "no such field"]),
        ("model.hidden=1", ["model.hidden", "Did you mean model.hidden_size?"]),
        ("+model.hidden=1", ["+model.hidden=1", "only +config=NAME"]),
        ("modle.hidden_size=1", ["modle.hidden_size", "Did you mean model.hidden_size?"]),
        ("lr=1", ["lr=1", "Did you mean optim.lr?"]),
        ("+model.hidden_size=3", ["only +config=NAME is added; write model.hidden_size=VALUE"]),
        ("~model.hidden_size", ["cannot be deleted"]),
        ("model.hidden_size=wide", ["model.hidden_size='wide'", "takes int", "Width d of the residual stream"]),
        ("model.hidden_size=1.5", ["model.hidden_size=1.5", "takes int"]),
        ("model.hidden_size=null", ["model.hidden_size=None", "takes int"]),
        ("model.rope_scaling.factor=far", ["model.rope_scaling.factor='far'", "takes float"]),
        ("model.force_balance=perhaps", ["model.force_balance='perhaps'", "takes bool"]),
        ("train.finish=export", ["train.finish='export'", "takes list of str"]),
        ("data.sources=[{path: /a, wieght: 2}]", ["data.sources[0].wieght", "Did you mean data.sources[0].weight"]),
        ("data.sources=[/a]", ["data.sources[0]='/a'", "not a mapping"]),
        ("data.sources=/a", ["data.sources='/a'", "takes list of SourceConfig"]),
        ("seed=1,2", ["seed=1,2", "add -m"]),
        ("precision=bf16,fp32", ["precision=bf16,fp32", "add -m"]),
        ("config=tiny", ["+config=tiny"]),
        ("+config=tinny", ["+config=tinny", "Did you mean tiny?", "mini, moe_16b, tiny, v3_671b"]),
        ("precision=fp31", ["configs/precision/fp31.yaml", "bf16, fp32, fp8"]),
        ("+precision=fp32", ["write precision=NAME"]),
        ("train={steps: 3}", ["train.FIELD=VALUE"]),
        ("data.sources=[{path", ["quote"]),
        ("nonsense", ["nonsense"]),
    ],
)
def test_a_refusal_names_the_argument_and_the_way_out(argument, words):
    message = refusal(argument)
    for word in words:
        assert word in message


def test_an_unknown_key_in_a_preset_is_refused(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "pretrain.yaml").write_text("defaults: [{model: odd}, _self_]\n")
    (tmp_path / "model" / "odd.yaml").write_text("hidden_sise: 3\n")
    with pytest.raises(ConfigError, match=r"model\.hidden_sise: no such field\. Did you mean model\.hidden_size"):
        compose([], config_dir=tmp_path)


def test_a_damaged_preset_is_refused(tmp_path: Path):
    (tmp_path / "pretrain.yaml").write_text("defaults: [_self_]\nseed: [\n")
    with pytest.raises(ConfigError, match=r"configs/"):
        compose([], config_dir=tmp_path)


def test_composing_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    compose(["+config=tiny", "seed=3"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("preset", composing.groups()["config"])
def test_a_config_survives_its_yaml(preset: str, tmp_path: Path):
    cfg = compose([f"+config={preset}", "model.rope_scaling.factor=40"])
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    assert from_yaml(tmp_path / "config.yaml") == cfg
    assert OmegaConf.to_container(OmegaConf.create(to_yaml(cfg))) == to_dict(cfg)


@pytest.mark.parametrize("text", ["model: {hidden_sise: 3}", "seed: [", "[1, 2]", "3"])
def test_a_damaged_stored_config_is_refused_by_its_path(text: str, tmp_path: Path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="config.yaml"):
        from_yaml(tmp_path / "config.yaml")


def test_a_missing_stored_config_is_refused_by_its_path(tmp_path: Path):
    with pytest.raises(ConfigError, match="absent.yaml"):
        from_yaml(tmp_path / "absent.yaml")


def test_two_runs_are_the_same_where_only_free_fields_differ():
    one = compose(["+config=tiny"])
    moved = compose(["+config=tiny", "run_dir=/elsewhere", "train.steps=9", "parallel.pp_size=4", "logging=online"])
    wider = compose(["+config=tiny", "model.hidden_size=256", "data.sources=[{path: /a}]"])
    assert config_hash(one) == config_hash(moved) and differences(one, moved) == []
    assert config_hash(one) != config_hash(wider)
    assert [line.split(":")[0] for line in differences(one, wider)] == ["data.sources", "model.hidden_size"]
    assert "model.hidden_size: 128 -> 256" in differences(one, wider)


def test_every_free_field_exists():
    known = set(composing.field_paths(Config))
    assert set(composing.FREE) <= known
