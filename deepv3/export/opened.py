"""A model ready to compute, from whatever ``source=PATH`` names: a checkpoint, a run folder or an export.

Weights are read tensor by tensor into the format and onto the device they are used in; what is used in training only
(forced balance) is off.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from deepv3 import arithmetic
from deepv3.checkpoint.manifest import NAME as MANIFEST
from deepv3.config.schema import Config, ModelConfig
from deepv3.data.tokenizer import Tokenizer, read_tokenizer
from deepv3.errors import CheckpointError, ConfigError, ResourceError
from deepv3.export.load import load_export
from deepv3.export.source import FOLDER, Source
from deepv3.model.transformer import DTYPES, Transformer

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Opened:
    """What a source holds. cfg: the config it was trained with; an export tells the architecture only."""

    model: Transformer
    tokenizer: Tokenizer
    cfg: Config
    label: str


def open_source(source: str, ema: bool, device: str, dtype: str) -> Opened:
    """device: auto, cpu, cuda ...; dtype: auto (as trained; float32 for an export), float32 or bfloat16.

    Raises CheckpointError, ConfigError or ResourceError, naming the argument that mends it.
    """
    if dtype not in ("auto", *FORMATS):
        raise ConfigError(f"dtype = {dtype!r} is none of auto, {', '.join(FORMATS)}")
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else _device(device)
    path, kind = Path(source), _kind(Path(source))
    if kind == "export":
        if ema:
            raise ConfigError(f"ema = true, but source={source} is an export, which holds one set of weights")
        model = load_export(path)
        format = FORMATS.get(dtype, torch.float32)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(where, format)
        return Opened(model.to(where), read_tokenizer(path), Config(model=model.cfg), f"export {path}")
    stored = Source(path, ema)
    cfg = replace(stored.cfg.model, force_balance=False)
    format = FORMATS.get(dtype, DTYPES[stored.cfg.precision.name])
    _require_memory(cfg, where, format)
    model = Transformer(cfg, device=where, dtype=format)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(stored.read(name, None))
    run = replace(stored.cfg, model=cfg, run_dir=str(stored.run_dir))
    return Opened(model.eval(), stored.tokenizer, run, f"{'average of ' if ema else ''}{stored.path}")


def _kind(path: Path) -> str:
    """export or checkpoint (a run folder is one's place); raises CheckpointError for anything else."""
    if (path / FOLDER).is_dir() or (path / MANIFEST).is_file():
        return "checkpoint"
    if (path / "config.json").is_file():
        return "export"
    held = ", ".join(sorted(p.name for p in path.iterdir())[:5]) if path.is_dir() else "it does not exist"
    raise CheckpointError(
        f"source={path} is no run folder (no {FOLDER}/), no checkpoint (no {MANIFEST}) and no export (no config.json): "
        f"{held or 'it is empty'}; give source=PATH of one of the three"
    )


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ConfigError(f"device = {name!r} cannot be used here: {str(error).splitlines()[0]}") from None


def _require_memory(cfg: ModelConfig, device: torch.device, format: torch.dtype) -> None:
    needed = arithmetic.parameters(cfg).stored * format.itemsize
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
        free = int(meminfo.split("MemAvailable:")[1].split()[0]) << 10
    if needed > free:
        raise ResourceError(
            f"the weights take {needed / 2**30:.1f} GiB as {format}, {device} has {free / 2**30:.1f} GiB free; "
            "take a larger device, or dtype=bfloat16"
        )
