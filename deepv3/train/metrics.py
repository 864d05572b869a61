"""The figures of a run: derived from a step's sums, one JSON object a step, and the same to wandb.

Files in run_dir: ``metrics.jsonl`` (a row a step), ``validation.jsonl`` (a row a validation, step 0 included) and
``expert_load.jsonl`` (tokens per layer and expert, now and then, thinned as it grows). Whole lines only; on resume each
is cut to the checkpoint's step, so a file never holds a step twice.
"""

from pathlib import Path
from typing import Any

import torch

from deepv3.config.schema import Config
from deepv3.pipeline.figures import StepOut
from deepv3.train.jsonl import JsonLines

# BF16 dense peak of one device, TFLOP/s, from the vendors' data sheets, by a part of the device's name.
PEAK_TFLOPS = {"H100 PCIe": 756.0, "H100": 989.4, "H200": 989.4, "H800": 989.4, "B200": 2250.0, "A100": 312.0}


LOAD_RECORDS = 256  # rows of expert_load.jsonl before it is thinned to half of them


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


def memory_parts(held: dict[str, int], peak_gib: float) -> dict[str, float]:
    """Row fields ``memory_PART_gib`` of this rank; what no long-lived tensor explains is activations and other.

    held: bytes as memory.held gives them; peak_gib: largest memory in use so far.
    """
    parts = {f"memory_{name.split()[0]}_gib": size / 2**30 for name, size in held.items()}
    return parts | {"memory_activations_gib": max(0.0, peak_gib - sum(parts.values()))}


def loss_figures(out: StepOut, mtp_weight: float) -> dict[str, float]:
    """Objective and parts: main + lambda x (MTP, mean over depths) + balance (V3 2.2, 2.1.2). out: global sums."""
    main, mtp, balance = float(out.loss_main), float(out.loss_mtp), float(out.loss_balance)
    return {"loss": main + mtp_weight * mtp + balance, "loss_main": main, "loss_mtp": mtp, "loss_balance": balance}


class Recorder:
    """Rank 0's writer of all figures; other ranks hold none."""

    def __init__(self, cfg: Config, step: int):
        run_dir = Path(cfg.run_dir)
        self.metrics = JsonLines(run_dir / "metrics.jsonl")
        self.validation = JsonLines(run_dir / "validation.jsonl")
        self.expert_load = JsonLines(run_dir / "expert_load.jsonl")
        self.cut(step)
        self.loads = len(self.expert_load.read())
        self.wandb = _start_wandb(cfg, run_dir)

    def step(self, row: dict) -> None:
        """One optimizer step."""
        self.metrics.append(row)
        if self.wandb is not None:
            self.wandb.log(wandb_row(row), step=row["step"])

    def validate(self, row: dict) -> None:
        """One validation."""
        self.validation.append(row)
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def load(self, step: int, counts: torch.Tensor) -> None:
        """Tokens per layer and expert of one step. counts: [n_moe, E] on the CPU.

        A file that has reached LOAD_RECORDS is thinned to half of them: 671 B's records hold 60 kB each.
        """
        self.expert_load.append({"step": step, "counts": counts.long().tolist()})
        self.loads += 1
        rare = self.loads & (self.loads - 1) == 0  # 1, 2, 4, ... and then whenever the file is full
        if self.wandb is not None and counts.numel() and rare:
            self.wandb.log({"expert_load": _load_image(counts, step)}, step=step)
        if self.loads >= LOAD_RECORDS:
            self.expert_load.thin(LOAD_RECORDS // 2)
            self.loads = len(self.expert_load.read())

    def cut(self, step: int) -> None:
        """Drop the rows after `step`: the run was wound back to it."""
        for file in (self.metrics, self.validation, self.expert_load):
            file.cut(step)

    def close(self, report: Path | None = None) -> None:
        """End the wandb run; its last record is the report itself, with every figure of the run."""
        if self.wandb is None:
            return
        if report is not None:
            import wandb

            self.wandb.log({"report": wandb.Html(str(report), inject=False)})
        self.wandb.finish()


def wandb_row(row: dict) -> dict[str, Any]:
    """A row as wandb draws it: lists by layer become one figure a layer, named so that wandb groups them."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, list):
            flat |= {f"{name}/{i:02d}": item for i, item in enumerate(value)}
        else:
            flat[name] = value
    return flat


def _load_image(counts: torch.Tensor, step: int) -> Any:
    """Load over the mean of its layer as a grey image, four times the mean is white. counts: [n_moe, E]."""
    import wandb

    ratio = counts.double() / counts.double().mean(dim=1, keepdim=True).clamp(min=1e-9)
    pixels = (ratio.clamp(0, 4) * 63.75).round().byte().numpy().repeat(8, axis=0).repeat(4, axis=1)
    return wandb.Image(pixels, caption=f"step {step}: layers x experts, 4 x the mean is white")


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
