"""A model ready to compute, from whatever ``source=PATH`` names: a checkpoint, a run folder or a Hugging Face folder.

Config and tokenizer are read at once, so that a request can be refused before the weights are; `load` then reads those
tensor by tensor into the format and onto the device they are used in. What is used in training only (forced balance)
is off.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from deepv3 import arithmetic
from deepv3.checkpoint.find import FOLDER
from deepv3.checkpoint.manifest import NAME as MANIFEST
from deepv3.config.schema import Config, ModelConfig
from deepv3.data.tokenizer import Tokenizer, read_tokenizer
from deepv3.errors import CheckpointError, ConfigError, ResourceError
from deepv3.export import files
from deepv3.export.folder import Folder
from deepv3.export.load import check_copies
from deepv3.export.source import Source
from deepv3.export.table import share
from deepv3.model.transformer import DTYPES, Transformer

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Opened:
    """cfg: the run's config, its run_dir where the source lies; of a Hugging Face folder the architecture alone, with
    data.seq_len its whole reach.

    trained: whether the source is a checkpoint, which knows its data. load: the model in evaluation mode.
    """

    cfg: Config
    tokenizer: Tokenizer
    label: str
    trained: bool
    load: Callable[[], Transformer]


def open_source(source: str | Path, ema: bool = False, device: str = "auto", dtype: str = "auto") -> Opened:
    """device: auto (CUDA where there is one), cpu, cuda:1 ...; dtype: auto (as trained or stored), float32, bfloat16.

    Raises CheckpointError, ConfigError or ResourceError, naming the argument that mends it.
    """
    if dtype not in ("auto", *FORMATS):
        raise ConfigError(f"dtype = {dtype!r} is none of auto, {', '.join(FORMATS)}")
    path, where = Path(source), _device(device)
    if _is_checkpoint(path):
        return _from_checkpoint(Source(path, ema), where, FORMATS.get(dtype))
    if ema:
        raise ConfigError(
            f"ema = true, but source={source} is no checkpoint and holds one set of weights; set ema=false"
        )
    return _from_folder(path, where, FORMATS.get(dtype))


def _from_checkpoint(stored: Source, device: torch.device, format: torch.dtype | None) -> Opened:
    cfg = replace(stored.cfg.model, force_balance=False)
    format = format or DTYPES[stored.cfg.precision.name]
    _require_memory(cfg, device, format)

    def load() -> Transformer:
        model = Transformer(cfg, device=device, dtype=format)
        for name, tensor in model.state_dict().items():
            tensor.copy_(stored.read(name, None))
        return model.eval()

    run = replace(stored.cfg, model=cfg, run_dir=str(stored.run_dir))
    return Opened(run, stored.tokenizer, f"{'average of ' if stored.ema else ''}{stored.path}", True, load)


def _from_folder(path: Path, device: torch.device, format: torch.dtype | None) -> Opened:
    folder, hf = Folder(path), files.read_json(path / "config.json")
    told = hf.get("torch_dtype", hf.get("dtype"))  # transformers 4 and 5
    kind = format or FORMATS.get(str(told), torch.float32)
    _require_memory(folder.cfg, device, kind)

    def load() -> Transformer:
        model = Transformer(folder.cfg, device=device, dtype=kind)
        state = model.state_dict()

        def read(entry) -> Tensor:
            return folder.read(entry).to(device, state[entry.ours].dtype)

        for entry in folder.entries:
            if not entry.copy:
                whole = state[entry.ours]
                share(whole if entry.expert is None else whole[entry.expert], entry).copy_(read(entry))
        check_copies(folder.entries, read, lambda name: state[name])
        return model.eval()

    cfg = Config(model=folder.cfg)
    cfg.data.seq_len = folder.cfg.max_position_embeddings
    return Opened(cfg, read_tokenizer(path), f"export {path}", False, load)


def _is_checkpoint(path: Path) -> bool:
    """Whether it is a checkpoint or a run's folder; raises CheckpointError where it is not an export either."""
    if (path / FOLDER).is_dir() or (path / MANIFEST).is_file():
        return True
    if (path / "config.json").is_file():
        return False
    held = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing" if path.is_dir() else "it is no folder"
    raise CheckpointError(
        f"source={path} is no run folder (no {FOLDER}/), no checkpoint (no {MANIFEST}) and no export (no config.json), "
        f"but: {held}; give source=PATH of one of the three"
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
            f"the weights take {needed / 2**30:.1f} GiB as {format}, {device} has {free / 2**30:.1f} GiB free; take a "
            "device with more memory, or dtype=bfloat16"
        )
