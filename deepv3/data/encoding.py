"""One document's way from text to tokens: which part it belongs to, FIM or not, eos at its end."""

from dataclasses import dataclass

import numpy as np

from deepv3.data import fim
from deepv3.data.order import chance
from deepv3.data.tokenizer import Tokenizer

TRAIN, VALIDATION = "train", "validation"
PARTS = (TRAIN, VALIDATION)
_HELD_OUT = 0x8E1D  # stream of the hash


@dataclass(frozen=True)
class Rules:
    """What is done with the documents of a source. held_out: share that goes to validation; 1 is all.

    Which documents are held out depends on their number alone, not on the seed, and they are never rewritten for FIM:
    validation losses compare across seeds and FIM rates.
    """

    seed: int
    fim_rate: float
    held_out: float


class Encoder:
    """Applies Rules with a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, rules: Rules):
        self.tokenizer, self.rules = tokenizer, rules

    def part(self, number: int) -> str:
        """train or validation."""
        return VALIDATION if chance(self.rules.held_out, _HELD_OUT, number) else TRAIN

    def rewritten(self, number: int) -> bool:
        """Whether FIM applies to this document."""
        return self.part(number) == TRAIN and fim.chosen(number, self.rules.seed, self.rules.fim_rate)

    def encode(self, number: int, text: str) -> np.ndarray:
        """int32 [tokens]: the document, rewritten or not, and eos."""
        encode, eos = self.tokenizer.encode_array, np.array([self.tokenizer.eos], np.int32)
        if not self.rewritten(number):
            return np.concatenate([encode(text), eos])
        assert self.tokenizer.fim is not None, "checked with the config"
        prefix, middle, suffix = fim.cut(text, number, self.rules.seed)
        begin, hole, end = (np.array([token], np.int32) for token in self.tokenizer.fim)
        return np.concatenate([begin, encode(prefix), hole, encode(suffix), end, encode(middle), eos])
