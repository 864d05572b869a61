"""Perplexity on what a run holds out, or on every document of a file or folder.

`held_out` reads packed rows exactly as validation during training does and gives its number. `documents` scores each
document by itself after an eos, which is what stands in front of a document in training; every token counts, the eos
at the document's end too.

bits per byte = nats / ln 2 / bytes of UTF-8: comparable between tokenizers, unlike perplexity per token.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from deepv3.config.schema import Config, SourceConfig
from deepv3.data.corpus import open_source
from deepv3.data.loader import validation_loader
from deepv3.data.prepare import prepare_validation, say_to_stderr
from deepv3.data.tokenizer import Tokenizer
from deepv3.dist import Grid
from deepv3.errors import ConfigError, DataError
from deepv3.eval.score import Row, Score, score, windows
from deepv3.model.transformer import Transformer

ROWS = 256  # windows scored at once: sorted by length they fill batches well


@dataclass
class Figures:
    """nats: sum over tokens of the main model's cross-entropy. bytes: of the text, 0 where tokens do not tell.
    documents: scored one by one, 0 where rows of several were.

    loss_mtp: mean over prediction depths per token, where it was measured. bad: documents that could not be read.
    """

    what: str
    nats: float
    tokens: int
    bytes: int = 0
    documents: int = 0
    bad: int = 0
    loss_mtp: float | None = None

    def add(self, rows: Sequence[Row], scores: Sequence[Score]) -> None:
        """Count scored rows."""
        self.nats -= math.fsum(s.logprob for s in scores)
        self.tokens += sum(len(row.targets) for row in rows)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float | None:
        """None where bytes are not known."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None

    def as_dict(self) -> dict:
        """All figures by name, for a JSON file."""
        derived = {"loss": self.loss, "perplexity": math.exp(self.loss), "bits_per_byte": self.bits_per_byte}
        return asdict(self) | derived

    def describe(self) -> list[str]:
        """Lines for people."""
        bits = self.bits_per_byte
        counted = f", {self.bytes:,} bytes" if self.bytes else ""
        of = f"{self.documents:,} documents, " if self.documents else ""
        lines = [
            f"{self.what}: {of}{self.tokens:,} tokens{counted}",
            f"  loss {self.loss:.4f} nats a token, perplexity {math.exp(self.loss):,.3f}"
            + ("" if bits is None else f", {bits:.4f} bits per byte"),
        ]
        if self.loss_mtp is not None:
            lines.append(f"  MTP loss {self.loss_mtp:.4f} nats a token")
        return [*lines, f"  {self.bad:,} bad documents left out"] if self.bad else lines


@torch.no_grad()
def held_out(model: Transformer, cfg: Config, tokenizer: Tokenizer, sequences: int | None = None) -> Figures:
    """Loss on the first `sequences` validation rows of cfg.data (train.eval_sequences where None), in micro-batches of
    train.micro_batch_size: the sums of training, so the same number for the same weights in the same format.

    Raises ConfigError or DataError where nothing is held out or nothing can be read.
    """
    count, seq_len = cfg.train.eval_sequences if sequences is None else sequences, cfg.data.seq_len
    if count < 1 or seq_len > cfg.model.max_position_embeddings:
        raise ConfigError(
            f"sequences = {count} must be at least 1, and data.seq_len = {seq_len} at most "
            f"model.max_position_embeddings = {cfg.model.max_position_embeddings}"
        )
    prepared = prepare_validation(cfg, tokenizer, say_to_stderr)
    device = next(model.parameters()).device
    loader = validation_loader(cfg, prepared, Grid(1, 0))
    if loader is None:
        raise ConfigError("data.validation_fraction = 0 and data.validation_sources is empty: nothing is held out")
    if sequences is not None and loader.rows is not None and sequences > loader.rows:
        raise ConfigError(f"sequences = {sequences}, but {loader.rows} are held out; lower it")
    widths, main, mtp, size = byte_widths(tokenizer), torch.zeros(()).double(), torch.zeros(()).double(), 0
    for tokens, documents in loader.micro_batches(0, count, math.gcd(count, cfg.train.micro_batch_size)):
        there = None if documents is None else documents.to(device)
        out = model(tokens.to(device), loss_scale=1.0 / (count * seq_len), mtp_weight=0.0, documents=there)
        main, mtp = main + out.loss_main.double().cpu(), mtp + out.loss_mtp.double().cpu()
        size += 0 if widths is None else int(widths[tokens[:, 1 : seq_len + 1]].sum())
    what = ", ".join(ready.source.config.path for ready in prepared.validation)
    figures = Figures(f"held out of {what}", main.item() * count * seq_len, count * seq_len, size)
    figures.loss_mtp = mtp.item() if len(model.mtp) else None
    return figures


def documents(
    model: Transformer, tokenizer: Tokenizer, source: SourceConfig, length: int, cache_dir: str = ".cache"
) -> Figures:
    """Every document of `source` by itself, in windows of `length` tokens. Raises DataError where there is none."""
    if tokenizer.eos is None:
        raise DataError("the tokenizer has no eos token to put in front of a document; set it in tokenizer_config.json")
    opened = open_source(source, "text", Path(cache_dir), stop_at_damage=False)
    out = Figures(source.path, 0.0, 0, bad=len(opened.damaged))
    rows: list[Row] = []
    for index, document in enumerate(opened.documents(Path(cache_dir))):
        text = opened.as_document(document, index)["text"]
        out.bad += text is None
        if text:
            rows += windows([*tokenizer.encode(text), tokenizer.eos], tokenizer.eos, length)
            out.documents, out.bytes = out.documents + 1, out.bytes + len(text.encode())
        if len(rows) >= ROWS:
            out.add(rows, score(model, rows))
            rows = []
    out.add(rows, score(model, rows))
    if not out.documents:
        raise DataError(f"text={source.path} holds no document that can be read, {out.bad} bad; give files with text")
    return out


def byte_widths(tokenizer: Tokenizer) -> torch.Tensor | None:
    """[size] int64: how many bytes of text each id stands for, special tokens none; None unless byte-level BPE."""
    decoder = json.loads(tokenizer.backend.to_str())["decoder"]
    if decoder is None or decoder["type"] != "ByteLevel":
        return None
    added = tokenizer.backend.get_added_tokens_decoder()
    widths = torch.zeros(tokenizer.size, dtype=torch.int64)
    for token, number in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        special = number in added and added[number].special
        # byte-level vocabularies spell every byte as one character; added tokens are spelled as they are
        widths[number] = 0 if special else len(token.encode() if number in added else token)
    return widths
