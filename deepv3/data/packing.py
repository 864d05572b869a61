"""Packed rows over memory-mapped tokens (V3 4.1: documents packed, attention across them not masked).

The documents of a part stand behind one another, each with its eos, as one long run of tokens; row i is

    tokens[i x S : i x S + S + 1 + D]        S = data.seq_len, D = model.num_nextn_predict_layers

so rows overlap by the 1 + D tokens that only serve as targets: every token but the very first is the main target
exactly once an epoch, except the last incomplete row's, which are left out. With S = 4, D = 1 and 13 tokens there are
two rows, tokens 0..5 and 4..9.

Given up: documents keep the order of their source, so neighbours in a row are neighbours on disk; rows are shuffled,
documents are not.
"""

import json
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np

from deepv3.data.order import permuted
from deepv3.data.tokenise import token_file

SUMMARY = "summary.json"
OPEN_FILES = 4096  # memory maps kept; Linux allows a process 65,530


class RowShape(NamedTuple):
    """A row advances by seq_len tokens and is length = seq_len + 1 + MTP depth tokens long."""

    seq_len: int
    length: int

    def rows(self, tokens: int) -> int:
        """Whole rows in a run of tokens."""
        return max(0, (tokens - self.length) // self.seq_len + 1)


class Packed:
    """The rows of one part (train or validation) of a tokenised source, endlessly, in a new seeded order each epoch."""

    def __init__(self, folder: Path, part: str, shape: RowShape, key: tuple[int, ...] | None):
        """key: of the order (run seed, source); None keeps the order of the source."""
        counts = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["piece_tokens"][part]
        filled = [(piece, tokens) for piece, tokens in enumerate(counts) if tokens]
        self._files = [token_file(folder, piece, part) for piece, _ in filled]
        self._starts = [0, *accumulate(tokens for _, tokens in filled)]
        self._shape, self._key = shape, key
        self.tokens: int = self._starts[-1]
        self.rows = shape.rows(self.tokens)
        self._open = lru_cache(OPEN_FILES)(_open)

    def sample(self, n: int, index: int) -> np.ndarray:
        """The index-th sample drawn from this source, [length]; n, its number in the run, does not matter here."""
        epoch, place = divmod(index, self.rows)
        return self.row(place if self._key is None else permuted(place, self.rows, *self._key, epoch))

    def row(self, i: int) -> np.ndarray:
        """Row i in the order of the source, [length], int32 or uint16."""
        start = i * self._shape.seq_len
        stop = start + self._shape.length
        parts = []
        file = bisect_right(self._starts, start) - 1
        while start < stop:
            edges, chunks = self._open(self._files[file])
            offset = start - self._starts[file]
            chunk = bisect_right(edges, offset) - 1
            inside = offset - edges[chunk]
            part = chunks[chunk][inside : inside + stop - start]
            parts.append(part)
            start += len(part)
            file += start == self._starts[file + 1]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _open(path: Path) -> tuple[list[int], list[np.ndarray]]:
    """(first token of each chunk and the end, the chunks' tokens) of a token file, memory-mapped without a copy."""
    column = datasets.Dataset.from_file(str(path)).data.column("tokens")
    chunks = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks if len(chunk)]
    return [0, *accumulate(len(chunk) for chunk in chunks)], chunks


def document_ids(tokens: np.ndarray, eos: int) -> np.ndarray:
    """int32 [B, L]: which document of its row each token belongs to, counted from 0; an eos belongs to the one it ends.

    tokens: [B, L]. Text never yields an eos (tokenizer.py), so eos tokens are exactly the ends of documents.
    """
    ends = np.cumsum(tokens == eos, axis=1, dtype=np.int32)
    ids = np.zeros_like(ends)
    ids[:, 1:] = ends[:, :-1]
    return ids
