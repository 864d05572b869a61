"""Writes a checkpoint as a Hugging Face folder that every reader of DeepSeek-V3 takes, and reads it back.

Method: one pass over the name table (table.py), streaming: read one tensor of ours (one expert of a stacked one) from
the checkpoint's fragments, make it portable, cut it, encode it, write it at its planned place. Host memory holds one
such tensor. The folder appears whole or not at all (staging.py).

Portable means that readers which know nothing of our training-only factors compute the same numbers: the factors on
the latents go into the gains of their norms, the one on the attention output into o_proj, and router biases are shifted
so that a layer's smallest is 0. A common shift changes no choice where closed groups are masked with -inf, but
transformers 4 masks them with 0, and a negative bias would let it choose closed experts.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepv3 import arithmetic
from deepv3.config.schema import ModelConfig
from deepv3.data.tokenizer import save_tokenizer
from deepv3.errors import ConfigError
from deepv3.export import card, files, fp8, shards
from deepv3.export.progress import progress_bar
from deepv3.export.source import Source
from deepv3.export.staging import check_output, staged
from deepv3.export.table import BIAS_SUFFIX, Entry, entries, share

DTYPES = {"bfloat16": torch.bfloat16, "float8": torch.bfloat16, "float32": torch.float32}  # float8: what fp8.py keeps
FOLDED = {
    "self_attn.q_a_layernorm.weight": "latent_scale_q",
    "self_attn.kv_a_layernorm.weight": "latent_scale_kv",
    "self_attn.o_proj.weight": "attn_out_scale",
}


def export(
    source: str | Path,
    output: str | Path,
    dtype: str = "bfloat16",
    ema: bool = False,
    shard_bytes: int = shards.SHARD_BYTES,
) -> Path:
    """Write the checkpoint `source` (or the newest complete one of the run folder `source`) to the folder `output`.

    dtype: bfloat16 | float8 (fp8.py) | float32, rounded from the FP32 master weights; router biases stay FP32. ema:
    write the averaged weights instead. shard_bytes: largest file. Returns output.

    Raises ConfigError for a dtype, an output or an architecture that cannot be exported, CheckpointError for an
    incomplete or damaged checkpoint (naming the file), ResourceError where the disk does not suffice.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype} cannot be written; dtype is one of {', '.join(DTYPES)}")
    output = Path(output).resolve()
    check_output(output)
    checkpoint = Source(source, ema)
    tokenizer = checkpoint.tokenizer
    config = files.hf_config(checkpoint.cfg.model, dtype, tokenizer.bos, tokenizer.eos)
    generation = files.generation_config(tokenizer.bos, tokenizer.eos, tokenizer.pad)
    plan = shards.plan(units(checkpoint.shapes, checkpoint.cfg.model, dtype), shard_bytes)
    nbytes = sum(unit.nbytes for _, group in plan for unit in group)
    with staged(output, nbytes) as folder:
        _write_shards(folder, plan, checkpoint, dtype, nbytes)
        shards.write_index(folder, plan)
        files.write_json(folder / "config.json", config)
        files.write_json(folder / "generation_config.json", generation)
        save_tokenizer(tokenizer, folder, config["max_position_embeddings"])
        _write_card(folder, output.name, checkpoint, dtype)
        _write_marker(folder, checkpoint, dtype)
    return output


def units(shapes: Mapping[str, tuple[int, ...]], cfg: ModelConfig, dtype: str) -> Iterator[shards.Unit]:
    """What is written, in order: each one tensor or one expert's matrices, with the stored form as meta tensors."""
    group: list[Entry] = []
    for entry in entries(shapes, cfg.num_hidden_layers):
        together = (
            group and entry.expert is not None and (entry.layer, entry.expert) == (group[0].layer, group[0].expert)
        )
        if group and not together:
            yield _unit(group, cfg, dtype)
            group = []
        group.append(entry)
    yield _unit(group, cfg, dtype)


def _unit(group: list[Entry], cfg: ModelConfig, dtype: str) -> shards.Unit:
    stored: dict[str, Tensor] = {}
    for entry in group:
        stored |= planned(entry.name, entry.shape, dtype)
    return shards.Unit(tuple(group), group[0].layer, group[0].layer >= cfg.num_hidden_layers, stored)


def planned(name: str, shape: tuple[int, ...], dtype: str) -> dict[str, Tensor]:
    """Dtype and shape of what `encode` makes of their tensor `name`, as meta tensors by name."""
    if dtype == "float8" and fp8.is_quantised(name, shape):
        grid = tuple(-(-size // fp8.BLOCK) for size in shape)
        stored = {name: (shape, torch.float8_e4m3fn), name + fp8.SCALE_SUFFIX: (grid, torch.float32)}
    else:
        stored = {name: (shape, torch.float32 if name.endswith(BIAS_SUFFIX) else DTYPES[dtype])}
    return {key: torch.empty(size, dtype=kind, device="meta") for key, (size, kind) in stored.items()}


def encode(name: str, tensor: Tensor, dtype: str) -> dict[str, Tensor]:
    """The stored form of their FP32 tensor `name`: stored tensors by name."""
    if dtype == "float8" and fp8.is_quantised(name, tensor.shape):
        codes, scales = fp8.quantise(tensor)
        return {name: codes, name + fp8.SCALE_SUFFIX: scales}
    return {name: tensor if name.endswith(BIAS_SUFFIX) else tensor.to(DTYPES[dtype])}


def decode(name: str, stored: Mapping[str, Tensor]) -> Tensor:
    """The FP32 values that `encode` kept of tensor `name`."""
    scale = stored.get(name + fp8.SCALE_SUFFIX)
    return stored[name].float() if scale is None else fp8.dequantise_blocks(stored[name], scale)


def portable(name: str, tensor: Tensor, cfg: ModelConfig) -> Tensor:
    """Our FP32 tensor `name` as a reader without our training-only factors must hold it."""
    if name.endswith(BIAS_SUFFIX):
        return tensor - tensor.min()
    factor = fold_factor(name, cfg)
    return tensor if factor == 1.0 else tensor * factor


def fold_factor(name: str, cfg: ModelConfig) -> float:
    """The training-only factor that belongs into our tensor `name`; 1 for most."""
    return next((getattr(cfg, field) for suffix, field in FOLDED.items() if name.endswith(suffix)), 1.0)


def _write_shards(folder: Path, plan, checkpoint: Source, dtype: str, nbytes: int) -> None:
    cfg = checkpoint.cfg.model
    with progress_bar() as bar:
        task = bar.add_task(f"export {dtype}", total=nbytes)
        for name, group in plan:
            with shards.ShardFile(folder / name, {n: t for unit in group for n, t in unit.tensors.items()}) as file:
                for unit in group:
                    for stored, tensor in _unit_tensors(unit, checkpoint, cfg, dtype):
                        file.put(stored, tensor)
                        bar.advance(task, tensor.nbytes)


def _unit_tensors(unit: shards.Unit, checkpoint: Source, cfg: ModelConfig, dtype: str) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors of one unit; a tensor of ours that becomes several of theirs is read once."""
    read: tuple[str, Tensor] | None = None
    for entry in unit.entries:
        if read is None or read[0] != entry.ours:
            read = entry.ours, portable(entry.ours, checkpoint.read(entry.ours, entry.expert), cfg)
        yield from encode(entry.name, share(read[1], entry), dtype).items()


def _write_card(folder: Path, title: str, checkpoint: Source, dtype: str) -> None:
    cfg = checkpoint.cfg.model
    count = arithmetic.parameters(cfg)
    about: dict[str, Any] = {
        "training_step": checkpoint.step,
        "training_tokens": checkpoint.tokens,
        "parameters": count.total,
    }
    about |= {"active_parameters": count.active, "MTP_parameters": count.mtp, "dtype": dtype}
    about["weights"] = "exponential moving average" if checkpoint.ema else "last step"
    figures = card.run_figures(checkpoint.run_dir, checkpoint.step)
    files.write_text(folder / "README.md", card.model_card(title, cfg, about, figures))


def _write_marker(folder: Path, checkpoint: Source, dtype: str) -> None:
    """Names every file we wrote, so that replacing an export never deletes a file of somebody else."""
    names = sorted({path.name for path in folder.iterdir()} | {files.MARKER})
    marker = {"step": checkpoint.step, "dtype": dtype, "ema": checkpoint.ema, "files": names}
    files.write_json(folder / files.MARKER, marker)
