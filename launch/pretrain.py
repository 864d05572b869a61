"""Pre-trains a model: ``torchrun [...] launch/pretrain.py +config=NAME [key=value ...]``, or plain ``python`` alone.

``-m`` sweeps: each combination of comma-separated values runs under its own torchrun in its own run folder.
"""

import time

STARTED = time.time()

import os  # noqa: E402
import sys  # noqa: E402

# Threads that spin at OpenMP's barriers cost a shared CPU up to 4 x (600-800 against 3,000 tokens/s of `tiny`).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from deepv3.config.cli import main  # noqa: E402


def pretrain(cfg) -> None:
    """Train, then do what train.finish asks for."""
    from finish import finish

    from deepv3.train.entry import pretrain

    pretrain(cfg, STARTED, finish)


if __name__ == "__main__":
    if "-m" in sys.argv[1:] or "--multirun" in sys.argv[1:]:
        from deepv3.train.sweep import run_sweep

        sys.exit(run_sweep(sys.argv[1:], __file__))
    main(pretrain)
