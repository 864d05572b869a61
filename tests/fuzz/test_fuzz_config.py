"""Command lines and config files at random: each makes a config that the validation accepts, or a ConfigError."""

import copy
import functools
import random

import pytest
from mutate import WORDS, damaged, odd_value, trials

from deepv3.config import compose
from deepv3.config.schema import Config
from deepv3.config.typed import field_paths
from deepv3.config.validate import validate

FIELDS = list(field_paths(Config))
PRESETS = ("tiny", "mini", "v3_671b")
CASES = range(400)
MANY = range(1000, 2000)


@pytest.fixture(autouse=True)
def hydra_reads_a_preset_once(monkeypatch):
    """Hydra takes a quarter of a second to stack the files of a preset, the same ones each time."""
    real = compose._compose_files

    @functools.cache
    def stacked(lines, config_dir):
        return real(compose.parse_overrides(lines), config_dir)

    def once(chosen, config_dir):
        return copy.deepcopy(stacked(tuple(o.input_line for o in chosen), config_dir))

    monkeypatch.setattr(compose, "_compose_files", once)


def _text(value: object, draw: random.Random) -> str:
    return draw.choice((str, repr, lambda v: f"'{v}'", lambda v: f"[{v}]", lambda v: f"{{a: {v}}}"))(value)


def _argument(draw: random.Random) -> str:
    kind = draw.random()
    field = draw.choice(FIELDS)
    if kind < 0.6:
        return f"{field}={_text(odd_value(draw), draw)}"
    if kind < 0.7:
        return f"{field}={draw.randint(1, 64)}"
    if kind < 0.8:
        return draw.choice(("+", "++", "~", "-", "@")) + f"{field}={draw.choice(WORDS)}"
    if kind < 0.9:
        return f"{draw.choice(('model', 'data', 'optim', 'nothing', '+config'))}={draw.choice(WORDS)}"
    line = f"{field}={draw.randint(0, 9)}"
    return damaged(line.encode(), draw).decode("utf-8", "surrogateescape")


def _command_line(draw: random.Random) -> str:
    preset = draw.choice(PRESETS)
    large = preset == "v3_671b"  # has no text of its own, and runs on many devices
    given = ("data.sources=[{path: .}]",) if large else ()
    arguments = [f"+config={preset}", *given, *(_argument(draw) for _ in range(draw.choice((1, 1, 2, 4))))]
    cfg = compose.compose(arguments)
    validate(cfg, draw.choice((1, 2048) if large else (1, 1, 2, 8)))
    assert compose.to_yaml(cfg) and compose.config_hash(cfg)
    return "works"


def _file(tmp_path, draw: random.Random) -> str:
    text = compose.to_yaml(compose.compose([f"+config={draw.choice(PRESETS)}"])).encode()
    if draw.random() < 0.5:
        lines = text.decode().splitlines()
        at = draw.randrange(len(lines))
        lines[at] = f"{lines[at].split(':')[0]}: {_text(odd_value(draw), draw)}"
        text = "\n".join(lines).encode("utf-8", "surrogateescape")
    else:
        text = damaged(text, draw)
    path = tmp_path / "config.yaml"
    path.write_bytes(text)
    validate(compose.from_yaml(path), 1)
    return "works"


def test_no_command_line_ends_in_a_foreign_error():
    outcomes = trials(CASES, _command_line)
    assert outcomes["ConfigError"] > len(CASES) / 2 and outcomes["works"] > 10


def test_no_config_file_ends_in_a_foreign_error(tmp_path):
    outcomes = trials(range(60), functools.partial(_file, tmp_path))
    assert outcomes["ConfigError"] > 10 and outcomes["works"] > 2


@pytest.mark.slow
def test_a_thousand_command_lines_and_files(tmp_path):
    trials(MANY, _command_line)
    trials(range(2000, 2200), functools.partial(_file, tmp_path))
