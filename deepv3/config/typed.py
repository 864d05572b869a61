"""Values into a typed schema: every key must be a field, every value must have the field's type.

OmegaConf checks and converts scalars; this file walks the schema itself, for three things OmegaConf does not do:
an error that names the whole path with near misses, settings below an optional section that is null
(``model.rope_scaling.factor=8``), and lists of sections (``data.sources=[{path: /corpus}]``).
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deepv3.errors import ConfigError

T = TypeVar("T")


def strip_optional(hint: Any) -> tuple[Any, bool]:
    """``Optional[int]`` -> (int, True); ``int`` -> (int, False)."""
    if get_origin(hint) in (Union, UnionType):
        inner = [argument for argument in get_args(hint) if argument is not type(None)]
        return inner[0], len(inner) < len(get_args(hint))
    return hint, False


def element_type(hint: Any) -> Any:
    """``list[Segment]`` -> Segment; None where the hint is not a list."""
    return get_args(hint)[0] if get_origin(hint) is list else None


def type_name(hint: Any) -> str:
    """The type as a user reads it: ``int``, ``float or null``, ``list of SourceConfig``."""
    kind, optional = strip_optional(hint)
    inner = element_type(kind)
    name = f"list of {inner.__name__}" if inner else kind.__name__
    return f"{name} or null" if optional else name


def field_paths(schema: type, prefix: str = "") -> Iterator[str]:
    """Every dotted path a value can be given to: sections (``model``) and their fields (``model.hidden_size``)."""
    for name, hint in get_type_hints(schema).items():
        kind, _ = strip_optional(hint)
        yield prefix + name
        if is_dataclass(kind):
            yield from field_paths(kind, f"{prefix}{name}.")  # type: ignore[arg-type]


def near_misses(word: str, known: Sequence[str]) -> str:
    """' Did you mean ...?' or nothing; same last part first (``lr`` for ``optim.lr``), then similar spelling."""
    same_leaf = [path for path in known if path.split(".")[-1] == word.split(".")[-1]]
    best = list(dict.fromkeys(same_leaf + difflib.get_close_matches(word, known, n=3, cutoff=0.7)))[:3]
    return f" Did you mean {' or '.join(best)}?" if best else ""


def merge(node: DictConfig, schema: type, values: Mapping[Any, Any], root: type, prefix: str = "") -> None:
    """Set ``values`` (nested mappings) on ``node``, a structured config of ``schema``. Lists are replaced whole.

    root: the outermost schema, for the suggestions. prefix: dotted path of ``node``, empty or ending in a dot.
    Raises ConfigError naming the path, what was given and what the field takes.
    """
    hints = get_type_hints(schema)
    for key, value in values.items():
        path = f"{prefix}{key}"
        if key not in hints:
            known = [prefix + name for name in hints] + list(field_paths(root))
            raise ConfigError(f"{path}: no such field.{near_misses(path, known)}")
        kind, optional = strip_optional(hints[key])
        inner = element_type(kind)
        if is_dataclass(kind) and isinstance(value, Mapping):
            if node[key] is None:
                node[key] = OmegaConf.structured(kind)
            merge(node[key], kind, value, root, f"{path}.")  # type: ignore[arg-type]
        elif is_dataclass(kind) and not (value is None and optional):
            raise ConfigError(
                f"{path}={value!r}: this is a section, not a value; set one of its fields, {path}.NAME=VALUE"
            )
        elif is_dataclass(inner) and isinstance(value, Sequence) and not isinstance(value, str):
            node[key] = [_element(inner, item, root, f"{path}[{i}]") for i, item in enumerate(value)]  # type: ignore[arg-type]
        else:
            _set_scalar(node, schema, key, value, path, type_name(hints[key]))


def _element(schema: type, item: Any, root: type, path: str) -> DictConfig:
    if not isinstance(item, Mapping):
        raise ConfigError(f"{path}={item!r}: not a mapping; write {{{fields(schema)[0].name}: VALUE, ...}}")
    element = OmegaConf.structured(schema)
    merge(element, schema, item, root, f"{path}.")
    return element


def _set_scalar(node: DictConfig, schema: type, key: str, value: Any, path: str, takes: str) -> None:
    try:
        node[key] = value
    except OmegaConfBaseException as error:
        doc = next(f.metadata.get("doc", "") for f in fields(schema) if f.name == key)
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"{path}={value!r}: {reason}. The field takes {takes}: {doc}") from None


def build(schema: type[T], *layers: Mapping[Any, Any]) -> T:
    """A ``schema`` object: its defaults, each layer merged over the one before, then ``${path}`` resolved."""
    node = OmegaConf.structured(schema)
    for values in layers:
        merge(node, schema, values, schema)
    try:
        return OmegaConf.to_object(node)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{getattr(error, 'full_key', '') or schema.__name__}: {str(error).splitlines()[0]}"
        ) from None


def nest(path: str, value: Any) -> dict[str, Any]:
    """``nest("a.b", 1)`` -> ``{"a": {"b": 1}}``."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value
