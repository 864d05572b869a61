"""A run folder written by hand, with every field that the report knows, for the tests of report and browser."""

import json
import math
import random
from pathlib import Path

import yaml

from deepv3.train.events import EventLog
from deepv3.train.jsonl import JsonLines

LAYERS, EXPERTS = 9, 16


def row(step: int, rng: random.Random, **more) -> dict:
    """A plausible row of metrics.jsonl."""
    decay = math.exp(-step / 60)
    loss = 2.0 + 5 * decay + rng.gauss(0, 0.02)
    layers = [round(0.2 + 2 * decay * rng.random(), 4) for _ in range(LAYERS)]
    fields = {
        "step": step, "tokens": 4096 * step, "loss": loss + 0.1, "loss_main": loss, "loss_mtp": loss + 0.2,
        "loss_balance": 1e-4, "lr": 1e-3 * decay, "bias_update_speed": 1e-3, "mtp_loss_weight": 0.3, "sequences": 16,
        "grad_norm": 0.5 + decay, "skipped": False, "tokens_per_second": 3000.0, "tokens_per_second_per_gpu": 1500.0,
        "mfu": 0.4, "mfu_full_attention": 0.45, "memory_gib": 10.0, "step_seconds": 1.0, "max_vio": max(layers),
        "max_vio_layers": layers, "dead_experts": 0, "routing_entropy": 1.3, "node_fanout": 2.0,
        "router_bias_min": -0.1, "router_bias_max": 0.2, "time_compute": 0.6, "time_comm_exposed": 0.1,
        "time_comm_hidden": 0.2, "time_bubble": 0.1, "time_data": 0.01, "time_optimizer": 0.05,
        "memory_weights_gib": 2.0, "memory_gradients_gib": 4.0, "memory_master_gib": 1.0, "memory_moments_gib": 1.0,
        "memory_activations_gib": 2.0,
    }  # fmt: skip
    return fields | more


def write(folder: Path, steps: int = 120, lr: float = 1e-3, seed: int = 0) -> Path:
    """Fill `folder` with a run of `steps` steps that ended well."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row(step, rng)) + "\n" for step in range(1, steps + 1))
    checks, loads = JsonLines(folder / "validation.jsonl"), JsonLines(folder / "expert_load.jsonl")
    for step in range(0, steps + 1, max(1, steps // 4)):
        checks.append({"step": step, "tokens": 4096 * step, "val_loss": 2.1 + 5 * math.exp(-step / 60) + lr})
    for step in range(1, steps + 1, max(1, steps // 12)):
        counts = [[rng.randint(200, 300) for _ in range(EXPERTS)] for _ in range(LAYERS)]
        counts[3][5] = 0
        loads.append({"step": step, "counts": counts})
    config = {
        "run_dir": str(folder), "seed": seed, "optim": {"lr": lr}, "train": {"steps": steps, "tokens": None},
        "model": {"num_nextn_predict_layers": 1, "first_k_dense_replace": 1, "n_routed_experts": EXPERTS},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    log = EventLog(folder)
    log.add("start", 0, "8 processes on cuda, fresh start")
    log.add("save", steps // 2, f"checkpoints/step-{steps // 2:08d}")
    log.add("skip", steps * 2 // 3, "gradient norm not finite")
    log.add("rewind", steps // 2, "loss spike <b>of 9 sigma</b>")
    log.add("restart", steps // 2, "node-17 lost")
    log.add("done", steps, "the run reached its end")
    return folder
