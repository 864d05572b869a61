"""Command line -> Config. Hydra picks and stacks the files of ``configs/``; values then enter a fresh typed schema.

1. Hydra's grammar parses the overrides.
2. ``+config=NAME`` and ``GROUP=FILE`` go to Hydra's compose API, which reads the defaults lists and writes nothing.
3. What comes out, then every ``key=value`` in order, is merged into the typed schema (typed.py), so an unknown key or
   a wrong type is refused wherever it stands: in a preset, as ``typo=1`` or as ``+typo=1``.

Given up: adding keys (``+key=value``), deleting them (``~key``) and package overrides (``group@package=``). The
schema is the whole vocabulary.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deepv3.config.schema import Config
from deepv3.config.typed import build, field_paths, near_misses, nest
from deepv3.errors import ConfigError

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
PRESET = "config"  # the one group that is added (+config=NAME), not replaced

# A run folder may be continued under another value of these: they change where, how long, how fast or how loud a run
# is, not which run it is. Everything else is the run's identity.
FREE = (
    "run_dir", "parallel", "checkpoint", "logging", "cluster", "data.cache_dir", "data.num_proc", "data.bad_documents",
    "train.steps", "train.tokens", "train.micro_batch_size", "train.resume", "train.finish", "train.deterministic",
    "train.cuda_graph", "train.recompute", "train.loss_chunk", "train.eval_every", "train.eval_sequences",
    "train.max_skipped_steps", "train.hang_seconds", "train.spike", "train.spike_threshold", "train.spike_window",
    "train.prompt", "train.sample_tokens",
)  # fmt: skip

T = TypeVar("T")


def compose(argv: Sequence[str], config_dir: Path = CONFIG_DIR) -> Config:
    """The run that a command line asks for. argv: ``+config=NAME``, ``group=FILE`` and ``key=value``, in any order.

    Raises ConfigError for anything that is not in the schema; impossible combinations are validate.py's.
    """
    overrides = parse_overrides(argv)
    chosen = [o for o in overrides if is_choice(o, config_dir)]
    layers = [layer(o) for o in overrides if o not in chosen]
    return build(Config, _compose_files(chosen, config_dir), *layers)


def from_arguments(argv: Sequence[str], schema: type[T]) -> T:
    """``key=value`` arguments into a small schema of their own, for launch scripts that take no Config."""
    return build(schema, *(layer(o, schema) for o in parse_overrides(argv)))


def parse_overrides(argv: Sequence[str]) -> list[Override]:
    """Hydra's override grammar, its errors as ours."""
    parser, found = OverridesParser.create(), []
    for argument in argv:
        try:
            found.append(parser.parse_override(argument))
        except HydraException as error:
            why = str(error).splitlines()[0]
            form = "write key=value, and quotes around what holds commas or spaces: \"key='a, b'\""
            raise ConfigError(f"{argument}: {why}; {form}") from None
    return found


def groups(config_dir: Path = CONFIG_DIR) -> dict[str, list[str]]:
    """Group -> names of its files."""
    folders = sorted(folder for folder in config_dir.iterdir() if folder.is_dir())
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def headline(preset: str) -> str:
    """What a preset is: the first line of its file's comment."""
    lines = (CONFIG_DIR / PRESET / f"{preset}.yaml").read_text(encoding="utf-8").splitlines()
    return next(line.lstrip("# ") for line in lines if line.startswith("# ") and "@package" not in line)


def is_choice(override: Override, config_dir: Path) -> bool:
    """Whether the override picks a file: ``+config=NAME`` or ``GROUP=FILE``. Raises ConfigError where there is none."""
    known, group = groups(config_dir), override.key_or_group
    if group not in known:
        return False
    name = override.value()
    if isinstance(name, dict):
        raise ConfigError(
            f"{override.input_line}: {group}=NAME picks a file; set fields one by one, {group}.FIELD=VALUE"
        )
    if group == PRESET and not override.is_add():
        raise ConfigError(f"{override.input_line}: a preset is added, write +config={name}")
    if override.is_delete() or override.package is not None or (group != PRESET and override.is_add()):
        raise ConfigError(f"{override.input_line}: write {group}=NAME with NAME one of {', '.join(known[group])}")
    if override.is_sweep_override():
        raise ConfigError(f"{override.input_line}: several values are a sweep; add -m")
    if name not in known[group]:
        hint = near_misses(str(name), known[group])
        raise ConfigError(
            f"{override.input_line}: no configs/{group}/{name}.yaml.{hint} There is {', '.join(known[group])}"
        )
    return True


def layer(override: Override, schema: type = Config) -> dict[str, Any]:
    """``key=value`` as nested mappings. Raises ConfigError for anything but the setting of a known field."""
    line, path = override.input_line, override.key_or_group
    known = list(field_paths(schema))
    if path.split(".")[0] not in {name.split(".")[0] for name in known}:
        raise ConfigError(f"{line}: no such field.{near_misses(path, known)} docs/config.md lists every field")
    if override.is_delete():
        raise ConfigError(f"{line}: a field cannot be deleted; set it, {path}=VALUE")
    if override.is_add() or override.is_force_add():
        raise ConfigError(f"{line}: only +config=NAME is added; write {path}=VALUE")
    if override.is_sweep_override():
        raise ConfigError(f"{line}: several values are a sweep; add -m, or [a,b] for a list")
    return nest(path, override.value())


def _compose_files(chosen: Sequence[Override], config_dir: Path) -> Any:
    try:
        with initialize_config_dir(config_dir=str(config_dir), version_base="1.3"):
            composed = hydra_compose("pretrain", overrides=[str(o.input_line) for o in chosen])
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"configs/: {error}") from None
    return OmegaConf.to_container(composed, resolve=False)


def to_dict(cfg: Config) -> dict[str, Any]:
    """The whole config as nested plain values."""
    return asdict(cfg)


def to_yaml(cfg: Config) -> str:
    """The whole resolved config, defaults included."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def from_yaml(path: str | Path) -> Config:
    """A config written by ``to_yaml``. Raises ConfigError where the file is missing, damaged or of another schema."""
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: cannot be read as a config: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {type(values).__name__}, not a config")
    try:
        return build(Config, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def identity(cfg: Config) -> dict[str, Any]:
    """Dotted path -> value of every field that makes two runs different runs (all but FREE)."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        if prefix in FREE:
            return
        if isinstance(value, dict):
            for key, inner in value.items():
                visit(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    visit("", to_dict(cfg))
    return flat


def config_hash(cfg: Config) -> str:
    """16 hex digits over ``identity``: equal for two configs that may share a run folder."""
    return hashlib.sha256(json.dumps(identity(cfg), sort_keys=True).encode()).hexdigest()[:16]


def differences(stored: Config, wanted: Config) -> list[str]:
    """Where two runs are not the same run, as ``path: stored -> wanted``; empty where their hashes agree."""
    a, b = identity(stored), identity(wanted)
    return [f"{key}: {a.get(key)} -> {b.get(key)}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
