"""The next command to type after a failure: the same one with the mistake mended, where the message says how.

Messages of the project name their fix in two forms, which are read here: ``set key=value`` and ``key: ... Did you mean
other``. What cannot be mended by an override is left to the user, with the command that follows.
"""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from deepv3.errors import EXIT_USER

SET = re.compile(r"\b[Ss]et ([a-z_]+(?:\.[a-z_]+)*)=([\w.+-]*[\w+-])")
MEANT = re.compile(r"^(?P<given>\S+): no .*?Did you mean (?P<meant>[\w.-]*\w)", re.MULTILINE)


def command(script: str, arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """How this process was started, as one would type it: python or torchrun, the script, its arguments."""
    here = Path(script).is_absolute() and Path(script).is_relative_to(Path.cwd())
    path = os.path.relpath(script) if here else script
    if "WORLD_SIZE" not in environment:
        return shlex.join(["python", path, *arguments])
    local = environment.get("LOCAL_WORLD_SIZE", "1")
    nodes = int(environment["WORLD_SIZE"]) // max(1, int(local))
    torchrun = ["torchrun", f"--nproc_per_node={local}"] + ([f"--nnodes={nodes}", "..."] if nodes > 1 else [])
    return shlex.join([*torchrun, path, *arguments]) + (" on every node" if nodes > 1 else "")


def mended(arguments: Sequence[str], reason: str) -> list[str] | None:
    """The arguments with the fixes that the message names; None where it names none that changes them."""
    new = list(arguments)
    for found in MEANT.finditer(reason):
        given, meant = found["given"], found["meant"]
        name, equals, _ = given.partition("=")
        if equals:  # a value, such as precision=fp31
            new = [f"{name}={meant}" if a == given else a for a in new]
        else:  # a key, such as train.stesp
            new = [meant + a[len(given) :] if a.startswith(f"{given}=") else a for a in new]
    for key, value in SET.findall(reason):
        new = [a for a in new if not a.startswith(f"{key}=")] + [f"{key}={value}"]
    return new if new != list(arguments) else None


def next_step(code: int, reason: str, script: str, arguments: Sequence[str]) -> str:
    """What follows "next: " after an end with `code` for `reason`."""
    if code != EXIT_USER:
        return command(script, arguments)
    better = mended(arguments, reason)
    if better is not None:
        return command(script, better)
    return f"mend that, then {command(script, arguments)}"
