"""Reloads an export with transformers and holds it against our own model: an export that changed the model is refused.

1. The keys: nothing missing, nothing unexpected outside the MTP layers (transformers itself only warns about either).
2. The logits, in FP32 on the CPU, on random tokens: transformers on the export (FP8 dequantised) against our model on
   the checkpoint, its weights rounded as the export rounds them, so that only the order of summation differs.
3. MTP, which transformers' main model does not load: our model on the export against our model on the checkpoint.
4. ``generate``: each token that transformers picks greedily is the likeliest for us too, given the tokens before it.
5. Every value in the files against the checkpoint's, because a sample of tokens does not reach every expert.
6. The tokenizer: AutoTokenizer gives the ids that training saw.

Positions whose routing hangs on the last bits of a score are left out of 2 to 4, and counted (ties.py).
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from deepv3 import arithmetic
from deepv3.config.schema import ModelConfig
from deepv3.data.tokenizer import read_tokenizer
from deepv3.errors import CheckpointError, ResourceError
from deepv3.export import files
from deepv3.export.folder import Folder
from deepv3.export.foreign import read_config
from deepv3.export.hf import decode, encode, fold_factor, portable
from deepv3.export.load import filled, load_export
from deepv3.export.reload import TEXT, run_transformers
from deepv3.export.source import Source
from deepv3.export.table import Entry, share
from deepv3.export.ties import logits_and_sure
from deepv3.model.transformer import Transformer

TOLERANCE = 3e-5  # of the largest logit. FP32 noise is up to 1e-5; a mistake in a row order moves logits by more than 1
# Host bytes a parameter at the peak (measured): 4 in FP32, and a layer's experts once more while they are stacked; for
# FP8 also the dequantised values from which transformers loads.
MEMORY = {"bfloat16": 5.2, "float32": 5.2, "float8": 9.0}
SEQUENCES, PROMPT, NEW_TOKENS = 8, 16, 8


def verify(export_dir: str | Path, source: str | Path | None = None) -> dict:
    """Check the export; raise CheckpointError where it does not compute what the checkpoint computes.

    source: the checkpoint or run folder it was made from; None compares with the exported values read back, which
    leaves out 3 and 5. Returns the figures and `summary`, one line for people. Raises ResourceError where host memory
    does not hold the model in FP32, of which there is one at a time.
    """
    folder = Path(export_dir)
    marker = files.read_json(folder / files.MARKER)
    cfg = read_config(files.read_json(folder / "config.json"))
    _require_memory(folder, cfg, marker["dtype"])
    length = min(PROMPT, cfg.max_position_embeddings - NEW_TOKENS)
    tokens = torch.randint(cfg.vocab_size, (SEQUENCES, length), generator=torch.Generator().manual_seed(0))
    theirs = run_transformers(folder, cfg, marker["dtype"], tokens, NEW_TOKENS)
    checkpoint = None if source is None else Source(source, marker["ema"])
    tokenizer = read_tokenizer(folder) if checkpoint is None else checkpoint.tokenizer
    _check_tokenizer(folder, theirs.ids, tokenizer.encode(TEXT))
    model = load_export(folder) if checkpoint is None else checkpoint_model(checkpoint, marker)
    logits, sure = logits_and_sure(model, theirs.continued, mtp=False)
    out = _compare("logits", folder, theirs.logits, logits[:, :length], sure[:, :length])
    _check_greedy(folder, theirs.continued, logits, sure, length)
    if checkpoint is not None:
        mtp, sure = logits_and_sure(model, tokens, mtp=True)
        del model
        reloaded = load_export(folder).logits(tokens, mtp=True)
        if cfg.num_nextn_predict_layers:
            out |= _compare("mtp_logits", folder, reloaded[1:], mtp[1:], sure.expand(mtp.shape[:3])[1:])
        out["tensors"] = _check_values(Folder(folder, whole=True), checkpoint, marker["dtype"])
    return out | {"summary": _summary(folder, marker, out)}


def _require_memory(folder: Path, cfg: ModelConfig, dtype: str) -> None:
    count = arithmetic.parameters(cfg).stored
    needed = MEMORY[dtype] * count
    meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    available = int(meminfo.split("MemAvailable:")[1].split()[0]) << 10
    if needed > available:
        raise ResourceError(
            f"verifying {folder} loads {count:,d} parameters in FP32, which takes {needed / 2**30:.1f} GiB, but this "
            f"host has {available / 2**30:.1f} GiB available; verify on a larger host, or leave verify out"
        )


def checkpoint_model(source: Source, marker: dict) -> Transformer:
    """Our model on the checkpoint, each weight rounded as the export rounds it; biases and factors as in training."""
    if source.step != marker["step"]:
        raise CheckpointError(f"the export is of step {marker['step']}, but {source.path} is of step {source.step}")
    cfg = replace(source.cfg.model, force_balance=False)

    def rounded(entry: Entry) -> Tensor:
        tensor, factor = source.read(entry.ours, entry.expert), fold_factor(entry.ours, cfg)
        return decode(entry.name, encode(entry.name, share(tensor, entry) * factor, marker["dtype"])) / factor

    return filled(cfg, rounded)


def _compare(what: str, folder: Path, theirs: Tensor, ours: Tensor, sure: Tensor) -> dict[str, float]:
    """Largest difference where `sure`; raises CheckpointError beyond TOLERANCE of the largest logit."""
    if not sure.any():
        raise CheckpointError(f"{folder}: no position to compare, routing is a near tie everywhere in the sample")
    largest = ours[sure].abs().max().item()
    difference = (theirs[sure].float() - ours[sure].float()).abs().max().item()
    if not difference <= TOLERANCE * largest:
        raise CheckpointError(
            f"{folder}: {what.replace('_', ' ')} differ from ours by {difference:.3g}, {difference / largest:.2g} of "
            f"the largest ({largest:.3g}); allowed is {TOLERANCE:g}: do not use this export"
        )
    return {
        f"{what}_max_difference": difference,
        f"{what}_relative_difference": difference / largest,
        f"{what}_positions": int(sure.sum()),
        f"{what}_left_out": int((~sure).sum()),
    }


def _check_values(folder: Folder, source: Source, dtype: str) -> int:
    """Raise CheckpointError where a stored tensor is not what `export` makes of the checkpoint; how many there are."""
    read: tuple[tuple[str, int | None], Tensor] | None = None
    for entry in folder.entries:
        if read is None or read[0] != (entry.ours, entry.expert):
            ours = portable(entry.ours, source.read(entry.ours, entry.expert), source.cfg.model)
            read = (entry.ours, entry.expert), ours
        wanted = decode(entry.name, encode(entry.name, share(read[1], entry), dtype))
        if not torch.equal(folder.read(entry), wanted):
            raise CheckpointError(
                f"{folder.path}: {entry.name} is not what {source.path} holds: do not use this export"
            )
    return len(folder.entries)


def _check_greedy(folder: Path, continued: Tensor, logits: Tensor, sure: Tensor, length: int) -> None:
    """Each generated token must be our likeliest, up to the tolerance, given its predecessors."""
    before = logits[:, length - 1 : -1]
    chosen = before.gather(-1, continued[:, length:, None]).squeeze(-1)
    gap = (before.amax(-1) - chosen)[sure[:, length - 1 : -1]]
    if (gap > TOLERANCE * logits.abs().max()).any():
        raise CheckpointError(
            f"{folder}: generate picks tokens {gap.max():.3g} below our likeliest: do not use this export"
        )


def _check_tokenizer(folder: Path, theirs: list[int], ours: list[int]) -> None:
    if theirs != ours:
        raise CheckpointError(f"{folder}: AutoTokenizer gives the ids {theirs[:8]}..., training saw {ours[:8]}...")


def _summary(folder: Path, marker: dict, out: dict[str, float]) -> str:
    parts = [
        f"{what.replace('_', ' ')} differ by at most {out[f'{what}_max_difference']:.2g} "
        f"({out[f'{what}_relative_difference']:.1g} of the largest)"
        for what in ("logits", "mtp_logits")
        if f"{what}_max_difference" in out
    ]
    if "tensors" in out:
        parts.append(f"{out['tensors']:,d} tensors hold the checkpoint's values")
    return (
        f"verified {folder} ({marker['dtype']}, step {marker['step']}) with transformers: nothing missing; "
        f"{'; '.join(parts)}; greedy tokens and tokenizer agree"
    )
