"""Samples from a model: ``python launch/generate.py source=RUN_CHECKPOINT_OR_EXPORT prompt=TEXT [key=value ...]``."""

import os
import sys
from dataclasses import dataclass

from deepv3.config.cli import guarded
from deepv3.config.compose import from_arguments
from deepv3.config.schema import knob
from deepv3.errors import ConfigError

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see launch/pretrain.py; read when torch is imported

USAGE = """usage: python launch/generate.py source=PATH prompt=TEXT [key=value ...]

  source=PATH          a run folder (its newest checkpoint), one checkpoint, or an export
  prompt=TEXT          taken as it stands, quotes and commas included; several: "prompts=['first', 'second']"
  max_new_tokens=64    tokens to add to each prompt; a row ends earlier at the tokenizer's eos
  ignore_eos=false     true goes on after it
  temperature=0.0      0 takes the likeliest token each time
  top_p=1.0            draw from the likeliest tokens that make up this share only
  seed=0               of the draws
  speculative=false    true guesses ahead with the prediction modules: the same text in fewer passes
  cache=true           false computes the whole sequence anew for every token (to compare with)
  ema=false            true takes the averaged weights of a checkpoint
  device=auto          auto | cpu | cuda
  dtype=auto           auto (as trained) | float32 | bfloat16"""


@dataclass
class Arguments:
    """The command line."""

    source: str = knob("", "Run folder, checkpoint or export.")
    prompts: list[str] = knob([], "Texts to continue.")
    max_new_tokens: int = knob(64, "Tokens to add to each.")
    ignore_eos: bool = knob(False, "Go on after the end of a document.")
    temperature: float = knob(0.0, "0 is greedy.")
    top_p: float = knob(1.0, "Nucleus.")
    seed: int = knob(0, "Of the draws.")
    speculative: bool = knob(False, "Guess ahead with MTP.")
    cache: bool = knob(True, "Keep latents between tokens.")
    ema: bool = knob(False, "Averaged weights.")
    device: str = knob("auto", "Where to compute.")
    dtype: str = knob("auto", "Format of weights and activations.")


def main(argv: list[str]) -> None:
    """Print every prompt with its continuation, then the speed (to stderr)."""
    alone = [argument.removeprefix("prompt=") for argument in argv if argument.startswith("prompt=")]
    args = from_arguments([argument for argument in argv if not argument.startswith("prompt=")], Arguments)
    if not args.source or bool(alone) == bool(args.prompts) or len(alone) > 1:
        raise ConfigError(f"source and either one prompt=TEXT or prompts=[...] are needed\n{USAGE}")
    if args.speculative and not args.cache:
        raise ConfigError("speculative = true works over the cache, but cache = false; set one of them back")
    from deepv3.export.opened import open_source
    from deepv3.generate.decode import Sampling, check, decode, without_cache

    opened = open_source(args.source, args.ema, args.device, args.dtype)
    tokenizer, texts = opened.tokenizer, alone or args.prompts
    eos = None if args.ignore_eos else tokenizer.eos
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed, args.speculative, eos)
    prompts = [tokenizer.encode(text) for text in texts]
    check(opened.cfg.model, prompts, sampling)
    out = (decode if args.cache else without_cache)(opened.load(), prompts, sampling)
    for number, (prompt, ids) in enumerate(zip(prompts, out.ids), 1):
        if len(prompts) > 1:
            print(f"--- {number} ---")
        print(tokenizer.decode([*prompt, *ids], skip_special_tokens=True), flush=True)
    print("\n".join([opened.label, *out.describe()]), file=sys.stderr)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(USAGE)
        sys.exit(0)
    sys.exit(guarded(lambda: main(sys.argv[1:])))
