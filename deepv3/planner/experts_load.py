"""Measured expert loads: read from a run's ``expert_load.jsonl``, or from any file of the same lines.

A line is ``{"step": 120, "counts": [[...], ...]}``: tokens per MoE layer and expert, MTP's layers last. Training
writes one every logging.plot_every steps (train/metrics.py); an inference engine's statistics fit the same form. The
balancer takes the mean of the last records, because the router's biases move until training ends. Files are read line
by line and only the last records are kept, so a run of any length costs little memory.
"""

import json
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepv3.config.compose import from_yaml
from deepv3.config.schema import ModelConfig
from deepv3.errors import ConfigError, DataError

NAME = "expert_load.jsonl"


@dataclass(frozen=True)
class Loads:
    """What the balancer starts from."""

    counts: list[list[float]]  # [layers, experts], tokens per step, mean over the records
    layers: list[int]  # the model's number of each row's layer, as in the Hugging Face export; MTP follows the last
    steps: list[int]  # of the records taken, ascending
    model: ModelConfig | None  # of the run; None for a bare file of loads
    file: Path

    @property
    def experts(self) -> int:
        return len(self.counts[0])


def read(path: Path, last: int) -> Loads:
    """The mean of the last records. path: a run folder, or a file of load lines. last: how many records at most.

    Raises ConfigError where there is nothing to read, DataError where what is there is damaged or fits no such model.
    """
    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"experts = {path}: there is no {file}; give the folder of a run that has trained experts, "
            'or a file of lines {"step": 1, "counts": [[...], ...]}'
        )
    if last < 1:
        raise ConfigError(f"last = {last} records, must be at least 1")
    records = _last_records(file, last)
    sums = [[math.fsum(values) for values in zip(*rows)] for rows in zip(*(record["counts"] for record in records))]
    counts = [[value / len(records) for value in row] for row in sums]
    config = file.parent / "config.yaml"
    model = from_yaml(config).model if config.is_file() else None
    return Loads(counts, _layers(counts, model, file), [record["step"] for record in records], model, file)


def _last_records(file: Path, last: int) -> list[dict[str, Any]]:
    """The last records, checked; a torn last line (a kill while it was written) is left out."""
    with open(file, encoding="utf-8") as lines:
        tail = deque(((n, line) for n, line in enumerate(lines, 1) if line.strip()), maxlen=last + 1)
    if tail and not tail[-1][1].endswith("\n") and not _is_json(tail[-1][1]):
        tail.pop()
    records = [_record(file, number, line) for number, line in list(tail)[-last:]]
    if not records:
        raise DataError(f"{file} holds no record yet; training writes one at step 1 and every logging.plot_every steps")
    shapes = {(len(r["counts"]), len(r["counts"][0])) for r in records}
    if len(shapes) > 1:
        raise DataError(f"{file}: the last {len(records)} records are of different models: layers x experts {shapes}")
    return records


def _record(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        rows = record["counts"]
        widths = {len(row) for row in rows}
        good = all(isinstance(v, (int, float)) and math.isfinite(v) and v >= 0 for row in rows for v in row)
    except (ValueError, TypeError, KeyError):
        raise DataError(f'{file}, line {number}: not of the form {{"step": 1, "counts": [[...], ...]}}') from None
    if not rows:
        raise DataError(f"{file}, line {number}: no layer with experts, so there is nothing to place")
    if len(widths) != 1 or widths == {0}:
        raise DataError(f"{file}, line {number}: layers of {sorted(widths)} experts; every layer has the same number")
    if not good:
        raise DataError(f"{file}, line {number}: a load is not a finite number >= 0")
    return {"step": record.get("step", number), "counts": rows}


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _layers(counts: list[list[float]], model: ModelConfig | None, file: Path) -> list[int]:
    """Layer numbers of the rows; without a model they count from 0."""
    if model is None:
        return list(range(len(counts)))
    layers = list(range(model.first_k_dense_replace, model.num_hidden_layers + model.num_nextn_predict_layers))
    told, found = (len(layers), model.n_routed_experts), (len(counts), len(counts[0]))
    if told != found:
        raise DataError(
            f"{file} has {found[0]} layers x {found[1]} experts, config.yaml beside it {told[0]} x {told[1]} "
            "(num_hidden_layers - first_k_dense_replace + num_nextn_predict_layers, n_routed_experts)"
        )
    return layers
