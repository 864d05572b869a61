"""Charts of the report: an SVG that stretches with the page, its labels as text beside it, and its numbers as a table.

The SVG holds paths only and is stretched in both directions (lines keep their width), while ticks are HTML placed in
percent: so one file is sharp and legible at 390 px and at 1,400 px, without script. The script adds a reading of the
values under the pointer, from the same numbers that the table shows.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

from deepv3.train.report_html import fold, note, table, tag, title

W, H = 1000, 300  # user units of every SVG; the page gives the real size
TABLE_ROWS = 16


@dataclass
class Line:
    """One line of a chart. x ascends; NaN leaves a gap; low and high, where given, are drawn as a band."""

    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    dots: bool = False
    dashed: bool = False


@dataclass
class Chart:
    """A figure of lines over one axis. stack: layers upon each other, drawn as areas from 0."""

    key: str
    title: str
    unit: str
    lines: list[Line]
    stack: list[Line] = field(default_factory=list)
    log: bool = False
    zero: bool = False  # the axis starts at 0
    wide: bool = False  # takes a whole row of the page
    note: str = ""
    marks: Sequence[tuple[float, str]] = ()  # (x, kind) of events
    x_unit: str = "step"


def si(value: float | None, digits: int = 3) -> str:
    """A number for people: 1.42e-5, 0.305, 2.9 M, 14.8 T; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1e4:
        for power, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if size >= power * 0.9995:
                return (
                    f"{value / power:.{digits}g} {letter}" if size / power < 1000 else f"{value / power:.0f} {letter}"
                )
    if size >= 1000:
        return f"{value:,.0f}"
    if 0 < size < 1e-2:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    return f"{value:.{digits + 1}g}"


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About `wanted` round numbers from low to high."""
    if not high > low:
        return [low]
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.8)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, int(math.floor(high / step + 1e-9)) + 1)]


class Frame:
    """Data to user units. The y range covers the bulk of the data; what lies beyond it is counted, not hidden."""

    def __init__(self, chart: Chart):
        every = chart.lines + chart.stack
        xs = np.concatenate([line.x for line in every]).astype(float)
        self.x0, self.x1 = float(xs.min()), float(xs.max())
        if self.x1 <= self.x0:
            self.x0, self.x1 = self.x0 - 1, self.x1 + 1
        self.log = chart.log
        values = np.concatenate([line.y for line in chart.lines] or [np.zeros(0)]).astype(float)
        top = _stacked(chart.stack)[-1] if chart.stack else np.zeros(0)
        values = np.concatenate([values, top])
        values = values[np.isfinite(values) & ((values > 0) if self.log else True)]
        if not len(values):
            values = np.array([1.0] if self.log else [0.0])
        low, high = float(values.min()), float(np.percentile(values, 99.0))
        if float(values.max()) <= high + 0.5 * (high - low):  # a tail this short costs little room
            high = float(values.max())
        if high - low <= 1e-6 * abs(high):  # constant but for rounding
            low = high = float(np.median(values))
        if self.log:
            self.y0, self.y1 = low / 1.1, max(high * 1.1, low * 2)
        else:
            if chart.zero or chart.stack:
                low = min(0.0, low)
            room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
            self.y0, self.y1 = low if low == 0 else low - room, high + room
        self.beyond = int((values > self.y1).sum())

    def x(self, values: np.ndarray) -> np.ndarray:
        """0 to W."""
        return (np.asarray(values, dtype=float) - self.x0) / (self.x1 - self.x0) * W

    def y(self, values: np.ndarray) -> np.ndarray:
        """H (bottom) to 0, somewhat beyond for what does not fit."""
        values = np.asarray(values, dtype=float)
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.log:
                values = np.where(values > 0, values, np.nan)
                part = np.log(values / self.y0) / math.log(self.y1 / self.y0)
            else:
                part = (values - self.y0) / (self.y1 - self.y0)
        return np.clip(H - part * H, -40, H + 40)

    def y_ticks(self) -> list[tuple[float, str]]:
        """(percent from the top, label)."""
        if self.log:
            first, last = math.floor(math.log10(self.y0)), math.ceil(math.log10(self.y1))
            factors = (1, 2, 5) if last - first < 4 else (1,)
            ticks = [f * 10.0**k for k in range(first, last + 1) for f in factors]
        else:
            ticks = nice_ticks(self.y0, self.y1, 4)
        return [(float(self.y(np.array(t))) / H * 100, si(t)) for t in ticks if self.y0 <= t <= self.y1]

    def x_ticks(self) -> list[tuple[float, str]]:
        """(percent from the left, label); steps and tokens are whole."""
        ticks = [t for t in nice_ticks(self.x0, self.x1, 4) if t == int(t)]
        return [(float(self.x(np.array(t))) / W * 100, si(t)) for t in ticks]


def _stacked(lines: list[Line]) -> list[np.ndarray]:
    return list(np.cumsum([np.nan_to_num(line.y) for line in lines], axis=0))


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """SVG path through the points that exist, a new stroke after each gap."""
    parts, pen_up = [], True
    for a, b in zip(x, y):
        if not math.isfinite(b):
            pen_up = True
            continue
        parts.append(f"{'M' if pen_up else 'L'}{a:.0f} {b:.1f}")
        pen_up = False
    return "".join(parts)


def _area(x: np.ndarray, top: np.ndarray, bottom: np.ndarray) -> str:
    known = np.isfinite(top) & np.isfinite(bottom)
    x, top, bottom = x[known], top[known], bottom[known]
    if not len(x):
        return ""
    forth = "L".join(f"{a:.0f} {b:.1f}" for a, b in zip(x, top))
    back = "L".join(f"{a:.0f} {b:.1f}" for a, b in zip(x[::-1], bottom[::-1]))
    return f"M{forth}L{back}Z"


def _shapes(chart: Chart, frame: Frame) -> str:
    out = [f'<path class="grid" d="M0 {p / 100 * H:.1f}H{W}"/>' for p, _ in frame.y_ticks()]
    out += [
        f'<path class="mark {escape(kind)}" d="M{float(frame.x(np.array(at))):.1f} 0V{H}"/>'
        for at, kind in chart.marks
        if frame.x0 <= at <= frame.x1
    ]
    if chart.stack:
        tops = _stacked(chart.stack)
        floors = [np.zeros_like(tops[0]), *tops[:-1]]
        for i, (line, top, floor) in enumerate(zip(chart.stack, tops, floors)):
            out.append(f'<path class="area c{i % 8}" d="{_area(frame.x(line.x), frame.y(top), frame.y(floor))}"/>')
    for i, line in enumerate(chart.lines, len(chart.stack)):
        if line.low is not None and line.high is not None:
            d = _area(frame.x(line.x), frame.y(line.high), frame.y(line.low))
            out.append(f'<path class="band c{i % 8}" d="{d}"/>')
        style = " dashed" if line.dashed or i >= 8 else ""
        x, y = frame.x(line.x), frame.y(line.y)
        colour = _colour(chart, i)
        out.append(f'<path class="line {colour}{style}" d="{_path(x, y)}"/>')
        if line.dots or len(x) == 1:
            out += [f'<path class="dot {colour}" d="M{a:.1f} {b:.1f}h0"/>' for a, b in zip(x, y) if math.isfinite(b)]
    return "".join(out)


def _colour(chart: Chart, index: int) -> str:
    """Lines over areas are drawn in the ink of the page, which every area contrasts with."""
    return "over" if chart.stack and index >= len(chart.stack) else f"c{index % 8}"


def _sample(line: Line) -> tuple[list[float], list[float | None]]:
    """x and y of a line as short JSON numbers."""
    ys = [float(f"{v:.4g}") if math.isfinite(v) else None for v in line.y.tolist()]
    return [float(f"{v:.7g}") for v in line.x.tolist()], ys


def _table(chart: Chart) -> str:
    """Some rows of the chart's numbers, evenly spaced, the last one always among them."""
    lines = chart.stack + chart.lines
    every = np.unique(np.concatenate([line.x for line in lines]))
    chosen = every[np.unique(np.linspace(0, len(every) - 1, TABLE_ROWS).round().astype(int))]
    rows = []
    for at in chosen:
        places = [(line, int(np.searchsorted(line.x, at, side="right")) - 1) for line in lines]
        cells = [si(float(line.y[i])) if i >= 0 else "–" for line, i in places]
        rows.append([f"{at:,.0f}" if at < 1e7 else si(float(at), 4), *cells])
    caption = f"{chart.title}, {chart.unit}" if chart.unit else chart.title
    return fold("Numbers", table(caption, [chart.x_unit, *(line.name for line in lines)], rows), cls="numbers")


def _legend(chart: Chart) -> str:
    entries = []
    for i, line in enumerate(chart.stack + chart.lines):
        style = _colour(chart, i) + (" dashed" if line.dashed or i >= 8 else "")
        entries.append(tag("li", tag("i"), escape(line.name) + " ", tag("b", si(_last(line.y))), cls=style))
    return tag("ul", *entries, cls="legend")


def _axes(frame: Frame) -> str:
    y = (tag("span", text, style=f"top:{p:.2f}%") for p, text in frame.y_ticks())
    x = (tag("span", text, cls=_edge(p), style=f"left:{p:.2f}%") for p, text in frame.x_ticks())
    return tag("div", *y, cls="y", aria_hidden="true") + tag("div", *x, cls="x", aria_hidden="true")


def draw(chart: Chart) -> str:
    """The figure as HTML; empty where there is nothing to show."""
    chart.lines = [line for line in chart.lines if len(line.x) and np.isfinite(line.y).any()]
    chart.stack = [line for line in chart.stack if len(line.x) and np.nansum(np.abs(line.y)) > 0]
    both = chart.stack + chart.lines
    if not both:
        return ""
    frame = Frame(chart)
    beyond = f"{frame.beyond} point(s) above the frame." if frame.beyond else ""
    numbers = {"x0": frame.x0, "x1": frame.x1, "lines": [[line.name, *_sample(line)] for line in both]}
    data = json.dumps(numbers, separators=(",", ":")).replace("</", "<\\/")
    said = "; ".join(f"{line.name} now {si(_last(line.y))}" for line in both)
    svg = tag(
        "svg", _shapes(chart, frame), viewBox=f"0 0 {W} {H}", preserveAspectRatio="none", role="img",
        aria_label=f"{chart.title} over {chart.x_unit}: {said}",
    )  # fmt: skip
    return tag(
        "figure",
        tag("figcaption", title(chart.title, chart.unit), _legend(chart)),
        tag("div", svg, _axes(frame), cls="plot"),
        note(f"{chart.note}{beyond}"),
        _table(chart),
        tag("script", data, type="application/json"),
        id=chart.key,
        cls="chart wide" if chart.wide else "chart",
    )


def _edge(percent: float) -> str:
    """Ticks near an end of the axis stay inside the figure."""
    return "first" if percent < 5 else "last" if percent > 95 else ""


def _last(y: np.ndarray) -> float | None:
    known = y[np.isfinite(y)]
    return float(known[-1]) if len(known) else None
