"""metrics.jsonl as a few hundred points, whatever its length, read once and then only where it has grown.

Rows fall into buckets of `width` consecutive steps. A bucket keeps count, sum, smallest and largest value of each
field, so that a spike of one step in a million stays visible as the top of a band. When the last bucket is full,
neighbours merge in pairs and the width doubles: memory is bounded and nothing is read twice. pyarrow parses, at about
150 MB/s and core (json.loads: 40); a stretch that it refuses (a damaged line) is parsed line by line and the bad lines
are left out.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

CAPACITY = 640  # buckets; between half of it and all of it are in use once there are as many steps
CHUNK = 1 << 26  # bytes parsed at once

# What the report draws; other fields of a row are passed over.
FIELDS = (
    "tokens", "loss", "loss_main", "loss_mtp", "loss_balance", "lr", "bias_update_speed", "mtp_loss_weight",
    "sequences", "grad_norm", "skipped", "tokens_per_second", "tokens_per_second_per_gpu", "mfu", "mfu_full_attention",
    "memory_gib", "step_seconds", "max_vio", "dead_experts", "routing_entropy", "node_fanout", "router_bias_min",
    "router_bias_max", "time_compute", "time_comm_exposed", "time_comm_hidden", "time_bubble", "time_data",
    "time_optimizer", "time_checkpoint", "time_validation", "memory_weights_gib", "memory_gradients_gib",
    "memory_master_gib", "memory_moments_gib", "memory_activations_gib",
)  # fmt: skip
LAYERS = "max_vio_layers"


class Series:
    """The summary of one metrics file; `update` takes in what was appended since."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._forget()

    def _forget(self) -> None:
        self.width, self.rows, self.used = 1, 0, 0
        self._offset, self._inode = 0, -1
        shape = (len(FIELDS), CAPACITY)
        self._count, self._sum = np.zeros(shape), np.zeros(shape)
        self._min, self._max = np.full(shape, np.inf), np.full(shape, -np.inf)
        self._layers: np.ndarray | None = None  # [buckets, layers] sums
        self.last: dict[str, Any] = {}

    def update(self) -> "Series":
        """Read what is new. A file that was cut (resume, rewind) is read again from its start."""
        try:
            state = self.path.stat()
        except OSError:
            return self
        if state.st_ino != self._inode or state.st_size < self._offset:
            self._forget()
            self._inode = state.st_ino
        with open(self.path, "rb") as file:
            while True:
                file.seek(self._offset)
                block = file.read(CHUNK)
                whole = block.rfind(b"\n") + 1
                if not whole:  # nothing more, or the line that is being written
                    break
                self._take(block[:whole])
                self._offset += whole
        return self

    def _take(self, block: bytes) -> None:
        steps, columns, layers = _parse(block)
        if not len(steps):
            return
        while (int(steps.max()) - 1) // self.width >= CAPACITY:
            self._halve()
        at = (steps.astype(np.int64) - 1) // self.width
        self.used, self.rows = max(self.used, int(at.max()) + 1), self.rows + len(steps)
        for i, values in enumerate(columns):
            known = np.isfinite(values)
            where, values = at[known], values[known]
            self._count[i] += np.bincount(where, minlength=CAPACITY)
            self._sum[i] += np.bincount(where, values, minlength=CAPACITY)
            np.minimum.at(self._min[i], where, values)
            np.maximum.at(self._max[i], where, values)
        if layers is not None:
            if self._layers is None or self._layers.shape[1] != layers.shape[1]:
                self._layers = np.zeros((CAPACITY, layers.shape[1]))
            np.add.at(self._layers, at, layers)
        with suppress(ValueError):
            self.last = json.loads(block[block.rfind(b"\n", 0, -1) + 1 :])

    def _halve(self) -> None:
        def pairs(table: np.ndarray, merge: Any, empty: float) -> np.ndarray:
            merged = merge(table[:, 0::2], table[:, 1::2])
            return np.concatenate([merged, np.full_like(merged, empty)], axis=1)

        self._count, self._sum = pairs(self._count, np.add, 0.0), pairs(self._sum, np.add, 0.0)
        self._min, self._max = pairs(self._min, np.minimum, np.inf), pairs(self._max, np.maximum, -np.inf)
        if self._layers is not None:
            self._layers = pairs(self._layers.T, np.add, 0.0).T.copy()
        self.width, self.used = self.width * 2, (self.used + 1) // 2

    # -- what the charts read, each an array over `steps` ------------------------------------------------------------

    def _filled(self) -> np.ndarray:
        return np.flatnonzero(self._count[0, : self.used])

    @property
    def steps(self) -> np.ndarray:
        """Last step of each bucket, never beyond the last row."""
        ends = (self._filled() + 1) * self.width
        return np.minimum(ends, int(self.last.get("step", 0))) if len(ends) else ends

    def has(self, name: str) -> bool:
        """Whether any row has this field."""
        return bool(self._count[FIELDS.index(name)].any())

    def mean(self, name: str) -> np.ndarray:
        """Mean over each bucket's rows that have the field; NaN where none has."""
        i, at = FIELDS.index(name), self._filled()
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._sum[i, at] / self._count[i, at]

    def share(self, name: str) -> np.ndarray:
        """Sum over each bucket's rows that have the field, per row of the bucket: absent counts as zero."""
        i, at = FIELDS.index(name), self._filled()
        return self._sum[i, at] / self._count[0, at]

    def low(self, name: str) -> np.ndarray:
        """Smallest value of each bucket; NaN where there is none."""
        values = self._min[FIELDS.index(name), self._filled()]
        return np.where(np.isfinite(values), values, np.nan)

    def high(self, name: str) -> np.ndarray:
        """Largest value of each bucket; NaN where there is none."""
        values = self._max[FIELDS.index(name), self._filled()]
        return np.where(np.isfinite(values), values, np.nan)

    def total(self, name: str) -> float:
        """Sum over all rows."""
        return float(self._sum[FIELDS.index(name)].sum())

    def layers(self) -> np.ndarray | None:
        """Mean MaxVio per bucket and layer, [buckets, layers]; None for a model without experts."""
        if self._layers is None:
            return None
        at = self._filled()
        return self._layers[at] / self._count[0, at][:, None]


def _parse(block: bytes) -> tuple[np.ndarray, list[np.ndarray], np.ndarray | None]:
    """(steps, a column per FIELDS entry with NaN where absent, MaxVio [rows, layers] or None)."""
    import pyarrow as pa
    from pyarrow import json as arrow_json

    schema = [pa.field("step", pa.float64()), pa.field(LAYERS, pa.list_(pa.float64()))]
    schema += [pa.field(name, pa.bool_() if name == "skipped" else pa.float64()) for name in FIELDS]
    parse = arrow_json.ParseOptions(explicit_schema=pa.schema(schema), unexpected_field_behavior="ignore")
    try:
        read = arrow_json.ReadOptions(block_size=1 << 22)
        table = arrow_json.read_json(pa.BufferReader(block), read_options=read, parse_options=parse).combine_chunks()
    except pa.ArrowInvalid:
        return _parse_slowly(block)

    def column(name: str) -> np.ndarray:
        return table[name].chunk(0).cast(pa.float64()).to_numpy(zero_copy_only=False)

    if not len(table):
        return np.zeros(0), [np.zeros(0)] * len(FIELDS), None
    steps, columns, lists = column("step"), [column(name) for name in FIELDS], table[LAYERS].chunk(0)
    flat = lists.flatten().to_numpy(zero_copy_only=False)
    even = lists.null_count == 0 and len(steps) and len(flat) and len(flat) % len(steps) == 0
    return steps, columns, np.nan_to_num(flat.reshape(len(steps), -1)) if even else None


def _parse_slowly(block: bytes) -> tuple[np.ndarray, list[np.ndarray], None]:
    rows = []
    for line in block.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)

    def number(value: Any) -> float:
        return float(value) if isinstance(value, int | float) else np.nan

    columns = [np.array([number(row.get(name)) for row in rows]) for name in FIELDS]
    return np.array([row["step"] for row in rows], dtype=float), columns, None
