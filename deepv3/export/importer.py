"""A DeepSeek-V3 folder -> a checkpoint of ours to train on from: the name table backwards, streaming.

What is written is a run folder at step 0: one checkpoint with the weights as FP32 masters and moments of zero, the
tokenizer beside it. Every expert is a slice of its own, cut like any other fragment, so every layout reads it; shards
are planned and host memory holds one tensor of ours. The folder appears whole or not at all.

Training-only factors (latent_scale_q, latent_scale_kv, attn_out_scale) are 1 afterwards: an export holds them folded
into the weights. Router biases come in as they are; our own exports have them shifted to a smallest of 0.
"""

import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer as Backend
from torch import Tensor

import deepv3
from deepv3.checkpoint import manifest as manifests
from deepv3.checkpoint import shards
from deepv3.checkpoint.find import FOLDER
from deepv3.checkpoint.manifest import Manifest, Shard
from deepv3.config.compose import config_hash, to_yaml
from deepv3.config.schema import Config, ModelConfig
from deepv3.data.tokenizer import Tokenizer, save_tokenizer
from deepv3.errors import CheckpointError, ConfigError
from deepv3.export import files
from deepv3.export.folder import Folder
from deepv3.export.load import check_copies
from deepv3.export.progress import progress_bar
from deepv3.export.shards import SHARD_BYTES
from deepv3.export.source import TOKENIZER
from deepv3.export.staging import staged
from deepv3.export.table import BIAS_SUFFIX, Entry, share

KINDS = {"master": torch.float32, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}


class Imported(NamedTuple):
    """What an import made. path: the run folder; cfg: its architecture; tokenizer: whether the source had one."""

    path: Path
    cfg: ModelConfig
    tokenizer: bool


class Piece(NamedTuple):
    """A slice of one tensor of ours, or a router bias whole (lo = -1), and the tensors of theirs that it is made of."""

    name: str
    lo: int
    shape: tuple[int, ...]
    entries: tuple[Entry, ...]

    def stored(self) -> list[tuple[str, Tensor]]:
        """What a shard holds of it: keys, and meta tensors for dtype and shape."""
        if self.lo < 0:
            return [(f"buffer/{self.name}", torch.empty(self.shape, device="meta"))]
        size = torch.Size(self.shape).numel()
        kinds = KINDS.items()
        return [(manifests.key(k, self.name, self.lo), torch.empty(size, dtype=t, device="meta")) for k, t in kinds]


def import_hf(source: str | Path, output: str | Path, shard_bytes: int = SHARD_BYTES) -> Imported:
    """Write the DeepSeek-V3 folder `source` as the run folder `output`; ``train.resume=output`` goes on from it.

    shard_bytes: about the largest file. Raises ConfigError where output exists, CheckpointError where source is of
    another architecture, incomplete or damaged, or its tokenizer exceeds the vocabulary, ResourceError where the disk
    does not suffice. All of it is found before anything is written, but damage in the values.
    """
    output = Path(output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"output={output} exists already; an import replaces nothing, name another folder")
    folder = Folder(source)
    tokenizer = _tokenizer(Path(source), folder.cfg)
    check_copies(folder.entries, folder.read, lambda name: _whole(folder, name))
    cfg = Config(run_dir=str(output), model=folder.cfg)
    cfg.data.seq_len = min(cfg.data.seq_len, folder.cfg.max_position_embeddings)
    cfg.data.tokenizer = str(output / TOKENIZER) if tokenizer is not None else None
    plan = _plan(_pieces(folder), shard_bytes)
    with staged(output, sum(file.size for file in (_File(group, folder) for group in plan)), "import") as hidden:
        step = hidden / FOLDER / manifests.folder_name(0)
        step.mkdir(parents=True)
        written = _write_shards(step, plan, folder)
        files.write_text(step / manifests.NAME, _manifest(cfg, folder, written).to_json())
        shards.sync_folder(step)
        shards.sync_folder(step.parent)
        files.write_text(hidden / "config.yaml", to_yaml(cfg))
        if tokenizer is not None:
            save_tokenizer(tokenizer, hidden / TOKENIZER)
    return Imported(output, folder.cfg, tokenizer is not None)


def _whole(folder: Folder, name: str) -> Tensor:
    """Our tensor `name` where it is one of theirs."""
    return folder.read(next(entry for entry in folder.entries if entry.ours == name and not entry.copy))


# -- weights -----------------------------------------------------------------------------------------------------------


def _pieces(folder: Folder) -> list[Piece]:
    grouped: dict[tuple[str, int | None], list[Entry]] = {}
    for entry in folder.entries:
        if not entry.copy:
            grouped.setdefault((entry.ours, entry.expert), []).append(entry)
    out = []
    for (name, expert), group in grouped.items():
        shape = folder.shapes[name] if expert is None else folder.shapes[name][1:]
        lo = -1 if name.endswith(BIAS_SUFFIX) else (expert or 0) * torch.Size(shape).numel()
        out.append(Piece(name, lo, shape, tuple(group)))
    return out


def _plan(pieces: list[Piece], shard_bytes: int) -> list[list[Piece]]:
    """The pieces, in order, in files of about shard_bytes."""
    plan: list[list[Piece]] = [[]]
    room = shard_bytes
    for piece in pieces:
        nbytes = sum(tensor.nbytes for _, tensor in piece.stored())
        if plan[-1] and nbytes > room:
            plan.append([])
            room = shard_bytes
        plan[-1].append(piece)
        room -= nbytes
    return plan


@dataclass
class _File:
    """One shard as a stream (checkpoint/shards.py): a piece is read when its turn comes."""

    pieces: list[Piece]
    folder: Folder

    def __post_init__(self) -> None:
        stored = [pair for piece in self.pieces for pair in piece.stored()]
        self._header = shards.header(stored)
        self.size = len(self._header) + sum(tensor.nbytes for _, tensor in stored)

    def blocks(self) -> Iterator[bytes | memoryview]:
        """The file's content."""
        yield self._header
        for piece in self.pieces:
            for key, planned in piece.stored():
                zero = key.startswith(("exp_avg/", "exp_avg_sq/"))
                yield from _parts(torch.zeros_like(planned, device="cpu") if zero else self._value(piece))

    def _value(self, piece: Piece) -> Tensor:
        whole = torch.empty(piece.shape)
        for entry in piece.entries:
            share(whole, entry).copy_(self.folder.read(entry))
        if not whole.isfinite().all():
            raise CheckpointError(f"{self.folder.path}: {piece.entries[0].name} holds values that are not finite")
        return whole


def _parts(tensor: Tensor) -> Iterator[memoryview]:
    for part in shards.as_bytes(tensor).split(shards.BLOCK):
        yield part.numpy().data


def _write_shards(step: Path, plan: list[list[Piece]], folder: Folder) -> list[Shard]:
    written = []
    sources = [_File(group, folder) for group in plan]
    with progress_bar() as bar:
        task = bar.add_task("import", total=sum(source.size for source in sources))
        for rank, source in enumerate(sources):
            name = f"rank-{rank:05d}.safetensors"
            size, digest = shards.write(step / name, source)
            bar.advance(task, size)
            parameters = [piece for piece in source.pieces if piece.lo >= 0]
            slices = [(p.name, p.lo, p.lo + torch.Size(p.shape).numel()) for p in parameters]
            buffers = [piece.name for piece in source.pieces if piece.lo < 0]
            written.append(Shard(name, size, digest, slices, buffers))
    return written


def _manifest(cfg: Config, folder: Folder, written: list[Shard]) -> Manifest:
    """As of a data-parallel run that has not begun, each shard one rank's."""
    progress = {"step": 0, "tokens": 0, "samples": 0}
    return Manifest(
        step=0,
        grid={"world_size": len(written), "pp_size": 1, "ep_size": 1},
        kinds=list(KINDS),
        shapes={name: list(shape) for name, shape in folder.shapes.items() if not name.endswith(BIAS_SUFFIX)},
        shards=written,
        config=asdict(cfg),
        config_hash=config_hash(cfg),
        counters={"applied_steps": 0, "skipped_steps": 0},
        clients=[{"progress": progress, "data": {"next_sample": 0, "tokens": [], "streams": []}}],
        versions={"deepv3": deepv3.__version__, "torch": torch.__version__, "python": platform.python_version()},
    )


# -- tokenizer ---------------------------------------------------------------------------------------------------------


def _tokenizer(source: Path, cfg: ModelConfig) -> Tokenizer | None:
    """The source's, from tokenizer.json itself; None where there is none.

    Not through AutoTokenizer: transformers 5 makes another tokenizer of a LlamaTokenizerFast, DeepSeek's own class.
    """
    if not (source / "tokenizer.json").exists():
        return None
    tokenizer = _read(source)
    if tokenizer.size > cfg.vocab_size:
        raise CheckpointError(
            f"{source}: its tokenizer has ids up to {tokenizer.size - 1}, which need {tokenizer.size} rows, but "
            f"vocab_size = {cfg.vocab_size}: not this model's tokenizer; remove tokenizer.json to import without it"
        )
    return tokenizer


def _read(source: Path) -> Tokenizer:
    config = files.read_json(source / "tokenizer_config.json")
    spelled = {key: value.get("content") if isinstance(value, dict) else value for key, value in config.items()}
    try:
        backend = Backend.from_file(str(source / "tokenizer.json"))
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(f"{source / 'tokenizer.json'}: cannot be read: {error}") from None
    return Tokenizer(backend, {k: v for k, v in spelled.items() if k.endswith("_token") and isinstance(v, str)})
