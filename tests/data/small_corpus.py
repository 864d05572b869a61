"""Seeded text, and the config of a run on it."""

import random
import re
from pathlib import Path

from deepv3.config.schema import Config, DataConfig, ModelConfig, SourceConfig, TrainConfig

VOCABULARY = (
    "the of and expert token router latent balance weight gradient layer bias schedule stage group héllo 数据 123 "
    "45678 def return class import self None for while 🙂 naïve x = y + 1 ( ) [ ] { } : . , ! # \t"
)
WORDS = VOCABULARY.split(" ")


def make_text(number: int, words: int = 120) -> str:
    """Seeded text of at most that many words, with line breaks and indentation."""
    rng = random.Random(number)
    parts = [rng.choice(WORDS) + rng.choice([" ", " ", "\n", "\n    ", "  "]) for _ in range(rng.randint(5, words))]
    return f"document {number}\n" + "".join(parts)


def titles(text: str) -> set[str]:
    """The documents whose first line is in ``text``."""
    return set(re.findall(r"document \d+\n", text))


def write_corpus(folder: Path, count: int, words: int = 120) -> Path:
    """Text files 000.txt, 001.txt ..., every third in a subfolder."""
    (folder / "sub").mkdir(parents=True)
    for i in range(count):
        where = folder / "sub" if i % 3 == 0 else folder
        (where / f"{i:03d}.txt").write_text(make_text(i, words), encoding="utf-8")
    return folder


def make_config(cache: Path, run_dir: Path, seed: int = 0, mtp: int = 1, vocab_size: int = 400, **data) -> Config:
    """A run on data.sources or, by its path, one source; other data fields by name."""
    path = data.pop("path", None)
    if path is not None:
        data["sources"] = [SourceConfig(path=str(path))]
    fields = {"seq_len": 32, "validation_fraction": 0.1, "cache_dir": str(cache), "num_proc": 1}
    return Config(
        run_dir=str(run_dir),
        seed=seed,
        model=ModelConfig(vocab_size=vocab_size, num_nextn_predict_layers=mtp, max_position_embeddings=64),
        data=DataConfig(**(fields | data)),
        train=TrainConfig(steps=10),
    )
