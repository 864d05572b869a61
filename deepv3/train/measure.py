"""The measurements of launch/bench.py by name: each takes the bench's own keys and the other arguments, gives text."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from deepv3.errors import ConfigError

KEYS = {  # of the bench itself, and what stands where one is not given; an empty number is the measurement's own
    "what": "",
    "steps": "",
    "rounds": "",
    "processes": "",
    "peer": "none",
    "tokenizer": "",
    "device": "",
    "ranks": "",
}


def read(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Own keys and the rest; ConfigError for a measurement that does not exist."""
    own, rest = dict(KEYS), []
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


def number(own: dict[str, str], key: str, default: int) -> int:
    """The value of an own key, `default` where it was not given; ConfigError for what is no whole number above 0."""
    text = own[key] or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{key} = {text} is no whole number above 0; give e.g. {key}={default}")
    return int(text)


def train(own: dict[str, str], rest: list[str]) -> str:
    from deepv3.train.bench import compare

    processes, steps, rounds = number(own, "processes", 1), number(own, "steps", 40), number(own, "rounds", 2)
    return compare(processes, steps, rounds, own["peer"], Path(own["tokenizer"]), rest)


def profile(own: dict[str, str], rest: list[str]) -> str:
    from deepv3.config.compose import compose
    from deepv3.train import bench

    return bench.profile(compose(rest), steps=number(own, "steps", 2))


def calibration(own: dict[str, str], rest: list[str]) -> str:
    with redirect_stdout(sys.stderr):  # libraries greet there, and the file is what comes out of stdout
        from deepv3.config.compose import compose
        from deepv3.planner.hardware import DEVICES
        from deepv3.train.calibrate import document

        if own["device"] not in DEVICES:
            known = ", ".join(DEVICES)
            raise ConfigError(f"device = {own['device']!r} is none of {known}; take the one this machine has")
        words = ["launch/bench.py", "what=calibration", f"device={own['device']}", *rest]
        return json.dumps(document(compose(rest), own["device"], " ".join(words)))


def layer(own: dict[str, str], rest: list[str]) -> str:
    from deepv3.config.compose import compose
    from deepv3.train import layer_bench

    return layer_bench.measure(compose(rest or ["+config=v3_671b"]), number(own, "ranks", 64))


def exchange(own: dict[str, str], rest: list[str]) -> str:
    from deepv3.train import exchange_bench

    unknown = [argument for argument in rest if not argument.startswith("tokens=")]
    if unknown:
        raise ConfigError(f"what=exchange takes rounds=N and tokens=N, not {' '.join(unknown)}")
    tokens = number({"tokens": rest[-1].partition("=")[2]}, "tokens", 8192) if rest else 0
    return exchange_bench.report(number(own, "rounds", 10), tokens)


def kernels(own: dict[str, str], rest: list[str]) -> str:
    from deepv3.kernels.benchmark import report

    return "\n\n".join(report())


MEASUREMENTS = {f.__name__: f for f in (train, profile, calibration, layer, exchange, kernels)}
