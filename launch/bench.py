"""Measurements here: ``python launch/bench.py what=train|profile|kernels|calibration [key=value ...]``.

what=train     tokens/s, memory and start-up of `mini`, beside TorchTitan 0.2.2 with peer=torchtitan; own keys:
               steps, rounds, processes, peer, tokenizer (folder for TorchTitan); the rest are overrides of ours
what=profile   device time of one training step by kernel; the rest are overrides of the configuration
what=calibration  rows for the planner (docs/planner.md) as JSON; device=h200 names it, fp8=true measures FP8 too, the
               rest are overrides of the configuration whose shapes are measured
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
    if own["what"] not in ("train", "profile", "kernels", "calibration"):
        raise ConfigError(f"what = {own['what']!r} is none of train, profile, kernels, calibration")
    if own["peer"] == "torchtitan" and not Path(own["tokenizer"], "tokenizer.json").exists():
        raise ConfigError(
            f"tokenizer = {own['tokenizer']!r} holds no tokenizer.json; peer=torchtitan needs tokenizer=FOLDER"
        )
    return own, rest


def measure(own: dict[str, str], rest: list[str]) -> str:
    """The table."""
    if own["what"] == "kernels":
        from deepv3.kernels.benchmark import report

        return "\n\n".join(report())
    if own["what"] == "calibration":
        from deepv3.config.compose import compose
        from deepv3.planner.hardware import DEVICES
        from deepv3.train.calibrate import document

        if own["device"] not in DEVICES:
            raise ConfigError(
                f"device = {own['device']!r} is none of {', '.join(DEVICES)}; take the one this machine has"
            )
        return json.dumps(document(compose(rest), own["device"], own["fp8"] == "true"))
    if own["what"] == "profile":
        from deepv3.config.compose import compose
        from deepv3.train.bench import profile

        return profile(compose(rest), steps=int(own["steps"]) if own["steps"] != DEFAULTS["steps"] else 2)
    from deepv3.train.bench import compare

    return compare(
        int(own["processes"]), int(own["steps"]), int(own["rounds"]), own["peer"], Path(own["tokenizer"]), rest
    )


if __name__ == "__main__":
    try:
        print(measure(*read(sys.argv[1:])))
    except ConfigError as error:
        sys.exit(f"error: {error}")
