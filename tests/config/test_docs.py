"""docs/config.md is what the schema says, every field says what it is, and somebody reads it."""

import ast
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from deepv3.config import schema
from deepv3.config.describe import document
from deepv3.config.typed import element_type, strip_optional

ROOT = Path(__file__).parents[2]

# What an object of each schema class is called in the code; a field counts as read only as an attribute of such a name.
CALLED = {
    "Config": {"cfg", "config"},
    "ModelConfig": {"cfg", "model", "m"},
    "RopeScaling": {"yarn"},
    "Segment": {"segment"},
    "OptimConfig": {"cfg", "optim"},
    "SourceConfig": {"source", "config"},
    "DataConfig": {"cfg", "data"},
    "ParallelConfig": {"parallel"},
    "PrecisionConfig": {"precision"},
    "BatchRamp": {"ramp"},
    "TrainConfig": {"train"},
    "CheckpointConfig": {"checkpoint"},
    "LoggingConfig": {"logging"},
    "ClusterConfig": {"cluster"},
}


def schema_classes() -> dict[str, type]:
    """The classes of the schema by name."""
    return {name: kind for name, kind in vars(schema).items() if is_dataclass(kind) and isinstance(kind, type)}


def reads(source: str) -> set[tuple[str, str]]:
    """(owner, attribute) of every attribute read: ``cfg.train.steps`` -> ("cfg", "train"), ("train", "steps").

    ``asdict(yarn)`` reads everything: ("yarn", "*").
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add((last_name(node.value), node.attr))
        elif isinstance(node, ast.Call) and last_name(node.func) == "asdict":
            found.add((last_name(node.args[0]), "*"))
    return found


def last_name(node: ast.expr) -> str:
    """``train`` of ``self.cfg.train``."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def test_a_read_is_told_from_a_write_and_from_another_owner():
    assert reads("self.cfg.train.steps + 1") >= {("train", "steps"), ("cfg", "train")}
    assert ("train", "steps") not in reads("train.steps = 3\nloop.steps\nf(steps=4)")


@pytest.fixture(scope="module")
def all_reads() -> set[tuple[str, str]]:
    """Attributes read by the package and the launch scripts; config/ only checks and prints, so it does not count."""
    folders = [ROOT / "deepv3", ROOT / "launch"]
    files = [file for folder in folders for file in folder.rglob("*.py") if file.parent.name != "config"]
    return {read for file in files for read in reads(file.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("name", sorted(CALLED))
def test_every_field_is_read_by_somebody(name, all_reads):
    whole = {(owner, "*") for owner in CALLED[name] - {"cfg", "config"}}  # a config saved whole is not a config read
    unread = [
        f.name
        for f in fields(schema_classes()[name])
        if not ({(owner, f.name) for owner in CALLED[name]} | whole) & all_reads
    ]
    assert not unread, f"nobody reads {unread} of {name}; a knob that does nothing misleads"


def test_the_table_of_names_covers_the_schema():
    assert set(CALLED) == set(schema_classes())


def test_every_field_has_a_text_of_its_own():
    for kind in schema_classes().values():
        for f in fields(kind):
            text = f.metadata.get("doc", "")
            assert text.endswith(".") and len(text) > 4, f"{kind.__name__}.{f.name} has no one-line text"


def test_every_section_is_reachable_from_the_whole_run():
    def below(kind: type) -> set[type]:
        inner = [strip_optional(hint)[0] for hint in get_type_hints(kind).values()]
        inner = [element_type(hint) or hint for hint in inner]
        return {kind}.union(*(below(hint) for hint in inner if is_dataclass(hint)))

    assert below(schema.Config) == set(schema_classes().values())


def test_the_generated_page_is_up_to_date():
    stored = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert stored == document(), "stale: run python -m deepv3.config.describe > docs/config.md"
