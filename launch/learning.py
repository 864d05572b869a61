"""Does FP8 learn like BF16? ``python launch/learning.py output=FOLDER [limit=SECONDS] [key=value ...]``.

Trains one model in BF16 and FP8 with two seeds each, and in FP8 with a recipe that is known to be wrong, all at once,
on one epoch of the text of installed software; writes learning.md, learning.json and learning.png (docs/numerics.md).

runs=[bf16-1,fp8-1]   which runs: bf16, fp8 or block (one scale for 128 x 128 gradients), and the seed
folders=[/a,/b]       text to read instead; data.sources=[...] says it in full
tokens=60e6           of each run; else an epoch
limit=530             seconds for everything: all runs are shortened alike to fit
mps=false             without CUDA's multi-process service
The rest are overrides of +config=learn_300m.
"""

import signal
import sys

from deepv3.config.cli import guarded


def main(argv: list[str]) -> None:
    """Measure and print the table."""
    from deepv3.train.learning import measure, read

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))  # runs end with this process
    print(measure(*read(argv)))


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit(0)
    sys.exit(guarded(lambda: main(sys.argv[1:])))
