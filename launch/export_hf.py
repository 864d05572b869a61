"""Exports a checkpoint to Hugging Face: ``python launch/export_hf.py source=RUN_OR_CHECKPOINT output=FOLDER [...]``."""

import sys
from dataclasses import dataclass

from deepv3.config.cli import guarded
from deepv3.config.compose import from_arguments
from deepv3.config.schema import knob
from deepv3.errors import ConfigError

USAGE = """usage: python launch/export_hf.py source=RUN_OR_CHECKPOINT output=FOLDER [key=value]

  source=PATH      a run folder (its newest complete checkpoint is taken) or one checkpoint
  output=PATH      folder to write; an earlier export of ours is replaced, anything else is left alone
  dtype=bfloat16   bfloat16 | float8 (128 x 128 blocks, as released) | float32
  ema=false        true writes the averaged weights
  verify=false     true reloads the result with transformers and compares it with the checkpoint"""


@dataclass
class Arguments:
    """The command line."""

    source: str = knob("", "Run folder or checkpoint.")
    output: str = knob("", "Folder to write.")
    dtype: str = knob("bfloat16", "Format of the weights.")
    ema: bool = knob(False, "Write the averaged weights.")
    verify: bool = knob(False, "Reload and compare.")


def main(argv: list[str]) -> None:
    """Export, and verify if asked to; says where the result is."""
    args = from_arguments(argv, Arguments)
    if not args.source or not args.output:
        raise ConfigError(f"source and output are both needed\n{USAGE}")
    from deepv3.export.hf import export

    output = export(args.source, args.output, args.dtype, args.ema)
    size = sum(path.stat().st_size for path in output.iterdir())
    print(f"exported {output}: {size / 1e6:,.1f} MB, {args.dtype}")
    if args.verify:
        from deepv3.export.verify import verify

        print(verify(output, args.source)["summary"])


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(USAGE)
        sys.exit(0)
    sys.exit(guarded(lambda: main(sys.argv[1:])))
