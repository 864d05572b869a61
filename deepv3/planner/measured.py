"""Calibration from measurements: a JSON file of rows in, a `Calibration` out.

    {"format": 1, "name": "our H200", "device": "h200", "command": "...", "versions": {...}, "rows": [...]}

A row has a kind, what was moved or computed, and the seconds it took. Constants without rows keep the value of the
built-in calibration named by "base" (default report). The median of a constant's rows counts, their extremes are its
range.

    kind        further keys                                            constant
    gemm        format fp8|bf16, shape dense|grouped,                   {format}_{shape}[_dgrad|_wgrad]
                pass forward|input|weight, flops; summed: bytes
                of FP32 sums, whose time at the copy's rate is
                taken off (grouped weight gradients)
    attention   pass forward|backward, flops (causal half)              attention, attention_backward
    copy        bytes (read and written)                                hbm
    alltoall    scope nvlink|nic, bytes (sent to other ranks)           nvlink|nic, sync_*: a line through >= 2 sizes
    elementwise piece attention|experts|head, bytes (fewest needed)     traffic_attention, traffic_experts, traffic_head
    pair        slots (seconds of its slots, alone)                     interference
    host        layers (forward and backward passes of layers)          layer_overhead
    launching   layers (each forward and backward): until the host      launch
                has enqueued them, the device not in its way
    update      parameters                                              update_bytes
    codes       parameters (of FP8 products, once a step)               codes_bytes
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from deepv3.errors import ConfigError
from deepv3.planner.calibration import Calibration, Value
from deepv3.planner.hardware import DEVICES, Device
from deepv3.planner.megatron import BUILT_IN
from deepv3.planner.work import HOST

Row = Mapping[str, Any]
Reader = Callable[[Row, Device, float], tuple[str, float]]
"""(row, device, fraction of the nominal bandwidth that a copy reaches) -> (constant, value)."""
FORMAT = 1


def _gemm(row: Row, device: Device, hbm: float) -> tuple[str, float]:
    suffix = {"forward": "", "input": "_dgrad", "weight": "_wgrad"}[row["pass"]]
    peak = device.fp8 if row["format"] == "fp8" else device.bf16
    seconds = row["seconds"] - row.get("summed", 0.0) / (device.hbm * hbm)
    if seconds <= 0:
        raise ValueError(f"seconds = {row['seconds']} do not even read and write the sums")
    return f"{row['format']}_{row['shape']}{suffix}", row["flops"] / seconds / peak


def _attention(row: Row, device: Device, hbm: float) -> tuple[str, float]:
    suffix = {"forward": "", "backward": "_backward"}[row["pass"]]
    return f"attention{suffix}", row["flops"] / row["seconds"] / device.bf16


def _copy(row: Row, device: Device, hbm: float) -> tuple[str, float]:
    return "hbm", row["bytes"] / row["seconds"] / device.hbm


def _elementwise(row: Row, device: Device, hbm: float) -> tuple[str, float]:
    return f"traffic_{row['piece']}", row["seconds"] * device.hbm * hbm / row["bytes"]


def _pair(row: Row, device: Device, hbm: float) -> tuple[str, float]:
    return "interference", row["seconds"] / row["slots"]


def _host(row: Row, device: Device, hbm: float) -> tuple[str, float]:
    return "layer_overhead", row["seconds"] / row["layers"]


def _launching(row: Row, device: Device, hbm: float) -> tuple[str, float]:
    known = Calibration()
    kernels = known.kernels_forward.value + known.kernels_backward.value
    return "launch", row["seconds"] / row["layers"] / kernels * device.host / HOST


def _update(row: Row, device: Device, hbm: float) -> tuple[str, float]:
    return "update_bytes", row["seconds"] * device.hbm * hbm / row["parameters"]


def _codes(row: Row, device: Device, hbm: float) -> tuple[str, float]:
    return "codes_bytes", row["seconds"] * device.hbm * hbm / row["parameters"]


READERS: dict[str, Reader] = {
    "gemm": _gemm, "attention": _attention, "copy": _copy, "elementwise": _elementwise, "pair": _pair, "host": _host,
    "launching": _launching, "update": _update, "codes": _codes,
}  # fmt: skip
ALIASES = {"fp8_dense_dgrad": "fp8_dense", "bf16_dense_dgrad": "bf16_dense", "bf16_grouped_dgrad": "bf16_grouped",
           "bf16_grouped_wgrad": "bf16_grouped"}  # fmt: skip
"""Passes that share a constant."""
SLOW_WHEN_HIGH = ("traffic_attention", "traffic_experts", "traffic_head", "interference", "layer_overhead", "launch",
                  "update_bytes", "codes_bytes", "sync_nic", "sync_nvlink")  # fmt: skip


def _copied(rows: Sequence[Row], device: Device, base: Calibration) -> float:
    """The fraction of the nominal bandwidth that copies reach, which the bytes of other rows are counted at."""
    copies = [row for row in rows if isinstance(row, Mapping) and row.get("kind") == "copy"]
    try:
        found = median(_copy(row, device, 0.0)[1] for row in copies) if copies else 0.0
    except (KeyError, TypeError, ZeroDivisionError):
        found = 0.0  # the loop over all rows says what is wrong with it
    return found if found > 0.0 else base.hbm.value


def calibrate(rows: Sequence[Row], device: Device, base: Calibration, name: str) -> Calibration:
    """The base with every constant that has rows replaced. Raises ConfigError for a row that cannot be read."""
    found: dict[str, list[float]] = defaultdict(list)
    sent: dict[str, list[tuple[float, float]]] = defaultdict(list)
    copied = _copied(rows, device, base)
    for number, row in enumerate(rows):
        try:
            if not row["seconds"] > 0:
                raise ValueError(f"seconds = {row['seconds']}")
            if row["kind"] == "alltoall":
                sent[row["scope"]].append((float(row["bytes"]), float(row["seconds"])))
                continue
            constant, value = READERS[row["kind"]](row, device, copied)
            if not 0.0 < value < float("inf"):
                raise ValueError(f"{constant} = {value}")
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ConfigError(f"calibration row {number}, {row}: {type(error).__name__} {error}") from None
        found[ALIASES.get(constant, constant)].append(value)
    for scope, points in sent.items():
        found |= _line(scope, points, device)
    known = base.constants()
    strange = sorted(set(found) - set(known))
    if strange:
        raise ConfigError(f"calibration rows name {', '.join(strange)}; there is {', '.join(known)}")
    changed = {}
    for constant, values in found.items():
        ends = (min(values), max(values))
        low, high = ends[::-1] if constant in SLOW_WHEN_HIGH else ends
        changed[constant] = Value(median(values), low, high, f"{len(values)} measured rows of {name}")
    return base.changed(changed, name)


def _line(scope: str, points: list[tuple[float, float]], device: Device) -> dict[str, list[float]]:
    """Bandwidth and fixed time of an all-to-all: the straight line of least squares through (bytes, seconds)."""
    if len({size for size, _ in points}) < 2:
        raise ConfigError(f"calibration: all-to-all over {scope} needs rows of 2 sizes to tell bandwidth from latency")
    nominal = {"nvlink": device.nvlink, "nic": device.nic}[scope]
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    if slope <= 0:
        raise ConfigError(f"calibration: all-to-all over {scope} gets no slower with more bytes: {points}")
    return {scope: [1.0 / slope / nominal], f"sync_{scope}": [max(0.0, mean_y - slope * mean_x)]}


def read_calibration(name: str) -> Calibration:
    """A built-in calibration by name, or one from a file of rows. Raises ConfigError."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    path = Path(name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"calibration = {name} is neither one of {', '.join(BUILT_IN)} nor a readable JSON file ({error}); "
            "docs/planner.md has its format"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(f"calibration = {name}: format is not {FORMAT}; make the file anew with this version")
    device, base = content.get("device"), content.get("base", "report")
    if device not in DEVICES or base not in BUILT_IN or not isinstance(content.get("rows"), list):
        raise ConfigError(
            f"calibration = {name}: device = {device!r} must be one of {', '.join(DEVICES)}, base = {base!r} one of "
            f"{', '.join(BUILT_IN)}, rows a list"
        )
    return calibrate(content["rows"], DEVICES[device], BUILT_IN[base], content.get("name", path.stem))
