"""Measures training speed: ours and TorchTitan's on the same machine in one run, and a profile of where our time goes.

Both sides: `mini` (5.2 B), sequence 4096, local batch 2, BF16, balanced routing forced, no MTP, no checkpoint. Rounds
alternate between the sides; figures are medians over the steps after the warm-up, with the smallest and the largest.
"""

import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from deepv3.train.kernel_table import kernel_table
from deepv3.train.sweep import torchrun

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
WARMUP_STEPS = 10
LOCAL_BATCH = 2  # sequences per device and optimizer step, on both sides
OURS = (
    "+config=mini", "model.force_balance=true", "model.num_nextn_predict_layers=0", "train.eval_every=0",
    "checkpoint.every=null", "logging.wandb=disabled", "train.finish=[]", f"train.micro_batch_size={LOCAL_BATCH}",
)  # fmt: skip


@dataclass
class Side:
    """What one side did in one round."""

    name: str
    tokens_per_second: list[float] = field(default_factory=list)
    memory_gib: float = 0.0
    startup_seconds: float = 0.0
    failure: str = ""

    def row(self) -> str:
        """A line of the markdown table."""
        if self.failure:
            return f"| {self.name} | failed: {self.failure} | | | |"
        rates = self.tokens_per_second
        spread = f"{min(rates):,.0f} - {max(rates):,.0f}"
        return (
            f"| {self.name} | {statistics.median(rates):,.0f} | {spread} | {self.memory_gib:.1f} "
            f"| {self.startup_seconds:.0f} |"
        )


def run_ours(processes: int, steps: int, run_dir: Path, overrides: list[str], name: str = "deepv3") -> Side:
    """One run of launch/pretrain.py; rates from its metrics.jsonl."""
    length = [f"train.steps={steps}", f"train.global_batch_size={LOCAL_BATCH * processes}", f"run_dir={run_dir}"]
    command = [*torchrun(processes), str(LAUNCH / "pretrain.py"), *OURS, *length]
    began = time.time()
    done = subprocess.run([*command, *overrides], capture_output=True, text=True)
    side = Side(name)
    if done.returncode:
        side.failure = (done.stderr or done.stdout).strip()[-1500:]
        return side
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    side.tokens_per_second = [row["tokens_per_second_per_gpu"] for row in rows[WARMUP_STEPS:]]
    side.memory_gib = max(row["memory_gib"] for row in rows)
    side.startup_seconds = rows[0]["startup_seconds"]
    print(f"{name}: {time.time() - began:.0f} s in all; last row {json.dumps(rows[-1])[:600]}", flush=True)
    return side


def run_torchtitan(processes: int, steps: int, tokenizer: Path) -> Side:
    """One run of TorchTitan 0.2.2 with its fastest settings for this shape (torch.compile, per-operator recompute)."""
    flags = {
        "experimental.custom_import": "peer_torchtitan", "model.name": "deepseek_v3", "model.flavor": "mini",
        "model.hf_assets_path": str(tokenizer), "training.dataset": "long_documents", "training.seq_len": "4096",
        "training.local_batch_size": str(LOCAL_BATCH), "training.steps": str(steps), "lr_scheduler.warmup_steps": "2",
        "metrics.log_freq": "1", "activation_checkpoint.mode": "selective",
        "activation_checkpoint.selective_ac_option": "op",
    }  # fmt: skip
    if processes > 1:
        flags["parallelism.expert_parallel_degree"] = str(processes)
    arguments = [part for key, value in flags.items() for part in (f"--{key}", value)]
    arguments += ["--debug.moe_force_load_balance", "--compile.enable"]
    environment = os.environ | {"PYTHONPATH": f"{LAUNCH}:{os.environ.get('PYTHONPATH', '')}"}
    command = [*torchrun(processes), "--local-ranks-filter", "0", "-m", "torchtitan.train", *arguments]
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    side = Side("TorchTitan 0.2.2")
    log = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    steps_seen = re.findall(r"step:\s*(\d+).*?memory:\s*([\d.]+)GiB.*?tps:\s*([\d,]+)", log)
    if done.returncode or len(steps_seen) <= WARMUP_STEPS:
        side.failure = log.strip()[-1500:]
        return side
    side.tokens_per_second = [float(tps.replace(",", "")) for step, _, tps in steps_seen if int(step) > WARMUP_STEPS]
    side.memory_gib = max(float(memory) for _, memory, _ in steps_seen)
    side.startup_seconds = time.time() - began - sum(8192 / r for r in side.tokens_per_second) * steps / len(steps_seen)
    return side


def compare(processes: int, steps: int, rounds: int, peer: str, tokenizer: Path, overrides: list[str]) -> str:
    """Alternating rounds of both sides; the markdown table. Raises nothing: a failed side is a row that says so."""
    table = [
        "| side | tokens/s/GPU, median | smallest - largest | peak GiB | start to step 1, s |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            label = f"deepv3, round {turn + 1}" + (" (cold caches)" if turn == 0 else "")
            table.append(run_ours(processes, steps, Path(folder) / f"ours{turn}", overrides, label).row())
            if peer == "torchtitan":
                table.append(run_torchtitan(processes, steps, tokenizer).row())
    return "\n".join(table)


# -- profile ----------------------------------------------------------------------------------------------------------


def profile(cfg, steps: int = 2, warmup: int = 4) -> str:
    """Profile `steps` optimizer steps of cfg after `warmup` others on this device."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    from deepv3.train.faults import Votes
    from deepv3.train.loop import Run
    from deepv3.train.step import Plan, train_step

    run = Run(cfg, time.time())
    run.build()

    def one() -> None:
        plan = Plan.of(cfg, run.at)
        batches = run.data.train.micro_batches(run.at.samples, plan.sequences, cfg.train.micro_batch_size)
        train_step(run, plan, batches, Votes.pack(run.grid, False, False, 0.0)).read()
        run.at = plan.after

    for _ in range(warmup):
        one()
    began = time.perf_counter()
    with torch_profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        for _ in range(steps):
            one()
    wall = (time.perf_counter() - began) / steps * 1e3
    run.close()
    return f"wall {wall:.1f} ms per step while profiling\n" + kernel_table(trace.key_averages(), steps)
