"""A DeepSeek-V3 folder as the name table sees it, however it is spelled.

Read are BF16, FP16, FP32 and block-wise FP8 (the scale may lie in another file), one tensor an expert or all of a layer
in one (``mlp.experts.gate_up_proj`` [E, 2m, D], as transformers 5 holds them), router biases of any float format, and
any number of MTP layers: the tensors say how many there are, because ``save_pretrained`` drops them and goes on writing
``num_nextn_predict_layers: 1``. Everything is compared with the architecture's list before the first value is read.
"""

import re
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepv3.config.schema import ModelConfig
from deepv3.errors import CheckpointError
from deepv3.export import files, fp8
from deepv3.export.foreign import read_config
from deepv3.export.shards import INDEX, SINGLE
from deepv3.export.table import Entry, entries, share
from deepv3.model.transformer import Transformer

STRAY = re.compile(r".*rotary_emb\.inv_freq")  # derived values that old checkpoints carry
LAYER = re.compile(r"model\.layers\.(\d+)\.")
PLAIN = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Folder:
    """The tensors of the model in `path`. cfg: its architecture; entries: the rows of the name table that it holds.

    whole: every MTP tensor of config.json and both copies must be there, as in our exports; else MTP layers and copies
    may be absent. Raises CheckpointError for another architecture, and for tensors that are missing, extra, of another
    shape or of a format that is not read.
    """

    def __init__(self, path: str | Path, whole: bool = False):
        self.path = Path(path)
        self._handles: dict[Path, Any] = {}
        hf = files.read_json(self.path / "config.json")
        cfg = read_config(hf)
        _require_blocks(self.path, hf)
        self._where = {name: file for name, file in self._files().items() if not STRAY.fullmatch(name)}
        self.cfg = cfg if whole else replace(cfg, num_nextn_predict_layers=self._depth(cfg))
        state = Transformer(self.cfg, device="meta", dtype=torch.float32).state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        listed = entries(self.shapes, self.cfg.num_hidden_layers)
        self.entries = [entry for entry in listed if whole or not entry.copy or entry.name in self._where]
        self._check()

    def read(self, entry: Entry) -> Tensor:
        """Their tensor in FP32 on the host; FP8 comes out as the values it stands for."""
        stored, expert = self._stored(entry)
        index = slice(None) if expert is None else expert
        tensor = self._slice(stored)[index]
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = fp8.dequantise_blocks(tensor, self._slice(stored + fp8.SCALE_SUFFIX)[index].float())
        return (tensor if expert is None else share(tensor, entry)).float()

    @cached_property
    def fused(self) -> bool:
        """Whether a layer's experts are one tensor."""
        return any(name.endswith("mlp.experts.gate_up_proj") for name in self._where)

    # -- what there is -----------------------------------------------------------------------------------------------

    def _files(self) -> dict[str, Path]:
        """The file of every tensor, from the index or the single file."""
        if not (self.path / INDEX).exists():
            return dict.fromkeys(self._open(self.path / SINGLE).keys(), self.path / SINGLE)
        weight_map = files.read_json(self.path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{self.path / INDEX}: has no weight_map")
        return {name: self.path / file for name, file in weight_map.items()}

    def _depth(self, cfg: ModelConfig) -> int:
        layers = [int(found[1]) for name in self._where if (found := LAYER.match(name))]
        return max(0, max(layers, default=0) + 1 - cfg.num_hidden_layers)

    def _stored(self, entry: Entry) -> tuple[str, int | None]:
        """The name under which `entry` is stored, and its index there where experts are fused."""
        if entry.expert is None or not self.fused:
            return entry.name, None
        prefix, own = entry.name.split("mlp.experts.")[0], entry.ours.split("mlp.experts.")[1]
        return f"{prefix}mlp.experts.{own.removesuffix('.weight')}", entry.expert

    def _check(self) -> None:
        """Compare names, shapes and formats with the table; nothing but the files' headers is read."""
        claimed, missing = set(), []
        for entry in self.entries:
            stored, expert = self._stored(entry)
            if stored not in self._where:
                missing.append(stored)
                continue
            claimed.add(stored)
            found, dtype = self._slice(stored).get_shape(), self._slice(stored).get_dtype()
            rows, *rest = entry.shape
            wanted = [*entry.shape] if expert is None else [self.shapes[entry.ours][0], rows * entry.parts, *rest]
            if found != wanted:
                raise CheckpointError(f"{self.path}: {stored} is {found}, config.json asks for {wanted}")
            if dtype == "F8_E4M3":
                claimed.add(self._check_scale(stored, found))
            elif dtype not in PLAIN:
                raise CheckpointError(
                    f"{self.path}: {stored} is stored as {dtype}; read are {', '.join(PLAIN)} and F8_E4M3 in blocks"
                )
        self._report(list(dict.fromkeys(missing)), sorted(self._where.keys() - claimed))

    def _check_scale(self, stored: str, shape: list[int]) -> str:
        scale = stored + fp8.SCALE_SUFFIX
        if scale not in self._where:
            raise CheckpointError(f"{self.path}: {stored} is FP8, but its scale {scale} is missing")
        wanted = [*shape[:-2], *(-(-size // fp8.BLOCK) for size in shape[-2:])]
        if (found := self._slice(scale).get_shape()) != wanted:
            raise CheckpointError(
                f"{self.path}: {scale} is {found}, blocks of {fp8.BLOCK} x {fp8.BLOCK} ask for {wanted}"
            )
        return scale

    def _report(self, missing: list[str], extra: list[str]) -> None:
        if missing:
            raise CheckpointError(
                f"{self.path}: tensor {missing[0]} is missing"
                + (f", and {len(missing) - 1} others of this architecture" if len(missing) > 1 else "")
            )
        if extra:
            raise CheckpointError(f"{self.path}: {len(extra)} tensors are not this model's, the first is {extra[0]}")

    # -- files -------------------------------------------------------------------------------------------------------

    def _slice(self, name: str):
        file = self._open(self._where[name])
        try:
            return file.get_slice(name)
        except SafetensorError:
            raise CheckpointError(f"{self._where[name]}: has no tensor {name}, which {INDEX} puts there") from None

    def _open(self, path: Path):
        """A file mapped for reading, kept open."""
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(path, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read: {error}") from None
        return self._handles[path]


def _require_blocks(path: Path, hf: dict[str, Any]) -> None:
    """Raise CheckpointError for a quantisation that is not DeepSeek's."""
    settings = hf.get("quantization_config")
    if settings is None:
        return
    found = settings.get("quant_method"), settings.get("weight_block_size")
    if found != ("fp8", [fp8.BLOCK, fp8.BLOCK]):
        raise CheckpointError(
            f"{path}: quantised as {found[0]!r} with weight_block_size {found[1]}; read are unquantised weights and "
            f"'fp8' in blocks of {fp8.BLOCK} x {fp8.BLOCK}"
        )
