"""The planner's command line: own keys, and overrides of the configuration for everything else."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

from rich.console import Console

from deepv3.config.compose import PRESET, compose, groups
from deepv3.config.schema import Config, knob
from deepv3.config.typed import build
from deepv3.config.validate import validate
from deepv3.errors import ConfigError, ResourceError
from deepv3.planner.calibration import Calibration
from deepv3.planner.campaign import MTBF_HOURS
from deepv3.planner.compared import compare
from deepv3.planner.measured import read_calibration
from deepv3.planner.plan import Assumptions, document, make_plan
from deepv3.planner.report import show, show_search

USAGE = """usage: python launch/plan.py +config=NAME cluster=NAME [key=value ...]

  +config=NAME cluster=NAME   the run and the machines (configs/cluster/); any field of docs/config.md may follow
  json=true                   one JSON object on stdout instead of tables
  draw=PATH.svg|.png          the step's timeline, and PATH-memory beside it
  search=true                 try grids, schedules, recompute, precision; save=PATH.yaml takes the best
  calibration=PATH|NAME       rows measured here (docs/planner.md), or report | torchtitan | megatron | megatron_graphs
  phases=auto|none|[A,B]      presets that continue the run; auto: those named +config's name and more
  measured=RUN_DIR            a run of this configuration, beside its plan
  price=2 mtbf_hours=50700    dollars per device hour; mean time between failures of one device
  experts=RUN_DIR ...         redundant experts from a run's loads (docs/redundant-experts.md)"""


@dataclass
class Arguments:
    """The planner's own keys."""

    json: bool = knob(False, "One JSON object on stdout.")
    draw: str = knob("", "Picture of the step's timeline, .svg or .png.")
    search: bool = knob(False, "Search layouts.")
    save: str = knob("", "Where search writes the best layout as a parallel preset.")
    calibration: str = knob("report", "Built-in name or a file of measured rows.")
    measured: str = knob("", "Run folder to hold the plan against.")
    phases: str = knob("auto", "Presets that continue the run.")
    price: float = knob(2.0, "Dollars per device hour.")
    mtbf_hours: float = knob(MTBF_HOURS, "Mean time between failures of one device, hours.")


OWN = {f.name for f in fields(Arguments)}


def main(argv: list[str]) -> None:
    """Plan, print, draw, search. Raises ConfigError and ResourceError (the latter after printing)."""
    pairs = dict(argument.split("=", 1) for argument in argv if "=" in argument)
    if "experts" in pairs:
        from deepv3.planner.experts_report import main as redundant_experts

        redundant_experts(pairs)
        return
    own = build(Arguments, {key: value for key, value in pairs.items() if key in OWN})
    rest = [a for a in argv if a.split("=")[0] not in OWN]
    if own.price < 0 or own.mtbf_hours <= 0:
        raise ConfigError(f"price = {own.price} must be 0 or more, mtbf_hours = {own.mtbf_hours} above 0")
    cal, cfg = read_calibration(own.calibration), compose(rest)
    if own.search:
        _search(own, cfg, cal)
        return
    _validated(cfg)
    later, left_out = _later(own.phases, pairs.get("+config", ""), cfg)
    names = [pairs.get("+config", "run"), *later]
    plan = make_plan(cfg, list(later.values()), cal, Assumptions(own.price, own.mtbf_hours), names)
    content = document(plan)
    content["run"]["left_out"] = left_out
    if own.measured:
        content["measured"] = compare(plan, Path(own.measured))
    if own.json:
        print(json.dumps(content))
    else:
        show(content, _console())
    if own.draw:
        from deepv3.planner.picture import draw_plan

        for path in draw_plan(plan, Path(own.draw)):
            Console(stderr=True).print(f"written: {path}")
    if plan.misfit:
        raise ResourceError(plan.misfit)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _search(own: Arguments, cfg: Config, cal: Calibration) -> None:
    from deepv3.planner.search import save_preset, search

    found = search(cfg, cal)
    if own.save:
        save_preset(found, Path(own.save))
    if own.json:
        print(json.dumps(found))
    else:
        show_search(found, _console())


def _validated(cfg: Config) -> Config:
    if cfg.cluster.devices:  # without, the planner's own message says what to give
        validate(cfg, cfg.cluster.devices, training=False)
    return cfg


def _phases(wish: str, preset: str) -> list[str]:
    """Names of the presets that continue `preset`: those that begin with its name, shortest sequences first."""
    known = groups()[PRESET]
    if wish == "auto":
        found = [name for name in known if preset and name.startswith(f"{preset}_")]
        return sorted(found, key=lambda name: compose([f"+config={name}"]).data.seq_len)
    names = [] if wish == "none" else [name.strip() for name in wish.strip("[]").split(",")]
    for name in names:
        if name not in known:
            raise ConfigError(f"phases = {wish}: no configs/{PRESET}/{name}.yaml; there is {', '.join(known)}")
    return names


def _later(wish: str, preset: str, cfg: Config) -> tuple[dict[str, Config], dict[str, str]]:
    """The phases that continue the run, by name, and those of `auto` whose own grid these machines cannot hold."""
    found, left_out = {}, {}
    for name in _phases(wish, preset):
        try:
            found[name] = _validated(_continued(name, cfg))
        except ConfigError as error:
            if wish != "auto":
                raise ConfigError(f"phases = {wish}: {name}: {error}") from None
            left_out[name] = str(error)
    return found, left_out


def _continued(name: str, cfg: Config) -> Config:
    """A later phase's preset in the run's precision and on the run's machines, of which it may use fewer."""
    later = compose([f"+config={name}"])
    later.precision.name = cfg.precision.name
    own, given = later.cluster, cfg.cluster
    own.device, own.network, own.nproc_per_node = given.device, given.network, given.nproc_per_node
    own.devices = min(own.devices or given.devices, given.devices)
    return later
