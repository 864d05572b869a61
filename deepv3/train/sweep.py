"""``-m`` sweeps: every combination of the swept values as a run of its own, one after another, and a table at the end.

``python launch/pretrain.py -m +config=tiny model.bias_update_speed=0,0.001 seed=range(1,4)``:

1. Hydra's grammar expands ``a,b``, ``choice(a,b)`` and ``range(a,b)``; the jobs are the product, last key fastest.
2. Each job is composed and validated, then started under its own torchrun with ``run_dir=SWEEP/N-VALUES``. SWEEP is
   ``run_dir`` where it is given, else the preset's ``run_dir`` with ``-sweep`` added.
3. A failed job is noted and the next one starts. The same command again resumes what did not finish and leaves alone
   what did, because every job has train.resume=auto in its own folder.
4. A table compares the jobs; the same figures are in ``SWEEP/sweep.json``, rewritten after each job.

Given up: jobs side by side, and Hydra's launcher and sweeper plugins.
"""

import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deepv3.config.cli import report
from deepv3.config.compose import compose, parse_overrides
from deepv3.config.schema import Config
from deepv3.config.validate import validate
from deepv3.errors import EXIT_DONE, EXIT_RESTART, ConfigError, DeepV3Error

FLAGS = ("-m", "--multirun")
NOT_STARTED = "not started"


@dataclass
class Job:
    """One combination. code: exit code, None while it has not run; the figures are None where the run wrote none."""

    swept: dict[str, str]
    overrides: list[str]
    run_dir: str = ""
    processes: int = 1
    code: int | None = None
    reason: str = NOT_STARTED
    step: int | None = None
    loss: float | None = None
    val_loss: float | None = None
    tokens_per_second: float | None = None  # median over the run's steps
    max_vio: float | None = None

    def failed(self) -> bool:
        """Whether the job ended badly; a job that did not start has not failed."""
        return self.code not in (None, EXIT_DONE)


@dataclass
class Sweep:
    """The jobs of one command line and what happened to them."""

    script: str
    folder: Path
    jobs: list[Job]
    stopped: bool = False
    child: subprocess.Popen | None = field(default=None, repr=False)

    def stop(self, number: int, frame: Any) -> None:
        """Signal handler: no further job. The terminal sends SIGINT to the running job too; SIGTERM is passed on."""
        self.stopped = True
        if number == signal.SIGTERM and self.child is not None:
            self.child.terminate()

    def write(self) -> None:
        """Publish sweep.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "sweep.json"
        beside = path.with_name(".sweep.json")
        rows = {"script": self.script, "jobs": [asdict(job) for job in self.jobs]}
        beside.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)


def torchrun(processes: int) -> list[str]:
    """The command that starts a script in ``processes`` ranks on this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def run_sweep(argv: Sequence[str], script: str, launcher: Callable[[int], list[str]] = torchrun) -> int:
    """Run all jobs of a command line (with or without its ``-m``) and print the table.

    launcher: processes per node -> command before the script. Returns 0 where every job ended well, 75 where the sweep
    was stopped, else the exit code of the first job that failed; 2 where the command line itself is wrong.
    """
    try:
        sweep = plan([argument for argument in argv if argument not in FLAGS], script)
    except DeepV3Error as error:
        return report(error, None, identical=True)
    handlers = {number: signal.signal(number, sweep.stop) for number in (signal.SIGTERM, signal.SIGINT)}
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        for number, job in enumerate(sweep.jobs, 1):
            if job.code is None and not sweep.stopped:
                console.rule(f"job {number} of {len(sweep.jobs)}: {escape(_label(job))}")
                _run(sweep, job, launcher)
            sweep.write()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    console.print(table(sweep))
    console.print(f"sweep        {sweep.folder / 'sweep.json'}", highlight=False, markup=False)
    compare = f"compare      python launch/report.py 'runs=[{sweep.folder}]'"
    console.print(compare, highlight=False, markup=False, soft_wrap=True)
    if sweep.stopped:
        return EXIT_RESTART
    return next((job.code for job in sweep.jobs if job.code), EXIT_DONE)


def plan(arguments: Sequence[str], script: str) -> Sweep:
    """The jobs of a command line, composed and validated; one that cannot work is noted as failed already.

    Raises ConfigError where none can work, under torchrun, and for a sweep over run_dir.
    """
    if "RANK" in os.environ:
        raise ConfigError(f"-m under torchrun: a sweep starts torchrun itself; run python {script} -m ...")
    jobs, errors = expand(arguments), []
    folder = None
    for number, job in enumerate(jobs):
        try:
            cfg = compose(job.overrides)
            folder = folder or _folder(arguments, cfg)
            job.run_dir = str(folder / f"{number}-{_slug(job)}")
            job.processes = cfg.cluster.nproc_per_node
            validate(cfg, job.processes)
        except ConfigError as error:
            job.code, job.reason = error.exit_code, str(error)
            errors.append(error)
    if folder is None or len(errors) == len(jobs):
        raise errors[0]
    return Sweep(script, folder, jobs)


def expand(arguments: Sequence[str]) -> list[Job]:
    """The product of all swept values, the last key fastest."""
    choices: list[list[tuple[str, str, bool]]] = []
    for override in parse_overrides(arguments):
        key = override.get_key_element()
        if not override.is_sweep_override():
            choices.append([(key, str(override.input_line), False)])
            continue
        if key == "run_dir":
            raise ConfigError("run_dir is swept; each job gets a folder of its own below one run_dir=PATH")
        try:
            values = list(override.sweep_string_iterator())
        except HydraException as error:
            raise ConfigError(f"{override.input_line}: {error} Write {key}=a,b or {key}=range(a,b)") from None
        choices.append([(key, f"{key}={value}", True) for value in values])
    return [
        Job({key: line.partition("=")[2] for key, line, swept in combination if swept}, [c[1] for c in combination])
        for combination in itertools.product(*choices)
    ]


def _folder(arguments: Sequence[str], cfg: Config) -> Path:
    given = any(argument.startswith("run_dir=") for argument in arguments)
    return Path(cfg.run_dir if given else f"{cfg.run_dir}-sweep")


def _label(job: Job) -> str:
    return " ".join(f"{key}={value}" for key, value in job.swept.items())


def _slug(job: Job) -> str:
    """``bias_update_speed-0.001-seed-1``: what tells the folder from its neighbours, fit for a path."""
    parts = [part for key, value in job.swept.items() for part in (key.split(".")[-1].lstrip("+"), value)]
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", "-".join(parts))[:80] or "run"


def _run(sweep: Sweep, job: Job, launcher: Callable[[int], list[str]]) -> None:
    run_dir = Path(job.run_dir)
    (run_dir / "exit.json").unlink(missing_ok=True)
    quoted = job.run_dir.replace("'", "\\'")
    kept = [line for line in job.overrides if not line.startswith("run_dir=")]
    sweep.child = subprocess.Popen([*launcher(job.processes), sweep.script, *kept, f"run_dir='{quoted}'"])
    code = sweep.child.wait()
    sweep.child = None
    _read_outcome(job, run_dir, code)


def _read_outcome(job: Job, run_dir: Path, code: int) -> None:
    """What the run left: exit.json, where torchrun's own code says too little, and the last of its figures."""
    ended = _rows(run_dir / "exit.json")
    job.code, job.reason = code, "done" if code == EXIT_DONE else f"ended with code {code} and no exit.json"
    if ended and (code == EXIT_DONE or ended[-1]["code"] != EXIT_DONE):
        job.code, job.reason = ended[-1]["code"], ended[-1]["reason"]
    steps, validations = _rows(run_dir / "metrics.jsonl"), _rows(run_dir / "validation.jsonl")
    if steps:
        job.step, job.loss, job.max_vio = (steps[-1].get(key) for key in ("step", "loss_main", "max_vio"))
        job.tokens_per_second = statistics.median(row.get("tokens_per_second", 0.0) for row in steps)
    if validations:
        job.val_loss = validations[-1].get("val_loss")


def _rows(path: Path) -> list[dict]:
    """Whole lines of a JSON-lines file; none where there is no file."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    except (OSError, ValueError):
        return []


def table(sweep: Sweep) -> Table:
    """The jobs side by side: swept values, figures, how each ended."""
    keys = list(dict.fromkeys(key for job in sweep.jobs for key in job.swept))
    grid = Table(title=escape(f"{len(sweep.jobs)} jobs in {sweep.folder}"), title_justify="left")
    for name in ["job", *keys, "step", "loss", "val loss", "tokens/s", "MaxVio", "end"]:
        grid.add_column(name, justify="left" if name == "end" else "right", overflow="fold")
    for number, job in enumerate(sweep.jobs, 1):
        figures = [_cell(job.step, "d"), _cell(job.loss, ".4f"), _cell(job.val_loss, ".4f")]
        figures += [_cell(job.tokens_per_second, ",.0f"), _cell(job.max_vio, ".3f")]
        end = job.reason.splitlines()[0] if not job.failed() else f"failed ({job.code}): {job.reason.splitlines()[0]}"
        grid.add_row(str(number), *(escape(job.swept.get(key, "")) for key in keys), *figures, escape(end))
    return grid


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
