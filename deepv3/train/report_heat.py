"""Heat maps of the report as small palette PNGs inside the page: expert load over layers, experts and time; MaxVio.

4 bits a cell and 16 colours, written here with zlib: a picture library would write the same bytes through more layers.
Load is drawn as log2(load / mean), from a quarter to four times the mean, so that half and twice are equally far from
neutral; an expert without a token has a colour of its own.
"""

import base64
import struct
import zlib
from html import escape
from pathlib import Path

import numpy as np

from deepv3.train.jsonl import JsonLines
from deepv3.train.report_html import fold, table, tag, title

TIMES = 96  # columns of a map over time
SHOWN = 6  # layers drawn outside the fold


def _ramp(stops: list[tuple[int, int, int]], n: int) -> list[tuple[int, int, int]]:
    """n colours along the stops."""
    at = np.linspace(0, len(stops) - 1, n)
    table = np.array(stops, dtype=float)
    return [tuple(int(np.interp(a, range(len(stops)), table[:, k]) + 0.5) for k in range(3)) for a in at]  # type: ignore


# Blue: starved; near white: the mean; red: overloaded. 15 steps and the colour of a dead expert.
LOAD = _ramp([(5, 48, 97), (67, 147, 195), (247, 247, 247), (214, 96, 77), (103, 0, 31)], 15) + [(20, 20, 20)]
HEAT = _ramp([(252, 253, 191), (254, 159, 109), (222, 73, 104), (140, 41, 129), (59, 15, 112), (0, 0, 4)], 16)
DEAD = 15


def png(cells: np.ndarray, palette: list[tuple[int, int, int]]) -> bytes:
    """A PNG of cells, [height, width] of 0 to 15, by a palette of at most 16 colours (RGB)."""
    height, width = cells.shape
    padded = np.zeros((height, width + width % 2), dtype=np.uint8)
    padded[:, :width] = cells
    packed = (padded[:, 0::2] << 4) | padded[:, 1::2]
    lines = np.concatenate([np.zeros((height, 1), dtype=np.uint8), packed], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0)
    colours = b"".join(bytes(c) for c in palette)
    body = chunk(b"IHDR", header) + chunk(b"PLTE", colours) + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def load_levels(counts: np.ndarray) -> np.ndarray:
    """Colour numbers of loads. counts: [..., experts] tokens; each row over its own mean."""
    mean = np.maximum(counts.mean(axis=-1, keepdims=True), 1e-9)
    with np.errstate(divide="ignore"):
        level = np.log2(counts / mean)
    scaled = np.clip((level + 2) / 4 * 14, 0, 14).round()
    return np.where(counts <= 0, DEAD, scaled).astype(np.uint8)


def over_time(steps: np.ndarray, values: np.ndarray, columns: int = TIMES) -> np.ndarray:
    """values [records, ...] at `steps` as `columns` records evenly spaced in steps, each the newest at its time."""
    n = min(columns, max(1, int(steps[-1] - steps[0]) + 1))
    at = np.linspace(steps[0], steps[-1], n)
    return values[np.clip(np.searchsorted(steps, at, side="right") - 1, 0, len(steps) - 1)]


def image(cells: np.ndarray, palette: list[tuple[int, int, int]], text: str, kind: str) -> str:
    """An <img> of a map; text says in words what it shows."""
    data = base64.b64encode(png(cells, palette)).decode()
    return f'<img class="heat {kind}" alt="{escape(text)}" src="data:image/png;base64,{data}">'


def read_load(run_dir: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """(steps [records], tokens [records, layers, experts]) of expert_load.jsonl; None without experts."""
    rows = [row for row in JsonLines(run_dir / "expert_load.jsonl").read() if row.get("counts")]
    rows = [row for row in rows if np.shape(row["counts"]) == np.shape(rows[-1]["counts"])]
    if not rows:
        return None
    return np.array([row["step"] for row in rows]), np.array([row["counts"] for row in rows], dtype=np.float32)


def layer_name(index: int, layers: int, mtp: int, first: int) -> str:
    """A MoE layer's name: main layers by their number in the model, MTP blocks after them."""
    main = layers - mtp
    return f"layer {first + index}" if index < main else f"MTP {index - main + 1}"


def _scale(stops: list[tuple[int, int, int]], labels: list[str], extra: str = "") -> str:
    bar = tag("i", style=f"background:linear-gradient(90deg,{','.join(f'rgb{c}' for c in stops)})")
    return tag("div", bar, tag("p", *(tag("span", escape(label)) for label in labels)), extra, cls="scale")


def _framed(picture: str, along: str) -> str:
    """A map with layers from top to bottom and `along` below it."""
    return tag("div", tag("p", "layer", cls="down"), picture, tag("p", escape(along), cls="along"), cls="axes")


def load_figures(run_dir: Path, mtp: int, first: int) -> str:
    """Now: layers x experts; then: experts x time, a tile a layer, the least balanced first.

    mtp: MTP blocks at the end of the layers; first: number of the first MoE layer (first_k_dense_replace).
    """
    found = read_load(run_dir)
    if found is None:
        return ""
    steps, counts = found
    names = [layer_name(i, counts.shape[1], mtp, first) for i in range(counts.shape[1])]
    return _load_now(int(steps[-1]), counts[-1], names) + _load_over_time(steps, counts, names)


def _load_now(step: int, counts: np.ndarray, names: list[str]) -> str:
    """counts: [layers, experts]."""
    mean = np.maximum(counts.mean(axis=1), 1e-9)
    most, least, dead = counts.max(axis=1) / mean, counts.min(axis=1) / mean, (counts == 0).sum(axis=1)
    experts, worst = counts.shape[1], int(most.argmax())
    said = f"Load of {experts} experts in {len(names)} layers at step {step}; the worst MaxVio is {most[worst] - 1:.2f}"
    none = tag("p", tag("i"), "no token", cls="dead")
    rows = [
        [name, f"{high - 1:.3f}", f"{high:.2f}", f"{low:.2f}", str(n)]
        for name, high, low, n in zip(names, most, least, dead)
    ]
    along = f"expert 0 to {experts - 1}; from top to bottom {names[0]} to {names[-1]}"
    head = ["layer", "MaxVio", "fullest / mean", "emptiest / mean", "dead"]
    return tag(
        "figure",
        tag(
            "figcaption",
            title("Expert load now", f"step {step:,}, tokens / mean of the layer"),
            _scale(LOAD[:15], ["¼", "½", "mean", "2", "4 ×"], none),
        ),
        _framed(image(load_levels(counts), LOAD, f"{said} in {names[worst]}", "now"), along),
        fold("Numbers", table("Expert load by layer", head, rows), cls="numbers"),
        cls="map wide",
        id="load_now",
    )


def _load_over_time(steps: np.ndarray, counts: np.ndarray, names: list[str]) -> str:
    """counts: [records, layers, experts] at steps."""
    violation = counts[-1].max(axis=1) / np.maximum(counts[-1].mean(axis=1), 1e-9) - 1
    tiles = []
    for i in np.argsort(-violation, kind="stable"):
        levels = load_levels(over_time(steps, counts[:, i])).T
        said = f"Load of {len(levels)} experts in {names[i]} from step {steps[0]} to {steps[-1]}"
        label = tag("b", names[i]) + " " + tag("span", f"MaxVio {violation[i]:.2f}")
        picture = image(levels, LOAD, said, "small")
        tiles.append(tag("button", label, picture, type="button", cls="tile", aria_expanded="false"))
    rest = tag("div", *tiles[SHOWN:], cls="tiles")
    unit = f"experts from top to bottom, steps {steps[0]:,} to {steps[-1]:,} from left to right; least balanced first"
    return tag(
        "figure",
        tag("figcaption", title("Expert load over time", unit)),
        tag("div", *tiles[:SHOWN], cls="tiles"),
        fold(f"{len(tiles) - SHOWN} more layers", rest, cls="rest") if len(tiles) > SHOWN else "",
        cls="map wide",
        id="load_time",
    )


def violation_figure(steps: np.ndarray, layers: np.ndarray | None, mtp: int, first: int) -> str:
    """MaxVio of every layer over time. layers: [points, layers]; mtp, first: see load_figures."""
    if layers is None or not len(steps) or not layers.shape[1]:
        return ""
    top = max(float(np.percentile(layers, 99)), 0.1)
    cells = np.clip(over_time(steps, layers, 4 * TIMES).T / top * 15, 0, 15).round().astype(np.uint8)
    names = [layer_name(i, layers.shape[1], mtp, first) for i in range(layers.shape[1])]
    span = f"step {steps[0]:,} to {steps[-1]:,}"
    said = f"MaxVio of {len(names)} layers, {span}; highest now in {names[int(layers[-1].argmax())]}"
    heading = title("MaxVio by layer", "largest load over the mean, minus 1")
    chosen = np.unique(np.linspace(0, len(steps) - 1, 8).round().astype(int))
    rows = [[name, *(f"{layers[t, i]:.2f}" for t in chosen)] for i, name in enumerate(names)]
    return tag(
        "figure",
        tag("figcaption", heading, _scale(HEAT, ["0", f"{top / 2:.2g}", f"{top:.2g}"])),
        _framed(image(cells, HEAT, said, "vio"), f"{span}; from top to bottom {names[0]} to {names[-1]}"),
        fold("Numbers", table("MaxVio by step", ["layer", *(f"{steps[t]:,}" for t in chosen)], rows), cls="numbers"),
        cls="map wide",
        id="vio_layers",
    )
