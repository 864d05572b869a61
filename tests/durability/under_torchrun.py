"""What torchrun starts in test_torchrun.py: launch/pretrain.py's work, with a fault in the first attempt only.

under_torchrun.py FAULT [arguments of launch/pretrain.py]
"""

import os
import sys
import time

import injected

from deepv3.config import cli
from deepv3.train.entry import pretrain

if __name__ == "__main__":
    fault = sys.argv.pop(1)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        injected.inject(fault)
    cli.main(lambda cfg: pretrain(cfg, time.time(), lambda *_: None))
