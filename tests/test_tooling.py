"""The commands of the repository: what they are, what they run, what they refuse, and the lists they rest on."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TARGETS = [
    "setup", "train", "test", "test-full", "soak", "test-gpu", "test-browser", "test-versions", "check", "fmt", "bench",
    "wheelhouse", "clean",
]  # fmt: skip


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """make, quiet about its directory, without what the make above this test has set."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=60)


def recipe(target: str, *variables: str) -> str:
    """The commands that a target would run, the set-up left out."""
    return make("-n", "-o", ".venv/.installed", target, *variables).stdout


def test_make_alone_lists_every_target_with_a_text():
    listed = dict(re.findall(r"^  make ([a-z-]+) +(.+)$", make().stdout, re.MULTILINE))
    assert sorted(listed) == sorted([*TARGETS, "help"])


def test_make_train_is_the_command_of_the_readme():
    assert "torchrun --standalone --nproc_per_node=1 launch/pretrain.py +config=tiny" in recipe("train")
    assert "+config=tiny train.steps=3" in recipe("train", "ARGS=train.steps=3")


def test_make_test_leaves_out_what_needs_a_gpu_a_browser_other_releases_or_long():
    assert '-m "not gpu and not slow and not browser and not versions"' in recipe("test")
    assert '-m "not gpu and not browser and not versions"' in recipe("test-full")
    for marker in ("gpu", "browser", "versions"):
        assert f"-m {marker}" in recipe(f"test-{marker}")


def test_continuous_integration_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "exec make test"


def test_make_check_rewrites_nothing():
    commands = recipe("check")
    assert "ruff format --check" in commands and "mypy" in commands
    assert "--fix" not in commands


@pytest.mark.parametrize(
    "variables, words, absent",
    [
        ([], ["pip install torch==2.13.0", "-c constraints.txt -e '.[dev]'"], "--index-url"),
        (
            ["INDEX=https://wheels", "TORCH=2.11.0"],
            ["pip install --index-url https://wheels torch==2.11.0"],
            "--no-index",
        ),
        (["WHEELHOUSE=there"], ["venv --system-site-packages", "--no-index --find-links there"], "torch=="),
    ],
)
def test_set_up_takes_torch_from_where_it_is_told(variables, words, absent, tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    commands = " ".join(make("-n", "setup", *variables, cwd=tmp_path).stdout.split())
    for word in words:
        assert word in commands
    assert absent not in commands


def test_set_up_is_done_once(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").write_text("")
    assert "Nothing to be done" in make("setup", cwd=tmp_path).stdout


def test_set_up_refuses_another_python_by_name(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "python2").write_text("#!/bin/sh\n[ $1 = -V ] && echo Python 2.7 || exit 1\n")
    (tmp_path / "python2").chmod(0o755)
    done = make("setup", f"PYTHON={tmp_path}/python2", cwd=tmp_path)
    assert done.returncode == 2
    assert "deepv3 needs Python 3.11 to 3.13" in done.stdout and "is Python 2.7" in done.stdout
    assert not (tmp_path / ".venv").exists()


def constraints() -> dict[str, Requirement]:
    """The lines of constraints.txt by package."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {need.name.lower().replace("_", "-"): need for need in map(Requirement, filter(None, lines))}


def test_every_direct_dependency_is_constrained_within_its_range():
    direct = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    for need in map(Requirement, direct):
        pinned = [s.version for s in constraints()[need.name].specifier if s.operator == "=="]
        assert all(need.specifier.contains(v) for v in pinned), f"{need} excludes constraints.txt's {pinned}"
        assert pinned or need.name in ("torch", "triton")


def test_what_is_installed_obeys_the_constraints():
    for name in ("torch", "deepspeed", "transformers", "datasets", "hydra-core", "omegaconf", "numpy"):
        assert constraints()[name].specifier.contains(version(name)), f"{name} {version(name)}: run make setup"


def test_every_package_folder_is_installed():
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "deepv3").rglob("__init__.py")}
    found |= {".".join(("deepv3", *p.parent.relative_to(ROOT).parts)) for p in (ROOT / "kernels").rglob("__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_third_party_import_is_a_declared_dependency():
    optional = PROJECT["project"]["optional-dependencies"]
    lines = [*PROJECT["project"]["dependencies"], *optional["eval"]]
    declared = {Requirement(line).name.replace("-", "_") for line in lines}
    names = {"hydra_core": "hydra", "pyyaml": "yaml"}
    known = {names.get(name, name) for name in declared} | set(sys.stdlib_module_names)
    known |= {"deepv3", "torchtitan"}  # the peer of the benchmark brings its own environment
    known |= {file.stem for file in (ROOT / "launch").glob("*.py")}  # a script's own folder is on its path
    imported = set()
    for file in [f for folder in ("deepv3", "kernels", "launch") for f in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported |= {(module.split(".")[0], str(file.relative_to(ROOT))) for module in modules}
    assert [pair for pair in sorted(imported) if pair[0] not in known] == []


def test_the_licence_is_the_whole_apache_licence():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
    assert len(text.splitlines()) == 202
    assert PROJECT["project"]["license"] == "Apache-2.0"


@pytest.fixture(scope="module")
def wheelhouse() -> ModuleType:
    """launch/wheelhouse.py as a module."""
    spec = importlib.util.spec_from_file_location("launch_wheelhouse", ROOT / "launch" / "wheelhouse.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_wheelhouse_holds_what_a_node_with_torch_and_transformers_lacks(wheelhouse):
    pins = dict(pin.split("==") for pin in wheelhouse.lacking(wheelhouse.Arguments()))
    for name in (
        "deepspeed",
        "hydra-core",
        "omegaconf",
        "antlr4-python3-runtime",
        "datasets",
        "pyarrow",
        "wandb",
        "pytest",
    ):
        assert pins[name] == version(name)
    assert not {"torch", "triton", "transformers", "numpy", "deepv3"} & set(pins)


def test_the_wheelhouse_grows_where_the_node_has_less(wheelhouse):
    usual = wheelhouse.lacking(wheelhouse.Arguments())
    bare = wheelhouse.lacking(wheelhouse.Arguments(have=["torch"]))
    assert set(usual) < set(bare)
    assert {"transformers", "tokenizers"} <= {pin.split("==")[0] for pin in bare}


def test_extras_and_markers_of_the_node_decide_what_is_needed(wheelhouse, monkeypatch):
    metadata = {
        "a": ["b[x]", "c; python_version < '3.12'"],
        "b": ["d; extra == 'x'", "e; extra == 'y'"],
        "c": None,
        "d": None,
    }
    monkeypatch.setattr(wheelhouse, "distribution", lambda name: type("D", (), {"requires": metadata[name]}))
    assert wheelhouse.closure(["a"], "3.12", "x86_64") == {"a", "b", "d"}
    assert wheelhouse.closure(["a"], "3.11", "x86_64") == {"a", "b", "c", "d"}


def test_every_test_file_has_a_name_of_its_own():
    """pytest takes two files of one name for one module."""
    names = [file.name for file in (ROOT / "tests").rglob("*.py") if file.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
