"""Imports a Hugging Face DeepSeek-V3 folder: ``python launch/import_hf.py source=DIR output=PATH``."""

import sys
from dataclasses import asdict, dataclass

from deepv3.config.cli import guarded
from deepv3.config.compose import from_arguments
from deepv3.config.schema import ModelConfig, knob
from deepv3.errors import ConfigError

USAGE = """usage: python launch/import_hf.py source=DIR output=PATH

  source=DIR    folder with config.json and safetensors: BF16, FP16, FP32 or FP8 in blocks, with or without MTP layers
  output=PATH   run folder to write, with one checkpoint of step 0; it must not exist yet

The weights come with moments of zero and tokens counted from 0. Train on from them, on any layout, with
train.resume=PATH and the fields of `model` that the command prints."""


@dataclass
class Arguments:
    """The command line."""

    source: str = knob("", "Folder to read.")
    output: str = knob("", "Run folder to write.")


def overrides(cfg: ModelConfig) -> list[str]:
    """The architecture as arguments of launch/pretrain.py, over the schema's defaults (model=v3_671b)."""
    ours, default = asdict(cfg), asdict(ModelConfig())
    changed = {name: value for name, value in ours.items() if value != default[name]}
    yarn = changed.pop("rope_scaling", None) or {}
    flat = {f"model.{name}": value for name, value in changed.items()}
    flat |= {f"model.rope_scaling.{name}": value for name, value in yarn.items()}
    return [f"{name}={'null' if value is None else value}" for name, value in flat.items()]


def main(argv: list[str]) -> None:
    """Import; says where the result is and how training goes on from it."""
    args = from_arguments(argv, Arguments)
    if not args.source or not args.output:
        raise ConfigError(f"source and output are both needed\n{USAGE}")
    from deepv3.export.importer import import_hf

    made = import_hf(args.source, args.output)
    print(f"imported {made.path}: {made.cfg.num_hidden_layers} layers, {made.cfg.num_nextn_predict_layers} of MTP")
    resume = [f"train.resume={made.path}"]
    if made.tokenizer:
        resume.append(f"data.tokenizer={made.path / 'tokenizer'}")
    else:
        print(f"{args.source} has no tokenizer.json: name the model's own with data.tokenizer=FOLDER")
    print("go on from it with\n  launch/pretrain.py " + " ".join([*resume, *overrides(made.cfg)]))


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(USAGE)
        sys.exit(0)
    sys.exit(guarded(lambda: main(sys.argv[1:])))
