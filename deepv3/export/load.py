"""Reads a DeepSeek-V3 folder back into our model: the name table backwards.

Each tensor of theirs is copied into the part of ours that it is; what is missing, extra or of another shape is an error
that names it. The MTP copies of embedding and head must equal the originals, then the one shared tensor serves both.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from deepv3.config.schema import ModelConfig
from deepv3.errors import CheckpointError
from deepv3.export.folder import Folder
from deepv3.export.table import Entry, entries, share
from deepv3.model.transformer import Transformer


def load_export(folder: str | Path) -> Transformer:
    """Our model, in FP32 on the CPU, holding the values of the export in `folder`, FP8 ones dequantised.

    Training-only factors are 1: they are folded into the exported weights. Raises CheckpointError for a file or tensor
    that is missing, damaged, of another shape or not in the table.
    """
    opened = Folder(folder, whole=True)
    return filled(opened.cfg, opened.read)


def filled(cfg: ModelConfig, value: Callable[[Entry], Tensor]) -> Transformer:
    """A model of `cfg`, in FP32 on the CPU, whose tensors are put together from `value` of every entry of the table.

    Raises CheckpointError where a copy differs from its original.
    """
    model = Transformer(cfg, device=torch.device("cpu"), dtype=torch.float32)
    state = model.state_dict()
    listed = entries({name: tuple(t.shape) for name, t in state.items()}, cfg.num_hidden_layers)
    with torch.no_grad():
        for entry in listed:
            if not entry.copy:
                whole = state[entry.ours]
                share(whole if entry.expert is None else whole[entry.expert], entry).copy_(value(entry))
    check_copies(listed, value, lambda name: state[name])
    return model.eval()


def check_copies(listed: Iterable[Entry], value: Callable[[Entry], Tensor], original: Callable[[str], Tensor]) -> None:
    """Raise CheckpointError where a copy (of embedding or head, in an MTP layer) differs from our tensor."""
    for entry in listed:
        if entry.copy and not torch.equal(original(entry.ours), value(entry)):
            raise CheckpointError(f"{entry.name} differs from {entry.ours}, of which it is a copy")
