"""Runs of one model in several precisions and seeds side by side: does FP8 learn like BF16?

1. While the text is tokenised, short runs compile kernels and measure which are fastest (CUDA only), through the
   multi-process service where there is one; if they fail with it, it is left out.
2. A calibration: all runs at once for some steps. What is left of `limit` gives the length, the same for all runs;
   never more than an epoch of the text, so that no token is read twice.
3. All runs at once, to the end. None validates or saves. At the limit, what still runs is stopped and said to be.
4. The verdict (learning_verdict.py): table, JSON of all curves, PNG.

Given up: repeating a run that died. It is shown as it ended.
"""

import json
import os
import re
import site
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import Any

import deepv3
from deepv3.config.cli import say
from deepv3.config.compose import compose, from_arguments
from deepv3.config.schema import Config, knob
from deepv3.config.validate import validate
from deepv3.data.prepare import Prepared, prepare
from deepv3.errors import ConfigError, ResourceError
from deepv3.train import learning_verdict as verdicts
from deepv3.train import mps
from deepv3.train.side_by_side import PRETRAIN, STOPPED, Group, Trial, calibrate, visible_devices

RECIPES = {
    "bf16": ["precision=bf16"],
    "fp8": ["precision=fp8"],
    "block": ["precision=fp8", "precision.recipe=block_gradients"],
}
QUIET = ["train.eval_every=0", "checkpoint.every=null", "logging.wandb=disabled", "logging.progress=false",
         "logging.plot_every=1000000", "train.finish=[]", "train.tokens=null", "train.resume=never"]  # fmt: skip
ENDLESS = 1_000_000  # steps of runs that are stopped from outside
WARM_STEPS = 3
WARM_SECONDS = 120.0  # for them, at most
AFTER = 15.0  # seconds kept at the end for the runs' own reports, the picture and the tables
SAFETY = 0.96  # of the time, that the runs are planned to take
CALIBRATION = 0.35  # of what is left of the limit, at most


@dataclass
class Options:
    """The keys of launch/learning.py that are not the configuration's."""

    output: str = knob("", "Folder for run folders, learning.md, learning.json and learning.png.")
    runs: list[str] = knob(["bf16-1", "bf16-2", "fp8-1", "fp8-2", "block-1"], "Which: RECIPE-SEED.")
    folders: list[str] = knob([], "Folders of text; empty takes those of installed software.")
    tokens: float = knob(0.0, "Tokens of each run; 0 takes an epoch.")
    limit: float = knob(0.0, "Seconds for everything, from the start; 0 is none.")
    mps: bool = knob(True, "Use CUDA's multi-process service where there is one.")


def read(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """Own keys, and the overrides of the configuration. Raises ConfigError for what cannot be meant."""
    names = tuple(f"{name}=" for name in Options.__dataclass_fields__)
    options = from_arguments([argument for argument in argv if argument.startswith(names)], Options)
    rest = [argument for argument in argv if not argument.startswith(names)]
    if not options.output:
        raise ConfigError("output is empty; give output=FOLDER for what is measured")
    if (Path(options.output) / "runs").exists():
        raise ConfigError(f"output={options.output} holds runs already; give another output=FOLDER")
    for name in options.runs:
        if not re.fullmatch(rf"({'|'.join(RECIPES)})-[1-9]\d*", name):
            raise ConfigError(f"runs: {name!r} is not RECIPE-SEED with a recipe of {', '.join(RECIPES)}; e.g. fp8-1")
    if len(set(options.runs)) < len(options.runs) or not options.runs:
        raise ConfigError(f"runs = {options.runs} names a run twice or none; name each once")
    return options, rest


def installed_folders() -> list[str]:
    """Where this machine keeps source, headers and documentation of installed software, as far as there are any."""
    packages = [Path(path) for path in (*site.getsitepackages(), sysconfig.get_path("platlib"))]
    torch = find_spec("torch")  # may lie in another environment than the running one
    if torch is not None and torch.origin:
        packages.append(Path(torch.origin).parents[1])
    system = [Path(path) for path in ("/usr/lib/python3", "/usr/include", "/usr/share/doc")]
    cuda = [*Path("/usr/local").glob("cuda*/include"), *Path("/usr/local").glob("cuda*/targets/*/include")]
    if "CUDA_HOME" in os.environ:
        cuda.append(Path(os.environ["CUDA_HOME"]) / "include")
    found = [path.resolve() for path in (Path(sysconfig.get_path("stdlib")), *packages, *system, *sorted(cuda))]
    return [str(path) for path in dict.fromkeys(found) if path.is_dir()]


def _text(folders: list[str], cfg: Config) -> str:
    """The override that reads these folders with the suffixes of the configuration's first source."""

    def quoted(text: str) -> str:
        return "'" + text.replace("'", "\\'") + "'"

    source = cfg.data.sources[0]
    first, *others = map(quoted, folders)
    suffixes = ",".join(map(quoted, source.suffixes))
    more = ",".join(others)
    return f"data.sources=[{{path:{first},folders:[{more}],suffixes:[{suffixes}],format:text,unique:true}}]"


def arguments(options: Options, rest: list[str]) -> list[str]:
    """The command line of every run, but for its precision, seed, length and folder."""
    preset = [] if any(argument.startswith("+config=") for argument in rest) else ["+config=learn_300m"]
    common = [*preset, *rest]
    if options.folders or not any(argument.startswith("data.sources=") for argument in rest):
        common.append(_text(options.folders or installed_folders(), compose(common)))
    if not any(argument.startswith("data.num_proc=") for argument in rest):
        common.append(f"data.num_proc={os.cpu_count() or 1}")
    return [*common, *QUIET]


def trials(options: Options) -> list[Trial]:
    """The runs of the options."""
    parts = [(name, *name.rsplit("-", 1)) for name in options.runs]
    return [Trial(name, [*RECIPES[recipe], f"seed={seed}"]) for name, recipe, seed in parts]


def epoch(prepared: Prepared) -> int:
    """Sequences until the first source would begin again."""
    weights = [ready.source.config.weight for ready in prepared.train]
    rows = [prepared.shape.rows(ready.tokens("train")) for ready in prepared.train]
    return int(min(count * sum(weights) / weight for count, weight in zip(rows, weights)))


def curve(cfg: Config, steps: int) -> list[str]:
    """The length of a run and its learning rate: a short warm-up, then a cosine to a tenth that ends with the run."""
    tokens = steps * (cfg.train.global_batch_size or 0) * cfg.data.seq_len
    segment = f"{{shape:cosine,tokens:{tokens},to:{cfg.optim.lr / 10!r}}}"
    warmup = min(cfg.optim.warmup_steps, steps // 10)
    return [f"train.steps={steps}", f"optim.lr_schedule=[{segment}]", f"optim.warmup_steps={warmup}"]


@dataclass
class Warmth:
    """What short runs on a device need: where they write, what they are, and what calls them off."""

    folder: Path
    options: Options
    common: list[str]
    devices: list[str]
    cancel: Event
    script: Path = PRETRAIN

    def up(self, name: str, environment: dict[str, str]) -> bool:
        """Have every recipe's kernels compiled and chosen, on a little text; whether all of them ran.

        FP8 comes first and alone: its products are timed on their first call, and company would blur that.
        """
        text = f"data.sources=[{{path:'{Path(deepv3.__file__).parent}',suffixes:[.py],format:text}}]"
        own = [*self.common, text, "data.tokenizer_train_bytes=1000000", f"train.steps={WARM_STEPS}", "seed=1"]
        recipes = sorted({run.rpartition("-")[0] for run in self.options.runs}, key=lambda recipe: recipe != "fp8")
        for part in (recipes[:1], recipes[1:]):
            some = [Trial(recipe, RECIPES[recipe]) for recipe in part]
            with Group(self.folder / name, some, own, self.devices[:1], environment, self.script) as group:
                group.wait(time.monotonic() + WARM_SECONDS, self.cancel.is_set)
            ends = {trial.name: group.end(trial) for trial in some}
            if bad := {recipe: end for recipe, end in ends.items() if end != "done"}:
                say("warning", f"the first steps of {bad}{' with the multi-process service' if environment else ''}")
                return False
        return True


def _company(stack: ExitStack, warmth: Warmth) -> dict[str, str]:
    """The variables of the multi-process service, if runs work with it; kernels are warm afterwards."""
    if not warmth.devices:
        return {}
    if warmth.options.mps and len(warmth.options.runs) > len(warmth.devices):
        with ExitStack() as attempt:
            variables = attempt.enter_context(mps.service())
            if variables and warmth.up("warm-mps", variables):
                stack.push(attempt.pop_all())
                return variables
    if not warmth.cancel.is_set():
        warmth.up("warm", {})  # what fails here is warned of; the run itself will tell
    return {}


@dataclass
class Length:
    """steps of each run, and why they are that many."""

    steps: int
    why: str


def length(cfg: Config, prepared: Prepared, options: Options, affordable: float | None) -> Length:
    """As many steps as asked, there is text for, and there is time for (affordable; None is no limit)."""
    per_step = (cfg.train.global_batch_size or 1) * cfg.data.seq_len
    rows = epoch(prepared)
    most = rows // (cfg.train.global_batch_size or 1)
    if most < 1:
        raise ConfigError(f"the text gives {rows:,} sequences, a step takes {cfg.train.global_batch_size}; give more")
    steps, why = most, f"an epoch of {rows * cfg.data.seq_len / 1e6:,.1f} M tokens"
    if options.tokens and options.tokens <= most * per_step:
        steps, why = max(1, int(options.tokens // per_step)), f"tokens={options.tokens:g}"
    elif options.tokens:
        why += f", SHORT of tokens={options.tokens:g}"
    if affordable is not None and affordable < steps:
        steps, why = int(affordable), f"SHORTENED from {steps:,} steps ({why}) to fit limit={options.limit:g} s"
    if steps < 4:
        raise ResourceError(f"{steps} steps fit in limit={options.limit:g} s, which have no last quarter; raise it")
    return Length(steps, why)


def measure(options: Options, rest: list[str], script: Path = PRETRAIN) -> str:
    """Do all of it; the table, which is also in output/learning.md. script: what every run starts, for tests."""
    began = time.monotonic()
    until = began + options.limit if options.limit else float("inf")
    common, output = arguments(options, rest), Path(options.output).resolve()
    cfg = compose(common)
    for trial in trials(options):
        validate(compose([*common, *trial.arguments]), 1)
    output.mkdir(parents=True, exist_ok=True)
    devices = visible_devices()
    with ExitStack() as stack:
        aside = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="learning-")))
        thread = stack.enter_context(ThreadPoolExecutor(1))
        cancel = Event()
        stack.callback(cancel.set)  # before the thread is waited for
        company = thread.submit(_company, stack, Warmth(aside, options, common, devices, cancel))
        prepared = prepare(cfg)
        for line in prepared.describe():
            say("text", line)
        environment = company.result()
        ready = time.monotonic() - began
        affordable = None
        if options.limit:
            part = time.monotonic() + CALIBRATION * (until - time.monotonic())
            group = Group(
                aside / "pace", trials(options), [*common, f"train.steps={ENDLESS}"], devices, environment, script
            )
            with group:
                pace = calibrate(group, part)
            say("pace", f"{pace.startup:.0f} s to start, {pace.step:.3f} s for a step of every run")
            affordable = max(0.0, (until - time.monotonic() - pace.startup - AFTER) * SAFETY / pace.step)
        plan = length(cfg, prepared, options, affordable)
        per_step = (cfg.train.global_batch_size or 1) * cfg.data.seq_len
        say("length", f"{plan.steps:,} steps, {plan.steps * per_step / 1e6:,.1f} M tokens a run: {plan.why}")
        group = Group(
            output / "runs", trials(options), [*common, *curve(cfg, plan.steps)], devices, environment, script
        )
        with group:
            group.wait(until - AFTER / 2)
        facts = {
            "model": str(rest or ["+config=learn_300m"]), "tokens_per_step": per_step, "length": plan.why,
            "seconds_before_runs": round(ready, 1), "devices": _device_names(len(devices)), "mps": bool(environment),
            "versions": _versions(), "text": prepared.describe(),
        }  # fmt: skip
    return conclude(output, group, plan, per_step, facts)


def conclude(output: Path, group: Group, plan: Length, per_step: int, facts: dict[str, Any]) -> str:
    """Write learning.json, learning.md and learning.png; the text of learning.md."""
    curves = [verdicts.read_curve(trial.name, group.folder / trial.name, group.end(trial)) for trial in group.trials]
    steps = plan.steps
    for found in curves:
        if len(found.losses) >= steps and found.end == STOPPED:  # it was drawing its own report
            found.end = "done"
    stopped = [len(found.losses) for found in curves if found.end == STOPPED]
    if stopped:  # all are judged by what all of them have
        steps = max(4, min(stopped))
        plan.why += f"; STOPPED at the limit, judged by the first {steps:,} of {plan.steps:,} steps"
    verdict = verdicts.judge(curves, steps)
    said = f"{steps:,} steps, {steps * per_step / 1e6:,.1f} M tokens a run: {plan.why}"
    text = f"{said}\n\n{verdicts.table(curves, verdict)}\n"
    facts |= {"length": plan.why}
    (output / "learning.json").write_text(json.dumps(verdicts.as_json(curves, verdict, facts)) + "\n", encoding="utf-8")
    (output / "learning.md").write_text(text, encoding="utf-8")
    verdicts.draw(curves, verdict, per_step, output / "learning.png")
    return text


def _device_names(count: int) -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(count)]


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("torch", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
