"""Pictures of a plan: the step's timeline, drawn from the lists and times that were simulated, and memory per rank."""

from pathlib import Path

from deepv3.errors import ConfigError
from deepv3.pipeline.actions import Action, Pair, Transfer
from deepv3.pipeline.draw import draw
from deepv3.planner.hardware import GIB
from deepv3.planner.memory import RankMemory
from deepv3.planner.plan import Plan

SHOWN = 40
"""Micro-batches drawn at most: the steady part repeats itself."""
COLOURS = (
    "#5b8fdd", "#a9c8f5", "#6db567", "#56b3ad", "#aee0dd", "#e39a4b", "#f6c99a", "#c58fc9", "#999999",
)  # fmt: skip
ROW, LEFT, TOP, WIDTH = 18, 130, 46, 640
"""Pixels: a bar, room for names and for the legend, the device's memory."""


def draw_plan(plan: Plan, path: Path) -> list[Path]:
    """Write both pictures; returns their paths. Raises ConfigError for a suffix that is not .svg or .png."""
    if path.suffix not in (".svg", ".png"):
        raise ConfigError(f"draw = {path} ends in '{path.suffix}': pictures are .svg or .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    layout, costs = plan.layout, plan.simulator.costs
    lists = layout.lists(min(layout.micro_batches, max(SHOWN, 2 * layout.pp + 2)))
    unit = min(costs(step) for rank in range(lists.ranks) for step in lists.compute(rank))

    def times(step: Action | Pair | Transfer) -> float:
        return costs(step) / unit

    draw(lists, path, times)
    beside = path.with_name(f"{path.stem}-memory{path.suffix}")
    capacity = layout.cluster.device.memory
    if path.suffix == ".svg":
        beside.write_text(memory_svg(plan.ranks, capacity), encoding="utf-8")
    else:
        _memory_png(plan.ranks, capacity, beside)
    return [path, beside]


def memory_svg(ranks: tuple[RankMemory, ...], capacity: float) -> str:
    """One stacked bar per rank; a line marks what the device has."""
    scale = WIDTH / max(capacity, *(rank.total for rank in ranks))
    height = TOP + ROW * len(ranks) + 24
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 70}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{LEFT + WIDTH + 70}" height="{height}" fill="#fff"/>',
        f'<text x="4" y="14" font-size="12">memory per pipeline rank, GiB of {capacity / GIB:.1f}</text>',
    ]
    for number, (part, colour) in enumerate(zip(ranks[0].parts, COLOURS)):
        place = LEFT + number * (WIDTH + 60) // len(COLOURS)
        lines.append(f'<rect x="{place}" y="22" width="9" height="9" fill="{colour}"/>')
        lines.append(f'<text x="{place + 12}" y="31" font-size="9">{part}</text>')
    for row, rank in enumerate(ranks):
        x, y = float(LEFT), TOP + row * ROW
        lines.append(f'<text x="4" y="{y + 12}">{rank.rank}: {rank.role}</text>')
        for size, colour in zip(rank.parts.values(), COLOURS):
            lines.append(f'<rect x="{x:.1f}" y="{y}" width="{size * scale:.1f}" height="{ROW - 4}" fill="{colour}"/>')
            x += size * scale
        lines.append(f'<text x="{x + 4:.1f}" y="{y + 12}">{rank.total / GIB:.1f}</text>')
    edge = LEFT + capacity * scale
    lines.append(f'<path d="M{edge:.1f} {TOP - 6}V{height - 18}" stroke="#c00"/></svg>')
    return "\n".join(lines) + "\n"


def _memory_png(ranks: tuple[RankMemory, ...], capacity: float, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # heavy, and needed for PNG only
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.5 + 0.3 * len(ranks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names, start = [f"{rank.rank}: {rank.role}" for rank in ranks], [0.0] * len(ranks)
    for part, colour in zip(ranks[0].parts, COLOURS):
        sizes = [rank.parts[part] / GIB for rank in ranks]
        axes.barh(names, sizes, left=start, color=colour, label=part)
        start = [a + b for a, b in zip(start, sizes)]
    axes.axvline(capacity / GIB, color="#c00")
    axes.invert_yaxis()
    axes.set(xlabel="GiB", title="memory per pipeline rank")
    axes.legend(fontsize=7, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.savefig(path, dpi=120)
