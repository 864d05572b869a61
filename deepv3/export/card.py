"""README.md of an export: a model card with the run's own figures."""

import json
from pathlib import Path
from typing import Any

from deepv3.config.schema import ModelConfig

SCALES = ("latent_scale_q", "latent_scale_kv", "attn_out_scale")  # training-only factors, folded into weights by hf.py
CARD = """---
license: other
library_name: transformers
pipeline_tag: text-generation
language:
- en
tags:
- deepseek_v3
- mixture-of-experts
- pretrained
---

# {title}

A base model of the DeepSeek-V3 architecture, pre-trained with deepv3. Set `license` and `language` above to what your
data and weights are before publishing it.

| | |
|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{title}")
model = AutoModelForCausalLM.from_pretrained("{title}")
ids = tokenizer("The", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=32)[0]))
```

{notes}"""
NOTES = {
    "bias": "Router biases are shifted so that each layer's smallest is 0; a common shift leaves the routing as it is, "
    "and readers that mask closed expert groups with 0 need it.",
    "mtp": "The multi-token-prediction modules are the layers after the last main one, in the released layout; "
    "transformers' main model ignores them and may list them as unexpected.",
    "float8": "The matrices of attention and feed-forward are E4M3 with one FP32 scale (`weight_scale_inv`) per "
    "128 x 128 block, quantised from the FP32 master weights; the rest is BF16. transformers reads this format on a "
    "GPU, with the accelerate library.",
    "scales": "Constant factors of training ({scales}) are folded into the norm gains of the latents and the attention "
    "output projections.",
}


def run_figures(run_dir: Path, step: int) -> dict[str, Any]:
    """The training figures of `step` from a run's metrics.jsonl and validation.jsonl; what is not there is left out."""
    row = _row_at(run_dir / "metrics.jsonl", step)
    figures = {name: row[name] for name in ("loss", "loss_main", "loss_mtp", "lr") if row.get(name) is not None}
    validation = _row_at(run_dir / "validation.jsonl", step)
    if validation.get("val_loss") is not None:
        figures["validation_loss"] = validation["val_loss"]
    return figures


def _row_at(path: Path, step: int) -> dict[str, Any]:
    """The row of `step`; a torn line (the run may be alive) is not a row."""
    found: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row.get("step") == step:
            found = row
    return found


def model_card(title: str, cfg: ModelConfig, about: dict[str, Any], figures: dict[str, Any]) -> str:
    """README.md. about: facts of the export (step, tokens, parameters, dtype ...); figures: run_figures."""
    rows = [(name.replace("_", " "), value) for name, value in {**about, **figures}.items()]
    rows += [(name, getattr(cfg, name)) for name in ("num_hidden_layers", "hidden_size", "vocab_size")]
    rows += [
        ("experts", f"{cfg.n_routed_experts} routed, {cfg.num_experts_per_tok} active, {cfg.n_shared_experts} shared")
    ]
    rows += [("MTP modules", cfg.num_nextn_predict_layers), ("context, tokens", cfg.max_position_embeddings)]
    notes = [NOTES["bias"]]
    if cfg.num_nextn_predict_layers:
        notes.append(NOTES["mtp"])
    if about.get("dtype") == "float8":
        notes.append(NOTES["float8"])
    scales = [f"{name} {getattr(cfg, name)}" for name in SCALES if getattr(cfg, name) != 1.0]
    if scales:
        notes.append(NOTES["scales"].format(scales=", ".join(scales)))
    table = "\n".join(f"| {name} | {_shown(value)} |" for name, value in rows)
    return CARD.format(title=title, rows=table, notes="\n".join(f"- {note}" for note in notes) + "\n")


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,d}"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
