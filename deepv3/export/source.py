"""What an export reads: one complete checkpoint, the run it belongs to, and the run's tokenizer."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from deepv3.checkpoint.find import FOLDER, newest, problems
from deepv3.checkpoint.reader import Reader
from deepv3.config.schema import Config, ModelConfig
from deepv3.config.typed import build
from deepv3.data.tokenizer import Tokenizer, read_tokenizer
from deepv3.dist import Grid
from deepv3.errors import CheckpointError, ConfigError
from deepv3.model.transformer import Transformer

TOKENIZER = "tokenizer"  # folder of a run


class Source:
    """A checkpoint folder, or the newest complete checkpoint of a run folder.

    ema: read the averaged weights. step, tokens: where training stood. shapes: every tensor of our state, parameters
    and router biases. Raises CheckpointError, naming the file, for an incomplete or damaged checkpoint or one without
    the average that is asked for.
    """

    def __init__(self, source: str | Path, ema: bool = False):
        self.path = find(Path(source))
        self.run_dir = self.path.resolve().parent.parent
        damaged = problems(self.path, Grid(1, 0))
        if damaged:
            raise CheckpointError("; ".join(damaged))
        self._reader = Reader(self.path)
        manifest = self._reader.manifest
        try:
            self.cfg = build(Config, manifest.config)
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: made by another version: {error}") from None
        self.ema, self._kind = ema, "ema" if ema else "master"
        if self._kind not in manifest.kinds:
            raise CheckpointError(
                f"{self.path} holds no averaged weights: the run had optim.ema_decay=0; use ema=false"
            )
        self.step: int = manifest.step
        self.tokens: int | None = manifest.clients[0].get("progress", {}).get("tokens")
        self._buffers = {name: self._reader.buffer(name) for name in self._reader.buffers}
        self.shapes = self._reader.shapes | {name: tuple(t.shape) for name, t in self._buffers.items()}
        _require_whole(self.path, self.shapes, self.cfg.model)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The one the run trained with. Raises CheckpointError where it is missing or too large for the model."""
        folder, rows = self.run_dir / TOKENIZER, self.cfg.model.vocab_size
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: missing; give a checkpoint that lies in its run folder, which holds it")
        tokenizer = read_tokenizer(folder)
        if tokenizer.size > rows:
            raise CheckpointError(f"{folder} has ids for {tokenizer.size} rows, but model.vocab_size = {rows}")
        return tokenizer

    def read(self, name: str, expert: int | None) -> Tensor:
        """Our tensor `name`, or one expert's entry of it, in FP32 on the host."""
        if name in self._buffers:
            return self._buffers[name].float()
        return self._reader.read(name, self._kind, expert)


def _require_whole(path: Path, shapes: Mapping[str, tuple[int, ...]], cfg: ModelConfig) -> None:
    """Raise CheckpointError unless the checkpoint holds exactly the tensors that its own config's model has."""
    state = Transformer(cfg, device="meta", dtype=torch.float32).state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = [name for name in sorted(wanted.keys() | shapes.keys()) if wanted.get(name) != shapes.get(name)]
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} tensors are not as its config says; {wrong[0]} is "
            f"{shapes.get(wrong[0], 'missing')}, the model has {wanted.get(wrong[0], 'no such tensor')}"
        )


def find(source: Path) -> Path:
    """The checkpoint that `source` names: itself, or a run's newest complete one."""
    if not source.is_dir():
        raise CheckpointError(f"source={source} is no folder; give a run folder or a checkpoint")
    if not (source / FOLDER).is_dir():
        return source
    path = newest(source)
    if path is None:
        raise CheckpointError(f"source={source}: its {FOLDER} folder holds no checkpoint yet")
    return path
