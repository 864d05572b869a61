"""Evaluates a model: ``python launch/eval.py source=RUN_CHECKPOINT_OR_EXPORT [text=PATH] [tasks=[...]] [...]``."""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from deepv3.config.cli import guarded
from deepv3.config.compose import from_arguments, layer, parse_overrides
from deepv3.config.schema import Config, knob
from deepv3.config.typed import build
from deepv3.errors import ConfigError

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see launch/pretrain.py; read when torch is imported

USAGE = """usage: python launch/eval.py source=PATH [key=value ...]

  source=PATH       a run folder (its newest checkpoint), one checkpoint, or an export
  (nothing else)    loss and perplexity on what the run holds out: the number of its validation
  data.KEY=VALUE    the same on other data, e.g. "data.validation_sources=[{path: /corpus}]", data.seq_len=2048
  sequences=N       how many held-out sequences; not set: train.eval_sequences of the run
  text=PATH         perplexity and bits per byte of every document of a file or folder; format=, field=, suffixes= too
  tasks=[A,B]       tasks of lm-evaluation-harness: names, or YAML files; limit=N examples each, num_fewshot=N
  length=N          longest input for text and tasks, tokens; not set: data.seq_len of a run, an export's whole reach
  ema=false         true takes the averaged weights of a checkpoint
  device=auto       auto | cpu | cuda
  dtype=auto        auto (as trained) | float32 | bfloat16
  output=FILE       write all figures as JSON, too"""


def extend(model, prompts, new: int, temperature: float, top_p: float, eos: int) -> list[list[int]]:
    """See deepv3.eval.score.Extend."""
    from deepv3.generate.decode import Sampling, decode

    return decode(model, prompts, Sampling(new, temperature, top_p, eos=eos)).ids


def main(argv: list[str]) -> None:
    """Open, refuse what cannot work, read the weights, evaluate, print."""
    from deepv3.eval.request import Request, evaluate
    from deepv3.export.opened import open_source

    @dataclass
    class Arguments(Request):
        """The command line, but for data.*."""

        source: str = knob("", "Run folder, checkpoint or export.")
        ema: bool = knob(False, "Averaged weights.")
        device: str = knob("auto", "Where to compute.")
        dtype: str = knob("auto", "Format of weights and activations.")
        output: str = knob("", "JSON file.")

    data = [argument for argument in argv if argument.startswith("data.")]
    args = from_arguments([argument for argument in argv if argument not in data], Arguments)
    held = bool(data) or not (args.text or args.tasks)
    if not args.source:
        raise ConfigError(f"source=PATH is needed\n{USAGE}")
    opened = open_source(args.source, args.ema, args.device, args.dtype)
    if held and not data and not opened.trained:
        raise ConfigError(
            f"source={args.source} is an export, which does not know the data it was trained on; give text=PATH, "
            "tasks=[...] or data.validation_sources=[{path: PATH}]"
        )
    cfg = build(Config, asdict(opened.cfg), *(layer(override) for override in parse_overrides(data)))
    print(opened.label, file=sys.stderr)
    figures = evaluate(args, cfg, opened.tokenizer, opened.load, held, extend, print)
    if args.output:
        Path(args.output).write_text(json.dumps({"source": opened.label} | figures, indent=1, default=str) + "\n")


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(USAGE)
        sys.exit(0)
    sys.exit(guarded(lambda: main(sys.argv[1:])))
