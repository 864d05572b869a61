"""Pictures of schedules: one row per rank, time to the right, a box per chunk with its micro-batch.

Blue forward, green full backward, teal backward for the input, orange weight gradient; the darker shade is direction 1
or, where a rank holds two stages of one direction, the later stage. A pair is two boxes above each other that share
their time, the forward on top. SVG is written by hand and is the same to the byte each time; PNG goes through
matplotlib.

    python -m deepv3.pipeline.draw FOLDER      writes the pictures of docs/schedules.md
"""

import sys
from pathlib import Path
from typing import NamedTuple

from deepv3.errors import ScheduleError
from deepv3.pipeline.actions import Action, Pair
from deepv3.pipeline.dryrun import UNIT_COSTS, Times, timeline
from deepv3.pipeline.schedule import Schedule, make_schedule

COLOURS = {
    "F": ("#a9c8f5", "#5b8fdd"),
    "B": ("#b5dfb0", "#6db567"),
    "I": ("#aee0dd", "#56b3ad"),
    "W": ("#f6c99a", "#e39a4b"),
}
UNIT, ROW, LEFT, TOP = 16, 20, 46, 22
"""Pixels: the shortest box, one rank, room for the ranks' names and for the title."""

DOCUMENTED = (
    ("1f1b", "1f1b", 4, 8),
    ("zb1p", "zb1p", 4, 8),
    ("dualpipe", "dualpipe", 8, 20),
    ("dualpipev", "dualpipev", 4, 10),
    ("dualpipev_short", "dualpipev", 4, 5),
)
"""File, schedule, ranks and micro-batches of the pictures in the documentation."""


class Box(NamedTuple):
    """A rectangle in units of time and rows: x, y, width, height; its colour and text."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    text: str


def _boxes(schedule: Schedule, costs: Times) -> tuple[list[Box], float]:
    """All boxes and the makespan. Both halves of a pair have the pair's whole time and half of its row."""
    spans = timeline(schedule, costs)
    boxes = []

    def add(action: Action, rank: int, span: tuple[float, float], top: float, height: float) -> None:
        dark = action.direction or schedule.chunks(rank).index(action.stage) * (len(schedule.routes) == 1)
        colour = COLOURS[action.kind][dark]
        boxes.append(Box(span[0], rank + top, span[1] - span[0], height, colour, str(action.micro_batch)))

    for rank in range(schedule.ranks):
        for step, span in zip(schedule.compute(rank), spans[rank]):
            if isinstance(step, Pair):
                add(step.forward, rank, span, 0.0, 0.5)
                add(step.backward, rank, span, 0.5, 0.5)
            else:
                add(step, rank, span, 0.0, 1.0)
    return boxes, max(rank[-1][1] for rank in spans)


def title(schedule: Schedule, makespan: float) -> str:
    """What the picture shows, in a line."""
    return (
        f"{schedule.name}: {schedule.ranks} ranks, {schedule.stages} stages, {schedule.micro_batches} micro-batches, "
        f"time {makespan:g}"
    )


def svg(schedule: Schedule, costs: Times = UNIT_COSTS) -> str:
    """The picture as the text of an SVG file."""
    boxes, makespan = _boxes(schedule, costs)
    scale = UNIT / min(box.width for box in boxes)
    width, height = LEFT + makespan * scale + 8, TOP + ROW * schedule.ranks + 8
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" font-family="sans-serif">',
        f'<rect width="{width:g}" height="{height:g}" fill="#fff"/>',
        f'<text x="4" y="14" font-size="12">{title(schedule, makespan)}</text>',
        '<g font-size="10">',
    ]
    lines += [f'<text x="4" y="{TOP + ROW * (rank + 0.7):g}">rank {rank}</text>' for rank in range(schedule.ranks)]
    lines.append('</g><g stroke="#555" stroke-width=".6">')
    for colour in sorted({box.colour for box in boxes}):  # one path per colour keeps the file small
        corners = "".join(
            f"M{LEFT + box.x * scale:g} {TOP + box.y * ROW:g}"
            f"h{box.width * scale:g}v{box.height * ROW:g}h{-box.width * scale:g}z"
            for box in boxes
            if box.colour == colour
        )
        lines.append(f'<path fill="{colour}" d="{corners}"/>')
    lines.append('</g><g font-size="9" text-anchor="middle">')
    for box in boxes:
        x, y = LEFT + (box.x + box.width / 2) * scale, TOP + (box.y + box.height / 2) * ROW + 3
        lines.append(f'<text x="{x:g}" y="{y:g}">{box.text}</text>')
    lines.append("</g></svg>")
    return "\n".join(lines) + "\n"


def _png(schedule: Schedule, path: Path, costs: Times) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # heavy, and needed for PNG only
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    boxes, makespan = _boxes(schedule, costs)
    figure = Figure(figsize=(min(60.0, 1.5 + makespan * 0.22), 0.8 + 0.3 * schedule.ranks), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for box in boxes:
        axes.add_patch(Rectangle((box.x, box.y), box.width, box.height, facecolor=box.colour, edgecolor="#555", lw=0.4))
        middle = (box.x + box.width / 2, box.y + box.height / 2)
        axes.text(*middle, box.text, fontsize=5, ha="center", va="center")
    axes.set(xlim=(0, makespan), ylim=(schedule.ranks, 0), title=title(schedule, makespan))
    axes.set_yticks([rank + 0.5 for rank in range(schedule.ranks)], [f"rank {rank}" for rank in range(schedule.ranks)])
    figure.savefig(path, dpi=150)


def draw(schedule: Schedule, path: str | Path, costs: Times = UNIT_COSTS) -> None:
    """Write the picture of a schedule, lowered or not; messages take no time in it.

    path: its suffix says .svg or .png. Raises ScheduleError for any other suffix.
    """
    path = Path(path)
    if path.suffix == ".svg":
        path.write_text(svg(schedule, costs), encoding="utf-8")
    elif path.suffix == ".png":
        _png(schedule, path, costs)
    else:
        raise ScheduleError(f"draw={path} ends in '{path.suffix}': pictures are .svg or .png")


if __name__ == "__main__":
    for file, name, ranks, count in DOCUMENTED:
        draw(make_schedule(name, ranks, count), Path(sys.argv[1]) / f"{file}.svg")
