"""The command-line side of every launch script: compose, validate, call, and say how it ended.

Whatever happens, the process ends with one of the exit codes of errors.py and leaves ``run_dir/exit.json``
{code, reason, rank, step}, because torchrun hides exit codes. What the user got wrong is a short message; a traceback
means a bug of ours. Of ranks that fail for the same reason one speaks.
"""

import errno
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from deepv3.config.advice import next_step
from deepv3.config.compose import PRESET, compose, groups, headline, to_yaml
from deepv3.config.schema import Config
from deepv3.config.validate import validate
from deepv3.errors import EXIT_DONE, EXIT_RESTART, EXIT_USER, ConfigError, DeepV3Error, ResourceError

EXIT_BUG = 1
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
SILENCE = 3.0  # seconds that other ranks leave rank 0 to tell of a mistake all share


def main(run: Callable[[Config], object]) -> NoReturn:
    """Entry of a launch script that works on a whole Config: ``run`` gets the validated one; ends the process."""
    leave(execute(run, sys.argv[1:]))


def leave(code: int) -> NoReturn:
    """End the process. A rank that fails beside others ends at once: what would be tidied up (communicators, threads
    that wait for a dead peer) may never return."""
    if code != EXIT_DONE and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def execute(run: Callable[[Config], object], argv: Sequence[str]) -> int:
    """``main`` without the exit: returns the exit code. ``--help`` and ``--cfg job`` print and do nothing else."""
    arguments = list(argv)
    try:
        if "--help" in arguments or "-h" in arguments:
            print(usage())
            return EXIT_DONE
        if "--cfg" in arguments:
            print(to_yaml(compose(_without_cfg(arguments))), end="")
            return EXIT_DONE
        cfg = compose(arguments)
    except DeepV3Error as error:
        return report(error, _likely_run_dir(arguments), identical=True)
    try:
        validate(cfg, int(os.environ.get("WORLD_SIZE", "1")))
    except DeepV3Error as error:
        return report(error, Path(cfg.run_dir), identical=True)
    return guarded(lambda: run(cfg), Path(cfg.run_dir))


def guarded(work: Callable[[], object], run_dir: Path | None = None) -> int:
    """Call ``work``; its end, good or bad, as an exit code, a message and ``run_dir/exit.json``."""
    if (again := _same_mistake(run_dir)) is not None:
        return again
    try:
        _open_folder(run_dir)
        work()
    except (Exception, KeyboardInterrupt) as error:
        return report(error, run_dir)
    record_exit(run_dir, EXIT_DONE, "done")
    return EXIT_DONE


def report(error: BaseException, run_dir: Path | None, identical: bool = False) -> int:
    """Tell the user, record the end, return the exit code. identical: every rank meets this error; rank 0 speaks."""
    if isinstance(error, OSError) and error.errno in NO_ROOM:  # whoever was writing: metrics, tokens, pictures
        where = error.filename or run_dir or "a file"
        error = ResourceError(
            f"cannot write {where}: {error.strerror}; free some space, or set run_dir to another disk"
        )
    if isinstance(error, DeepV3Error):
        code, reason = error.exit_code, str(error)
    elif isinstance(error, KeyboardInterrupt):
        code, reason = EXIT_RESTART, "interrupted"
    else:
        code, reason = EXIT_BUG, f"{type(error).__name__}: {error}"
    if identical:
        if rank() != 0:
            time.sleep(SILENCE)  # torchrun ends all ranks as soon as one has ended: let rank 0 be that one
            return code
        with suppress(ConfigError):  # record_exit says so
            _open_folder(run_dir)
    if record_exit(run_dir, code, reason):
        if code == EXIT_BUG:
            traceback.print_exception(error)
        else:
            say(type(error).__name__, reason)
        if run_dir is None or _read_json(run_dir / "exit.json").get("rank") == rank():  # the cause, not what followed
            print(f"next: {next_step(code, reason, sys.argv[0], sys.argv[1:])}", file=sys.stderr, flush=True)
    return code


def record_exit(run_dir: Path | None, code: int, reason: str) -> bool:
    """Write ``run_dir/exit.json`` (atomic). The first failure stays: it is the cause of those that follow it.

    Returns whether this rank has something new to say: False where another rank failed before for the same reason.
    step is the last one in metrics.jsonl, null where there is none.
    """
    if run_dir is None or (code == EXIT_DONE and rank() != 0):
        return True
    path = run_dir / "exit.json"
    earlier = _read_json(path)
    if earlier.get("code", EXIT_DONE) != EXIT_DONE:
        return (earlier["code"], earlier["reason"]) != (code, reason)
    row = {"code": code, "reason": reason, "rank": rank(), "step": _last_step(run_dir)}
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".exit.{rank()}.json")
        temporary.write_text(json.dumps(row) + "\n")
        temporary.replace(path)
    except OSError as error:
        say("warning", f"{path} cannot be written: {error}")
    return True


def _same_mistake(run_dir: Path | None) -> int | None:
    """The exit code of the attempt before, if a launcher restarts what the user has to mend first; None to go on."""
    if run_dir is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    earlier = _read_json(run_dir / "exit.json")
    if earlier.get("code") != EXIT_USER:
        return None
    if rank() == 0:
        say("not started again", f"the attempt before ended with: {earlier.get('reason')}")
    return EXIT_USER


def _open_folder(run_dir: Path | None) -> None:
    """Make the run folder and forget the previous attempt's end; rank 0 does it, long before others can fail."""
    if run_dir is None or rank() != 0:
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "exit.json").unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir = {run_dir} cannot be written ({error}); give another run_dir=PATH") from None


def usage() -> str:
    """What --help prints: the forms of an argument, the presets with their first lines, the groups."""
    files = groups()
    presets = "\n".join(f"  +config={name:<14}{headline(name)}" for name in files.pop(PRESET))
    choices = "\n".join(f"  {group}={'|'.join(names)}" for group, names in files.items())
    return (
        "usage: [torchrun ...] launch/SCRIPT.py +config=NAME [group=FILE] [key=value] [--cfg job] [-m] [--help]\n\n"
        f"presets (configs/config/):\n{presets}\n\nparts (configs/GROUP/):\n{choices}\n\n"
        "  key=value   sets any field of docs/config.md, e.g. train.steps=100 run_dir=runs/mine\n"
        "  --cfg job   prints the resolved config and stops\n"
        "  -m          sweep (launch/pretrain.py): key=a,b runs each combination in a run folder of its own"
    )


def rank() -> int:
    """This process's global rank, from torchrun's environment; 0 outside of it."""
    return int(os.environ.get("RANK", "0"))


def _without_cfg(arguments: list[str]) -> list[str]:
    at = arguments.index("--cfg")
    if arguments[at + 1 : at + 2] != ["job"]:
        raise ConfigError("--cfg takes one value: --cfg job")
    return arguments[:at] + arguments[at + 2 :]


def _likely_run_dir(arguments: Sequence[str]) -> Path | None:
    """The run folder of a command line that does not compose: what it says of run_dir and its preset, if that holds."""
    try:
        return Path(compose([a for a in arguments if a.startswith(("run_dir=", f"+{PRESET}="))]).run_dir)
    except ConfigError:
        return None


def say(kind: str, message: str) -> None:
    """A line on stderr, `kind: message`, as every end of a run is told; with the rank where it matters."""
    who = f"rank {rank()}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 and rank() else ""
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}{who}{kind}: {message}{plain}", file=sys.stderr, flush=True)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _last_step(run_dir: Path) -> int | None:
    try:
        rows = (run_dir / "metrics.jsonl").read_bytes().splitlines()
        return json.loads(rows[-1])["step"]
    except (OSError, ValueError, IndexError, KeyError):
        return None
