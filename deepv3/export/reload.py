"""An export in the hands of transformers, whichever release is installed: what it loads, computes and goes on with."""

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepv3.config.schema import ModelConfig
from deepv3.errors import CheckpointError
from deepv3.export.folder import Folder

SERIAL = "HF_DEACTIVATE_ASYNC_LOAD"
TEXT = "def main():\n    return 'naïve', 12345  # 深度 🙂\n\n\tThe end.\r\n"


class Theirs(NamedTuple):
    """What transformers computes. logits: [B, S, V] of the sample; continued: [B, S + new], its greedy continuation."""

    logits: Tensor
    continued: Tensor
    ids: list[int]


def run_transformers(folder: Path, cfg: ModelConfig, dtype: str, tokens: Tensor, new_tokens: int) -> Theirs:
    """Load with transformers, check the keys, run. Imported here: transformers takes seconds to import."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM

    auto: Any = AutoModelForCausalLM  # its return type leaves out the loading info
    own: Any = DeepseekV3ForCausalLM
    how: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    with _quiet(), _one_by_one():
        if dtype == "float8":
            model, info = own.from_pretrained(None, **how, **_dequantised(folder))
        else:
            model, info = auto.from_pretrained(folder, **how)
    check_keys(folder, cfg, info)
    model.generation_config.eos_token_id = None  # every row runs to its end
    with torch.no_grad(), _quiet():
        mask = torch.ones_like(tokens)
        continued = model.generate(
            tokens, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
        )
        logits = model(tokens).logits
    return Theirs(logits, continued, AutoTokenizer.from_pretrained(folder)(TEXT).input_ids)


def _dequantised(folder: Path) -> dict[str, Any]:
    """Arguments of from_pretrained that give it the values of an FP8 export, by their names in the files.

    Its own FP8 reader needs a GPU or the accelerate library, and dequantises wrongly or not at all where a matrix ends
    inside a block, as V3's kv_a does.
    """
    from transformers import AutoConfig

    opened, config = Folder(folder, whole=True), AutoConfig.from_pretrained(folder)
    del config.quantization_config
    main = [entry for entry in opened.entries if entry.layer < opened.cfg.num_hidden_layers]
    return {"config": config, "state_dict": {entry.name: opened.read(entry) for entry in main}}


def check_keys(folder: Path, cfg: ModelConfig, info: dict) -> None:
    """Raise CheckpointError unless transformers' loading info has nothing missing and only MTP layers unexpected."""
    layers = range(cfg.num_hidden_layers, cfg.num_hidden_layers + cfg.num_nextn_predict_layers)
    mtp = tuple(f"model.layers.{layer}." for layer in layers)
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith(mtp)]
    for kind, keys in (("missing", info["missing_keys"]), ("mismatched", info["mismatched_keys"])):
        if keys:
            raise CheckpointError(f"{folder}: transformers reports {kind} tensors: {sorted(map(str, keys))[:5]}")
    if unexpected:
        raise CheckpointError(f"{folder}: transformers reports unexpected tensors: {sorted(unexpected)[:5]}")


@contextmanager
def _one_by_one():
    """Let transformers 5 read a tensor when it needs it; else threads read ahead and a second model is in memory."""
    before = os.environ.get(SERIAL)
    os.environ[SERIAL] = "1"
    try:
        yield
    finally:
        os.environ.pop(SERIAL)
        if before is not None:
            os.environ[SERIAL] = before


@contextmanager
def _quiet():
    """Silence transformers' progress bars and its load report, which lists the MTP layers as unexpected."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
