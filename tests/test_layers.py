"""Imports point down: a file knows files of a smaller level, or of its own group without going in circles.

The table is the one of the package's docstring. Imports inside functions count: they are knowledge all the same.
"""

import ast
import re
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import deepv3

ROOT = Path(__file__).parents[1]

LEVELS = {
    "errors": 0, "config": 0, "arithmetic": 0, "kernels": 0, "dist": 1, "precision": 2, "data": 3, "model": 3,
    "pipeline": 4, "planner": 5, "optim": 5, "checkpoint": 6, "export": 7, "train": 7, "generate": 7, "eval": 7,
    "launch": 8,
}  # fmt: skip

# Level 0 in itself: what each group may know besides its own files. Kernels know torch and triton, nothing of ours.
GROUND = {"errors": set(), "kernels": set(), "config": {"errors"}, "arithmetic": {"config", "errors"}}

TORCH_FREE = ("deepv3/errors.py", "deepv3/config/", "deepv3/arithmetic.py", "deepv3/optim/ramps.py", "deepv3/planner/")


def module_of(file: Path) -> str:
    """``deepv3/model/mla.py`` -> deepv3.model.mla; kernels/ is installed as deepv3.kernels."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = ("deepv3", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(f): f for folder in ("deepv3", "kernels", "launch") for f in sorted((ROOT / folder).rglob("*.py"))}


def group_of(module: str) -> str:
    """deepv3.model.mla -> model; launch.pretrain -> launch."""
    parts = module.split(".")
    return parts[0] if parts[0] == "launch" else parts[1] if len(parts) > 1 else ""


@cache
def imports(module: str) -> frozenset[str]:
    """Modules that a file of ours imports, anywhere in it; ``from package import file`` names the file."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relative to itself; write the whole path"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in inner}
    return frozenset(found - {module})


def ours(module: str) -> set[str]:
    """The imports that are files of this repository."""
    return {name for name in imports(module) if name in FILES and group_of(name)}


def outside(module: str) -> set[str]:
    """Top-level names of the imports that are not."""
    return {name.split(".")[0] for name in imports(module)} - {"deepv3"}


def test_every_file_has_a_level():
    assert {group_of(module) for module in FILES} - {""} <= set(LEVELS)


def test_the_package_names_the_same_levels():
    told = {}
    for names, level in re.findall(r"([a-z, ]+) \((\d)\)", " ".join((deepv3.__doc__ or "").split())):
        told |= {name.strip(): int(level) for name in names.split(",")}
    present = {group_of(module) for module in FILES} - {""}
    assert {group: told.get(group) for group in present} == {group: LEVELS[group] for group in present}


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module):
    group = group_of(module)
    for name in ours(module):
        other = group_of(name)
        if other == group or not group:
            continue
        if LEVELS[group] == 0:
            assert other in GROUND[group], f"{module} (ground level) imports {name}"
        else:
            assert LEVELS[other] < LEVELS[group], f"{module} (level {LEVELS[group]}) imports {name} ({LEVELS[other]})"


def test_no_file_imports_itself_by_a_detour():
    try:
        list(TopologicalSorter({module: ours(module) for module in FILES}).static_order())
    except CycleError as error:
        pytest.fail(f"imports go in a circle: {' -> '.join(error.args[1])}")


def test_one_file_knows_deepspeed():
    assert [module for module in FILES if "deepspeed" in outside(module)] == ["deepv3.optim.engine"]


def test_kernels_know_torch_and_triton_only():
    allowed = {"torch", "triton", "numpy"}
    for module in FILES:
        if group_of(module) == "kernels":
            foreign = {name for name in outside(module) if name not in allowed and not is_standard(name)}
            assert not foreign, f"{module} imports {foreign}"


def is_standard(name: str) -> bool:
    """Whether a top-level module is Python's own."""
    return name in sys.stdlib_module_names


def reachable(module: str) -> set[str]:
    """The files that importing a file loads."""
    seen, todo = set(), [module]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo += ours(current)
    return seen


def test_what_plans_on_paper_never_loads_torch():
    for module, file in FILES.items():
        if str(file.relative_to(ROOT)).startswith(TORCH_FREE):
            loaded = {name: outside(name) & {"torch", "triton", "numpy", "deepspeed"} for name in reachable(module)}
            assert not any(loaded.values()), f"{module} loads { ({k: v for k, v in loaded.items() if v}) }"


def test_package_files_are_empty_but_for_the_map_and_the_kernel_api():
    for module, file in FILES.items():
        if file.name == "__init__.py" and module not in ("deepv3", "deepv3.kernels"):
            assert not file.read_text().strip(), f"{file.relative_to(ROOT)} holds code"


def test_files_are_short():
    files = [*FILES.values(), *(ROOT / "tests").rglob("*.py")]
    lengths = {str(f.relative_to(ROOT)): len(f.read_text(encoding="utf-8").splitlines()) for f in files}
    assert {name: n for name, n in lengths.items() if n > 400} == {}
    assert {name: n for name, n in lengths.items() if n >= 80 and name.startswith("launch/")} == {}
