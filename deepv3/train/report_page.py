"""The report of one run as one HTML file: what each section shows, from the run folder's own files alone."""

import json
import time
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from deepv3.errors import EXIT_DONE, EXIT_RESTART
from deepv3.train.events import KINDS, read_events
from deepv3.train.jsonl import JsonLines
from deepv3.train.report_chart import Chart, Line, draw, si
from deepv3.train.report_heat import load_figures, violation_figure
from deepv3.train.report_html import document, fold, links, note, section, table, tag
from deepv3.train.report_series import Series

EVENTS_SHOWN = 200
MARKED = ("skip", "rewind", "restart", "alarm", "fail")  # kinds drawn into the charts; saves would fill them
MARKS = 60
ENDS = {"done": "finished", "stop": "stopped", "fail": "failed"}

# The parts of a step in the order they are stacked; hidden communication lies under computation and is a line instead.
TIMES = (
    ("time_compute", "computation"), ("time_comm_exposed", "exposed communication"), ("time_bubble", "bubble"),
    ("time_data", "data wait"), ("time_optimizer", "optimizer"), ("time_checkpoint", "checkpoint"),
    ("time_validation", "validation"),
)  # fmt: skip
PAUSES = ("time_checkpoint", "time_validation")  # between steps, not within them
MEMORY = (
    ("memory_weights_gib", "weights"), ("memory_gradients_gib", "gradients"), ("memory_master_gib", "master weights"),
    ("memory_moments_gib", "moments"), ("memory_activations_gib", "activations and other"),
)  # fmt: skip


@dataclass
class Folder:
    """What a run folder says: the summary of its metrics and the small files beside them."""

    path: Path
    series: Series
    validation: list[dict]
    events: list[dict]
    config: dict[str, Any]
    exit: dict[str, Any]

    @staticmethod
    def read(path: Path, series: Series | None = None) -> "Folder":
        """Read the folder; a given series of the same folder only takes in what is new."""
        series = (series or Series(path / "metrics.jsonl")).update()
        return Folder(
            path,
            series,
            [row for row in JsonLines(path / "validation.jsonl").read() if row.get("val_loss") is not None],
            read_events(path),
            _load(path / "config.yaml", yaml.safe_load),
            _load(path / "exit.json", json.loads),
        )

    def setting(self, dotted: str, default: Any = None) -> Any:
        """A field of config.yaml, such as model.hidden_size."""
        node: Any = self.config
        for part in dotted.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return default if node is None else node

    def state(self) -> tuple[str, str]:
        """(word, sentence): how the run ended, by exit.json, which a start removes, else by the newest event."""
        if "code" in self.exit:
            word = {EXIT_DONE: "finished", EXIT_RESTART: "stopped"}.get(self.exit["code"], "failed")
            return word, str(self.exit.get("reason"))
        last = self.events[-1] if self.events else {}
        if last.get("kind") in ENDS:
            return ENDS[last["kind"]], last["text"]
        return "running", "no end is recorded: it is running, or was killed after the last row"


def _load(path: Path, parse: Any) -> dict[str, Any]:
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _line(series: Series, field: str, name: str, band: bool = True, **style: Any) -> Line:
    wide = band and series.width > 1
    low, high = (series.low(field), series.high(field)) if wide else (None, None)
    return Line(name, series.steps, series.mean(field), low, high, **style)


def _charts(run: Folder) -> dict[str, list[str]]:
    """Section -> its figures."""
    s = run.series
    seen = [(e["step"], e["kind"]) for e in run.events if e["kind"] in MARKED]
    marks = seen[:: max(1, len(seen) // MARKS)]
    band = f"Line: mean of {s.width} steps; band: their smallest and largest. " if s.width > 1 else ""

    def chart(key: str, title: str, unit: str, *lines: Line, **more: Any) -> str:
        return draw(Chart(key, title, unit, [*lines], marks=marks, **more))

    checks = np.array([[row["step"], row["val_loss"]] for row in run.validation], dtype=float).reshape(-1, 2)
    loss = [_line(s, "loss_main", "train")]
    if s.total("loss_mtp"):
        loss.append(_line(s, "loss_mtp", "MTP"))
    loss.append(Line("validation", checks[:, 0], checks[:, 1], dots=len(checks) <= 60))
    stack = _time_parts(s)
    hidden = [Line("hidden communication", s.steps, s.share("time_comm_hidden"), dashed=True)]
    memory = [Line(name, s.steps, s.mean(field)) for field, name in MEMORY if s.has(field)]
    drift = [_line(s, f"router_bias_{end}", name, False) for end, name in (("max", "largest"), ("min", "smallest"))]
    rate = "tokens_per_second"
    speed = [chart("rate", "Throughput", "tokens / s", _line(s, rate, "all devices"), zero=True, note=band)]
    if s.total(rate) > 1.001 * s.total(f"{rate}_per_gpu"):
        per_device = _line(s, f"{rate}_per_gpu", "device")
        speed.append(chart("rate_gpu", "Throughput", "tokens / s / device", per_device, zero=True))
    if s.total("mfu"):
        speed.append(chart("mfu", "MFU", "", *_mfu(s), zero=True))
    if len(speed) % 2 or not stack:
        speed.append(chart("step", "Step time", "s", _line(s, "step_seconds", "step"), zero=True))
    if stack:
        also = hidden if s.has("time_comm_hidden") else []
        speed.append(chart("time", "Where a step's time goes", "s", *also, stack=stack, wide=True))
    experts = [
        chart("max_vio", "MaxVio, worst layer", "", _line(s, "max_vio", "MaxVio"), zero=True, note=band),
        chart("bias", "Router bias", "all layers", *drift, _line(s, "bias_update_speed", "gamma", False, dashed=True)),
        chart("dead", "Dead experts", "of all layers", _line(s, "dead_experts", "dead experts"), zero=True),
        chart("fanout", "Token fan-out", "expert groups a token reaches", _line(s, "node_fanout", "groups"), zero=True),
        chart("entropy", "Entropy of a token's gates", "nats", _line(s, "routing_entropy", "entropy"), zero=True),
        chart("balance", "Balance loss", "with its weight", _line(s, "loss_balance", "balance"), zero=True),
    ]
    return {
        "Learning": [
            chart("loss", "Loss", "nats per token", *loss, note=band, wide=True),
            chart("grad_norm", "Gradient norm", "before clipping", _line(s, "grad_norm", "norm"), log=_spread(s)),
            chart("lr", "Learning rate", "", _line(s, "lr", "rate", False), zero=True),
            chart("batch", "Batch", "sequences", _line(s, "sequences", "sequences", False), zero=True),
            chart("weights", "Weight of MTP", "lambda", _line(s, "mtp_loss_weight", "lambda", False), zero=True)
            if s.total("loss_mtp")
            else "",
        ],
        "Speed": speed,
        "Memory": [
            chart("memory", "Peak memory of rank 0", "GiB", stack=memory)
            if memory
            else chart("memory", "Peak memory of rank 0", "GiB", _line(s, "memory_gib", "peak"), zero=True),
        ],
        "Experts": experts if s.layers() is not None and s.layers().shape[1] else [],  # type: ignore[union-attr]
    }


def _time_parts(series: Series) -> list[Line]:
    """The known parts of a step, what is left of the step, and the pauses between steps, seconds a step."""
    parts = {field: Line(name, series.steps, series.share(field)) for field, name in TIMES if series.has(field)}
    within = [line for field, line in parts.items() if field not in PAUSES]
    if not within:
        return []
    left = series.mean("step_seconds") - sum(line.y for line in within)
    rest = Line("not told apart", series.steps, np.maximum(left, 0))
    return [*within, rest, *(line for field, line in parts.items() if field in PAUSES)]


def _spread(series: Series) -> bool:
    """Whether gradient norms span more than one linear axis can show."""
    values = series.high("grad_norm")
    values = values[np.isfinite(values) & (values > 0)]
    return bool(len(values)) and float(values.max()) > 20 * float(np.median(values))


def _mfu(series: Series) -> list[Line]:
    names = (("mfu", "causal attention"), ("mfu_full_attention", "full attention, as some report it"))
    return [_line(series, field, name, field == "mfu") for field, name in names]


def _cards(run: Folder) -> str:
    last, checks = run.series.last, [row["val_loss"] for row in run.validation]
    cards = {"step": f"{last.get('step', 0):,}", "tokens": si(last.get("tokens")), "loss": si(last.get("loss_main"))}
    if checks:
        cards |= {"validation": si(checks[-1]), "best": si(min(checks))}
    cards |= {"tokens / s": si(last.get("tokens_per_second"))}
    if last.get("mfu"):
        cards |= {"MFU": f"{last['mfu']:.1%}"}
    cards |= {"memory": f"{last.get('memory_gib') or 0:.1f} GiB"}
    if last.get("max_vio_layers"):
        cards |= {"MaxVio": si(last.get("max_vio")), "dead experts": str(last.get("dead_experts", "–"))}
    cards |= {"skipped": f"{run.series.total('skipped'):.0f}"}
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in cards.items()), cls="cards")


def _progress(run: Folder) -> str:
    """How much of train.steps or train.tokens is done, whichever is further."""
    goals = [("step", run.setting("train.steps")), ("tokens", run.setting("train.tokens"))]
    shares = [run.series.last.get(name, 0) / goal for name, goal in goals if goal]
    if not shares:
        return ""
    share = min(1.0, max(shares))
    bar = tag("progress", f"{share:.1%}", max="1", value=f"{share:.4f}", aria_label="done")
    return bar + tag("p", f"{share:.1%}", cls="share")


def events_table(events: list[dict]) -> str:
    """The newest events, newest first; how many there were of each kind."""
    if not events:
        return note("None recorded.")
    counts = Counter(event["kind"] for event in events)
    summary = ", ".join(f"{n} × {KINDS.get(kind, kind)}" for kind, n in counts.items())
    older = f" The newest {EVENTS_SHOWN} are listed." if len(events) > EVENTS_SHOWN else ""
    rows = []
    for event in reversed(events[-EVENTS_SHOWN:]):
        kind = tag("span", escape(KINDS.get(event["kind"], event["kind"])), cls=f"kind {event['kind']}")
        date, clock = _when(event["time"]).split()
        rows.append([tag("span", date + " ", cls="date") + clock, f"{event['step']:,}", kind, escape(event["text"])])
    head = ["time (UTC)", "step", "what", "text"]
    return note(f"{summary}.{older}") + table("Events, newest first", head, rows, cls="events")


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def page(run: Folder) -> str:
    """The whole page of one run."""
    word, sentence = run.state()
    name = run.path.resolve().name
    figures = _charts(run)
    if figures["Experts"]:
        mtp, first = run.setting("model.num_nextn_predict_layers", 0), run.setting("model.first_k_dense_replace", 0)
        figures["Experts"].insert(2, violation_figure(run.series.steps, run.series.layers(), mtp, first))
        figures["Experts"].append(load_figures(run.path, mtp, first))
    body = {title: "".join(parts) for title, parts in figures.items()}
    body = {title: tag("div", inner, cls="figures") for title, inner in body.items() if inner}
    body["Events"] = events_table(run.events)
    config = yaml.safe_dump(run.config, sort_keys=False) if run.config else "config.yaml is missing"
    body["Config"] = fold("config.yaml", tag("pre", escape(config), tabindex="0"))
    header = tag(
        "header",
        tag("p", "deepv3 run", cls="over"),
        tag("h1", escape(name)),
        tag("p", tag("b", word), " " + escape(sentence), cls=f"state {word}"),
        _progress(run),
    )
    empty = "" if run.series.rows else note("No step is recorded yet.")
    main = tag("main", _cards(run), empty, *(section(title, inner) for title, inner in body.items()))
    written = f"Written {_when(time.time())} UTC from {run.series.rows:,} rows of metrics.jsonl."
    content = header + links(body) + main + tag("footer", written)
    return document(f"{name} · deepv3", content, running=word == "running")
