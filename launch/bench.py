"""Measurements here: ``python launch/bench.py what=train|profile|calibration|layer|kernels [key=value ...]``.

what=train     tokens/s, memory and start-up of `mini`, beside TorchTitan 0.2.2 with peer=torchtitan; own keys:
               steps, rounds, processes, peer, tokenizer (folder for TorchTitan); the rest are overrides of ours
what=profile   device time of one training step by kernel; the rest are overrides of the configuration
what=calibration  rows for the planner (docs/planner.md) as JSON; device=h200 names it, fp8=true measures FP8 too, the
               rest are overrides of the configuration whose shapes are measured
what=layer     one mixture layer as one of ranks=64 runs it (default: configuration v3_671b), forward and backward,
               without the wire; the rest are overrides of the configuration
what=kernels   every kernel at the shapes of `mini` and `v3_671b` beside torch's own, FP8 beside cuBLAS and BF16
"""

import json
import sys
from pathlib import Path

from deepv3.errors import ConfigError

DEFAULTS = {
    "what": "",
    "steps": "40",
    "rounds": "2",
    "processes": "1",
    "peer": "none",
    "tokenizer": "",
    "device": "",
    "fp8": "false",
    "ranks": "64",
}


def read(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Own keys and the rest; ConfigError for a measurement that does not exist."""
    own, rest = dict(DEFAULTS), []
    for argument in argv:
        key, _, value = argument.partition("=")
        if key in own:
            own[key] = value
        else:
            rest.append(argument)
    if own["what"] not in MEASUREMENTS:
        raise ConfigError(f"what = {own['what']!r} is none of {', '.join(MEASUREMENTS)}")
    if own["peer"] == "torchtitan" and not Path(own["tokenizer"], "tokenizer.json").exists():
        raise ConfigError(
            f"tokenizer = {own['tokenizer']!r} holds no tokenizer.json; peer=torchtitan needs tokenizer=FOLDER"
        )
    return own, rest


def train(own: dict[str, str], rest: list[str]) -> str:
    from deepv3.train.bench import compare

    return compare(
        int(own["processes"]), int(own["steps"]), int(own["rounds"]), own["peer"], Path(own["tokenizer"]), rest
    )


def profile(own: dict[str, str], rest: list[str]) -> str:
    from deepv3.config.compose import compose
    from deepv3.train import bench

    return bench.profile(compose(rest), steps=int(own["steps"]) if own["steps"] != DEFAULTS["steps"] else 2)


def calibration(own: dict[str, str], rest: list[str]) -> str:
    from deepv3.config.compose import compose
    from deepv3.planner.hardware import DEVICES
    from deepv3.train.calibrate import document

    if own["device"] not in DEVICES:
        raise ConfigError(f"device = {own['device']!r} is none of {', '.join(DEVICES)}; take the one this machine has")
    return json.dumps(document(compose(rest), own["device"], own["fp8"] == "true"))


def layer(own: dict[str, str], rest: list[str]) -> str:
    from deepv3.config.compose import compose
    from deepv3.train import layer_bench

    return layer_bench.measure(compose(rest or ["+config=v3_671b"]), int(own["ranks"]))


def kernels(own: dict[str, str], rest: list[str]) -> str:
    from deepv3.kernels.benchmark import report

    return "\n\n".join(report())


MEASUREMENTS = {f.__name__: f for f in (train, profile, calibration, layer, kernels)}


if __name__ == "__main__":
    try:
        own, rest = read(sys.argv[1:])
        print(MEASUREMENTS[own["what"]](own, rest))
    except ConfigError as error:
        sys.exit(f"error: {error}")
