"""What follows a run, by train.finish: a sampled continuation, the export, its verification; each done once per run.

``run_dir/finished.json`` names what was done for which step, so that starting a finished run again changes nothing and
a run killed between training and export goes on where it stopped.
"""

import json
from pathlib import Path

import torch

from deepv3.config.schema import Config
from deepv3.data.tokenizer import read_tokenizer
from deepv3.export.hf import export
from deepv3.export.opened import open_source
from deepv3.export.verify import verify
from deepv3.generate.sample import generate
from deepv3.model.transformer import Transformer

EXPORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp8": "bfloat16"}


class Ledger:
    """finished.json: {"step": n, "done": [names]}; a run that went on since starts a new ledger."""

    def __init__(self, run_dir: Path, step: int):
        self.path = run_dir / "finished.json"
        self.step = step
        old = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        self.done: list[str] = old.get("done", []) if old.get("step") == step else []

    def add(self, name: str) -> None:
        """Note that `name` is done."""
        self.done.append(name)
        beside = self.path.with_name("." + self.path.name)
        beside.write_text(json.dumps({"step": self.step, "done": self.done}), encoding="utf-8")
        beside.replace(self.path)


def sample_text(cfg: Config, model: Transformer) -> str:
    """The prompt and its greedy continuation, as text."""
    if not model.whole:  # this rank has a part of it; the newest checkpoint has all
        model = open_source(cfg.run_dir).load()
    tokenizer = read_tokenizer(Path(cfg.run_dir) / "tokenizer")
    device = next(model.parameters()).device
    ids = torch.tensor([tokenizer.encode(cfg.train.prompt)], device=device)
    out = generate(model, ids, max_new_tokens=cfg.train.sample_tokens)
    return tokenizer.decode(out[0].tolist())


def finish(cfg: Config, model: Transformer, step: int, say) -> None:
    """Carry out train.finish on rank 0. say: takes a line for the user."""
    run_dir = Path(cfg.run_dir)
    ledger = Ledger(run_dir, step)
    for name in cfg.train.finish:
        if name in ledger.done:
            continue
        if name == "sample":
            text = sample_text(cfg, model)
            (run_dir / "sample.txt").write_text(text, encoding="utf-8")
            say(f"sample of {cfg.train.sample_tokens} tokens (run_dir/sample.txt):\n{text}\n")
        elif name == "export":
            export(run_dir, run_dir / "export", EXPORT_DTYPES[cfg.precision.name])
        elif name == "verify":
            say(verify(run_dir / "export", run_dir)["summary"])
        ledger.add(name)
