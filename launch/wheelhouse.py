"""Collects the wheels that an air-gapped node lacks: ``python launch/wheelhouse.py python=3.12 output=wheelhouse``.

1. Lacking is what deepv3 and its GPU tests need, by the installed packages' own metadata, less what the node has by
   ``have`` and everything those need.
2. Wheels come from the index for the node's Python, in the versions installed here; what is published as source only
   (deepspeed, antlr4) is built here, which gives wheels for any Python.

On the node: ``make setup WHEELHOUSE=wheelhouse``. Given up: other systems than Linux with glibc 2.28 or later.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deepv3.config.cli import guarded
from deepv3.config.compose import from_arguments
from deepv3.config.schema import knob

NEEDED = ("deepv3", "pytest", "setuptools", "wheel")
SOURCE_ONLY = ("deepspeed", "antlr4-python3-runtime")
GLIBC = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_26", "manylinux_2_17", "manylinux2014", "manylinux1")


@dataclass
class Arguments:
    """The command line."""

    python: str = knob("3.12", "Python version of the node.")
    output: str = knob("wheelhouse", "Folder to fill.")
    arch: str = knob("x86_64", "x86_64 | aarch64: processor of the node.")
    have: list[str] = knob(["torch", "triton", "transformers"], "Packages that the node has, with all they need.")


def closure(names: Sequence[str], python: str, arch: str) -> set[str]:
    """The packages and all they need on the node, extras included, by the metadata of what is installed here."""
    seen: set[tuple[str, str]] = set()
    todo = [(canonicalize_name(name), "") for name in names]
    node = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": arch}
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for line in distribution(name).requires or []:
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({**node, "extra": extra}):
                todo += [(canonicalize_name(need.name), inner) for inner in ("", *need.extras)]
    return {name for name, _ in seen}


def lacking(args: Arguments) -> list[str]:
    """``name==version`` of every wheel the node lacks."""
    names = closure(NEEDED, args.python, args.arch) - closure(args.have, args.python, args.arch) - {"deepv3"}
    return [f"{name}=={distribution(name).version}" for name in sorted(names)]


def collect(args: Arguments) -> None:
    """Fill the folder."""
    built = [pin for pin in lacking(args) if pin.split("==")[0] in SOURCE_ONLY]
    fetched = [pin for pin in lacking(args) if pin not in built]
    target = ["--python-version", args.python, "--implementation", "cp", "--only-binary", ":all:"]
    target += [part for tag in GLIBC for part in ("--platform", f"{tag}_{args.arch}")]
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "download", "--no-deps", "--dest", args.output, *target, *fetched], check=True)
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", args.output, *built], check=True)
    print(f"{len(built) + len(fetched)} wheels for Python {args.python} on {args.arch} in {args.output}/")


if __name__ == "__main__":
    sys.exit(guarded(lambda: collect(from_arguments(sys.argv[1:], Arguments))))
