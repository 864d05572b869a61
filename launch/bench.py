"""Measurements here: ``python launch/bench.py what=train|profile|calibration|layer|exchange|kernels [key=value ...]``.

what=train     tokens/s, memory and start-up of `mini`, beside TorchTitan 0.2.2 with peer=torchtitan; own keys:
               steps, rounds, processes, peer, tokenizer (folder for TorchTitan); the rest are overrides of ours
what=profile   device time of one training step by kernel; the rest are overrides of the configuration
what=calibration  rows for the planner (docs/planner.md) as JSON, from training steps of a few layers; device=h200 names
               it, the rest are overrides of the configuration whose widths, batch and precision are measured
what=layer     one mixture layer as one of ranks=64 runs it (default: configuration v3_671b), forward and backward,
               without the wire; the rest are overrides of the configuration
what=exchange  dispatch and combine among the ranks that torchrun started, all-to-all beside shared memory; own keys:
               rounds, tokens (per rank; default: those of `mini` and V3)
what=kernels   every kernel at the shapes of `mini` and `v3_671b` beside torch's own, FP8 beside cuBLAS and BF16
"""

import sys

from deepv3.errors import ConfigError
from deepv3.train.measure import MEASUREMENTS, read

if __name__ == "__main__":
    try:
        own, rest = read(sys.argv[1:])
        print(MEASUREMENTS[own["what"]](own, rest))
    except ConfigError as error:
        sys.exit(f"error: {error}")
