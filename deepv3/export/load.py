"""Reads an export back into our model: the name table backwards.

Each tensor of theirs is copied into the part of ours that it is; what is missing, extra or of another shape is an error
that names it. The MTP copies of embedding and head must equal the originals, then the one shared tensor serves both.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepv3.config.schema import ModelConfig
from deepv3.errors import CheckpointError
from deepv3.export import files
from deepv3.export.shards import INDEX, SINGLE
from deepv3.export.table import Entry, entries, share
from deepv3.model.transformer import Transformer


def load_export(folder: str | Path) -> Transformer:
    """Our model, in FP32 on the CPU, holding the values of the export in `folder`.

    Training-only factors are 1: they are folded into the exported weights. Raises CheckpointError for a file or tensor
    that is missing, damaged, of another shape or not in the table.
    """
    folder = Path(folder)
    cfg = files.model_config(files.read_json(folder / "config.json"))
    where = tensor_files(folder)
    with ExitStack() as stack:
        handles = {path: stack.enter_context(_open(path)) for path in sorted(set(where.values()))}

        def stored(entry: Entry) -> Tensor:
            if entry.name not in where:
                raise CheckpointError(f"{folder}: tensor {entry.name} is missing")
            tensor = handles[where.pop(entry.name)].get_tensor(entry.name).float()
            if tensor.shape != entry.shape:
                raise CheckpointError(
                    f"{folder}: {entry.name} is {list(tensor.shape)}, config.json asks for {list(entry.shape)}"
                )
            return tensor

        model = filled(cfg, stored)
    if where:
        raise CheckpointError(f"{folder}: {len(where)} tensors are not this model's, the first is {min(where)}")
    return model


def filled(cfg: ModelConfig, value: Callable[[Entry], Tensor]) -> Transformer:
    """A model of `cfg`, in FP32 on the CPU, whose tensors are put together from `value` of every entry of the table.

    Raises CheckpointError where a copy differs from its original.
    """
    model = Transformer(cfg, device=torch.device("cpu"), dtype=torch.float32)
    state = model.state_dict()
    with torch.no_grad():
        for entry in entries({name: tuple(t.shape) for name, t in state.items()}, cfg.num_hidden_layers):
            whole = state[entry.ours]
            target = share(whole if entry.expert is None else whole[entry.expert], entry)
            tensor = value(entry)
            if not entry.copy:
                target.copy_(tensor)
            elif not torch.equal(target, tensor):
                raise CheckpointError(f"{entry.name} differs from {entry.ours}, of which it is a copy")
    return model.eval()


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor, from the index or the single file."""
    if (folder / INDEX).exists():
        weight_map = files.read_json(folder / INDEX).get("weight_map", {})
        return {name: folder / file for name, file in weight_map.items()}
    with _open(folder / SINGLE) as file:
        return dict.fromkeys(file.keys(), folder / SINGLE)


def _open(path: Path):
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
