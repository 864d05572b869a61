"""Generates docs/config.md from the schema: ``python -m deepv3.config.describe > docs/config.md``."""

from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, get_type_hints

import yaml

from deepv3.config.compose import CONFIG_DIR, PRESET, groups, headline
from deepv3.config.schema import Config
from deepv3.config.typed import element_type, strip_optional, type_name

INTRODUCTION = """# Configuration

Generated from `deepv3/config/schema.py` by `python -m deepv3.config.describe > docs/config.md`; a test fails if it is
stale. Values live in `configs/`, types, defaults and this text in the schema.

```
torchrun [...] launch/pretrain.py +config=NAME [GROUP=FILE] [key=value ...]
```

`+config=NAME` takes a whole-run preset of `configs/config/`, `GROUP=FILE` replaces one part by a file of
`configs/GROUP/`, `key=value` sets one field of the tables below; nothing else can be added. A section that is null is
filled by setting one of its fields (`model.rope_scaling.factor=40`), a list is written whole
(`data.sources=[{path: /a, weight: 2}, {path: /b}]`), `null` empties what may be null. `--cfg job` prints the result.

Units: tokens, sequences and steps as named. "V3 x" is section x of the DeepSeek-V3 technical report, "released" the
published code and weights.
"""


def document() -> str:
    """The text of docs/config.md."""
    return "\n".join([INTRODUCTION, *_presets(), *_table("Whole run", Config, ""), *_sections(Config, "")])


def _presets() -> Iterator[str]:
    files = groups()
    yield "## Presets\n\n| `+config=` | what |\n|---|---|"
    for name in files.pop(PRESET):
        yield f"| `{name}` | {headline(name)} |"
    yield "\n## Parts\n\nThe first of each is what a run without a preset takes.\n\n| group | files |\n|---|---|"
    chosen = {k: v for entry in _defaults() if isinstance(entry, dict) for k, v in entry.items()}
    for group, names in files.items():
        ordered = sorted(names, key=lambda name: name != chosen[group])
        yield f"| `{group}` | {', '.join(f'`{name}`' for name in ordered)} |"
    yield ""


def _defaults() -> list[Any]:
    return yaml.safe_load((CONFIG_DIR / "pretrain.yaml").read_text(encoding="utf-8"))["defaults"]


def _sections(schema: Any, prefix: str) -> Iterator[str]:
    """The tables of every section below ``schema``, depth first; each entry type of a list where it is first met."""
    seen: set[Any] = set()
    for f in fields(schema):
        kind, _ = strip_optional(get_type_hints(schema)[f.name])
        inner = element_type(kind)
        if is_dataclass(kind):
            yield from _table(f"`{prefix}{f.name}`", kind, f"{prefix}{f.name}.")
            yield from _sections(kind, f"{prefix}{f.name}.")
        elif is_dataclass(inner) and inner not in seen:
            seen.add(inner)
            yield from _table(f"Entries of `{prefix}{f.name}` ({inner.__name__})", inner, "")  # type: ignore[union-attr]


def _table(title: str, schema: Any, prefix: str) -> Iterator[str]:
    hints = get_type_hints(schema)
    yield f"## {title}\n\n{(schema.__doc__ or '').strip()}\n\n| field | type | default | what |\n|---|---|---|---|"
    for f in fields(schema):
        if not is_dataclass(hints[f.name]):
            yield f"| `{prefix}{f.name}` | {type_name(hints[f.name])} | `{_default(f)}` | {_text(f)} |"
    yield ""


def _text(f: Field) -> str:
    return f.metadata["doc"].replace("|", "\\|")


def _default(f: Field) -> str:
    value = f.default_factory() if f.default_factory is not MISSING else f.default
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value) or "''"


if __name__ == "__main__":
    print(document(), end="")
