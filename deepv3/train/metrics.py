"""The figures of a run: derived from a step's sums, one JSON object a step, and the same to wandb.

Files in run_dir: ``metrics.jsonl`` (a row a step), ``validation.jsonl`` (a row a validation, step 0 included) and
``expert_load.jsonl`` (tokens per layer and expert, now and then). Whole lines only; on resume each is cut to the
checkpoint's step, so a file never holds a step twice.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch

from deepv3.config.schema import Config
from deepv3.pipeline.executor import StepOut

# BF16 dense peak of one device, TFLOP/s, from the vendors' data sheets, by a part of the device's name.
PEAK_TFLOPS = {"H100 PCIe": 756.0, "H100": 989.4, "H200": 989.4, "H800": 989.4, "B200": 2250.0, "A100": 312.0}


def peak_tflops(cfg: Config, device: torch.device) -> float:
    """BF16 dense peak of the device, TFLOP/s: cluster.peak_tflops, else by its name, else 0 (no MFU then)."""
    if cfg.cluster.peak_tflops > 0 or device.type != "cuda":
        return cfg.cluster.peak_tflops
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), 0.0)


def max_violation(counts: torch.Tensor) -> list[float]:
    """MaxVio per layer: (largest expert load - mean) / mean (aux-loss-free paper Eq. 4). counts: [n_moe, E]."""
    mean = counts.mean(dim=1).clamp(min=1e-9)
    return ((counts.max(dim=1).values - mean) / mean).tolist()


def router_figures(out: StepOut, tokens: int) -> dict[str, Any]:
    """Balance and spread of one step's routing. out: global sums on the CPU; tokens: trained tokens of the step."""
    if out.counts.numel() == 0:
        return {"max_vio": 0.0, "max_vio_layers": [], "dead_experts": 0, "routing_entropy": 0.0, "node_fanout": 0.0}
    per_layer = max_violation(out.counts)
    return {
        "max_vio": max(per_layer),
        "max_vio_layers": [round(v, 4) for v in per_layer],
        "dead_experts": int((out.counts == 0).sum()),
        "routing_entropy": float(out.entropy.mean()) / tokens,
        "node_fanout": float(out.fanout.mean()) / tokens,
    }


def loss_figures(out: StepOut, mtp_weight: float) -> dict[str, float]:
    """Objective and parts: main + lambda x (MTP, mean over depths) + balance (V3 2.2, 2.1.2). out: global sums."""
    main, mtp, balance = float(out.loss_main), float(out.loss_mtp), float(out.loss_balance)
    return {"loss": main + mtp_weight * mtp + balance, "loss_main": main, "loss_mtp": mtp, "loss_balance": balance}


def finite(row: Any) -> Any:
    """The row with NaN and infinities as null, which JSON can hold."""
    if isinstance(row, dict):
        return {k: finite(v) for k, v in row.items()}
    if isinstance(row, list):
        return [finite(v) for v in row]
    return None if isinstance(row, float) and not math.isfinite(row) else row


class JsonLines:
    """An append-only file of one JSON object a line with a ``step`` key."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, row: dict) -> None:
        """Write one whole line; a line is complete or absent for every reader."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(row)) + "\n")

    def read(self) -> list[dict]:
        """All whole rows; a torn last line (a kill in its write) is left out."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def cut(self, step: int) -> None:
        """Drop rows after `step`, by writing the kept ones beside and renaming."""
        if not self.path.exists():
            return
        kept = [row for row in self.read() if row["step"] <= step]
        beside = self.path.with_name("." + self.path.name)
        beside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        beside.replace(self.path)


class Recorder:
    """Rank 0's writer of all figures; other ranks hold none."""

    def __init__(self, cfg: Config, step: int):
        run_dir = Path(cfg.run_dir)
        self.metrics = JsonLines(run_dir / "metrics.jsonl")
        self.validation = JsonLines(run_dir / "validation.jsonl")
        self.expert_load = JsonLines(run_dir / "expert_load.jsonl")
        for file in (self.metrics, self.validation, self.expert_load):
            file.cut(step)
        self.wandb = _start_wandb(cfg, run_dir)

    def step(self, row: dict) -> None:
        """One optimizer step."""
        self.metrics.append(row)
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in row.items() if not isinstance(v, list)}, step=row["step"])

    def validate(self, row: dict) -> None:
        """One validation."""
        self.validation.append(row)
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def load(self, step: int, counts: torch.Tensor) -> None:
        """Tokens per layer and expert of one step. counts: [n_moe, E] on the CPU."""
        self.expert_load.append({"step": step, "counts": counts.long().tolist()})

    def close(self) -> None:
        """End the wandb run."""
        if self.wandb is not None:
            self.wandb.finish()


def _start_wandb(cfg: Config, run_dir: Path) -> Any:
    if cfg.logging.wandb == "disabled":
        return None
    import wandb  # half a second of import, only where asked for

    from deepv3.config.compose import to_dict

    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    return wandb.init(
        project=cfg.logging.project,
        name=run_dir.name,
        dir=str(run_dir),
        mode=cfg.logging.wandb,  # type: ignore[arg-type]
        config=to_dict(cfg),
        settings=settings,
    )
