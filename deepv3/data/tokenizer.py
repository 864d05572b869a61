"""The tokenizer: a byte-level BPE trained on the sources, or any folder or hub name that AutoTokenizer takes.

Trained form (V3 4.1 states byte-level BPE, a pre-tokenizer that joins punctuation and line breaks, and no more; digits
in groups of up to three are the released tokenizer's): special tokens have ids 0 to 5, then the 256 bytes, then merges.
No normaliser, so decode(encode(text)) == text for every text.

Special tokens never come out of text: a document that spells ``<｜end▁of▁sentence｜>`` gets the tokens of its letters.
No bos in front of documents: the report's layout has none, ``eos`` ends each document and so stands in front of the
next. The exported tokenizer adds none either, whatever the original did, because the model has never seen one.

Given up: V3 splits some of the joined tokens at random while training (share not stated); this does not.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from deepv3.config.schema import Config
from deepv3.data.cache import build_once, digest, published, write_json
from deepv3.errors import ConfigError, DataError

if TYPE_CHECKING:
    from deepv3.data.corpus import Source

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")  # in front of prefix, suffix and middle
SPECIAL = (BOS, EOS, PAD, *FIM)
# The same three in other families' vocabularies, for tokenizers that are given.
FIM_SPELLINGS = (
    FIM,
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
)
SMALLEST = len(SPECIAL) + 256

DIGITS = r"\p{N}{1,3}"
# A word with one sign or space in front of it; signs with the line breaks after them; line breaks with the blanks
# before them; blanks up to the last one, which belongs to the next word; blanks; anything else but digits. At most 128
# characters each: training takes merges x longest word, hours for one line of some MB without a blank.
WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]{1,128}| ?[\p{P}\p{S}]{1,128}[\r\n]{0,128}"
    r"|\s{0,128}[\r\n]{1,128}|\s{1,128}(?!\S)|\s{1,128}|[^\p{N}]"
)

SEGMENT = 1 << 18  # characters encoded at once: an encoding takes about 100 bytes a token while it is made


@dataclass
class Tokenizer:
    """Text <-> ids. eos ends documents. fim: ids in front of prefix, suffix and middle, None where it has no such.

    special: {"bos_token": "...", ...} as in tokenizer_config.json.
    """

    backend: Backend
    special: dict[str, str]

    def __post_init__(self):
        self.backend.encode_special_tokens = True
        self.backend.post_processor = processors.ByteLevel(trim_offsets=False)  # puts no token around a text
        self.backend.no_truncation()
        self.backend.no_padding()
        self.bos, self.eos, self.pad = (self._id(self.special.get(f"{name}_token")) for name in ("bos", "eos", "pad"))
        triples = (tuple(map(self._id, spelling)) for spelling in FIM_SPELLINGS)
        self.fim: tuple[int, int, int] | None = next((t for t in triples if None not in t), None)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    @cached_property
    def size(self) -> int:
        """Rows that the embedding needs: the largest id + 1."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def digest(self) -> str:
        """16 hex digits over everything that decides the ids."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` alone, no special tokens around or in it. Cut for encoding every SEGMENT characters."""
        return [i for ids in self._segments(text) for i in ids]

    def encode_array(self, text: str) -> np.ndarray:
        """``encode`` as int32 [tokens]."""
        parts = [np.array(ids, dtype=np.int32) for ids in self._segments(text)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, np.int32)])

    def _segments(self, text: str) -> Iterator[list[int]]:
        for start in range(0, len(text), SEGMENT):
            yield self.backend.encode_batch_fast([text[start : start + SEGMENT]], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of ``ids``; bytes that are no UTF-8 come out as U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, model_max_length: int | None = None) -> None:
    """Write tokenizer.json and a tokenizer_config.json that every transformers since 4.57 reads to the same ids.

    model_max_length: tokens, model.max_position_embeddings of an export.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with published(folder / "tokenizer.json") as file:
        file.write(tokenizer.backend.to_str(pretty=True).encode())
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        **tokenizer.special,
    }
    if model_max_length is not None:
        config["model_max_length"] = model_max_length
    write_json(folder / "tokenizer_config.json", config)


def read_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer that ``save_tokenizer`` wrote, without transformers."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        backend = Backend.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"{folder} holds no readable tokenizer ({error}); remove it to have it made again") from error
    return Tokenizer(backend, {k: v for k, v in config.items() if k.endswith("_token") and isinstance(v, str)})


def obtain(cfg: Config, sources: Sequence["Source"], say: Callable[[str], None]) -> Tokenizer:
    """The tokenizer that ``data.tokenizer`` names, or the one trained on ``sources`` (and then cached).

    say: takes a line for the user.
    Raises DataError where it cannot be had or lacks what training needs, ConfigError where it exceeds the vocabulary.
    """
    name = cfg.data.tokenizer
    tokenizer = _given(name) if name else read_tokenizer(_trained(cfg, sources, say))
    check(tokenizer, cfg)
    return tokenizer


def check(tokenizer: Tokenizer, cfg: Config) -> None:
    """Raises ConfigError where tokenizer and config do not fit, DataError where it has no end-of-document token."""
    name = f"data.tokenizer={cfg.data.tokenizer}"
    if tokenizer.size > cfg.model.vocab_size:
        raise ConfigError(
            f"{name} has ids up to {tokenizer.size - 1}, which need {tokenizer.size} rows, but model.vocab_size = "
            f"{cfg.model.vocab_size}; set model.vocab_size={-(-tokenizer.size // 64) * 64} or take a smaller tokenizer"
        )
    if tokenizer.eos is None:
        raise DataError(f"{name} has no eos token to end documents with; set eos_token in its tokenizer_config.json")
    if cfg.data.fim_rate > 0 and tokenizer.fim is None:
        known = " or ".join(spelling[0] for spelling in FIM_SPELLINGS)
        raise ConfigError(
            f"data.fim_rate = {cfg.data.fim_rate} but {name} has no FIM tokens ({known} ...); set it to 0"
        )


def _given(name: str) -> Tokenizer:
    from transformers import AutoTokenizer  # takes seconds, and only a given tokenizer needs it

    try:
        loaded = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DataError(
            f"data.tokenizer={name}: AutoTokenizer cannot load it ({reason}); give a folder that holds a tokenizer, a "
            "hub name with network access, or null to train one on the sources"
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            f"data.tokenizer={name} is a {type(loaded).__name__} without a tokenizer.json; convert it to a fast one "
            "(transformers.convert_slow_tokenizer) and give that folder"
        )
    special = {key: str(value) for key, value in loaded.special_tokens_map.items() if isinstance(value, str)}
    return Tokenizer(Backend.from_str(backend.to_str()), special)


def vocabulary(cfg: Config) -> int:
    """Size asked of a trained tokenizer, tokens."""
    return cfg.data.tokenizer_vocab_size or cfg.model.vocab_size


def _trained(cfg: Config, sources: Sequence["Source"], say: Callable[[str], None]) -> Path:
    size, limit = vocabulary(cfg), cfg.data.tokenizer_train_bytes
    if size < SMALLEST:
        raise ConfigError(
            f"a byte-level tokenizer needs {SMALLEST} tokens (256 bytes + {len(SPECIAL)} special), but "
            f"data.tokenizer_vocab_size or model.vocab_size asks for {size}; raise it"
        )
    recipe = [DIGITS, WORDS, SPECIAL, size, limit]
    weights = [source.config.weight for source in sources]
    cache = Path(cfg.data.cache_dir)
    key = digest({"recipe": recipe, "sources": [source.identity for source in sources], "weights": weights})

    def build(folder: Path) -> None:
        from deepv3.data.corpus import read_text

        say(f"training a tokenizer of {size:,} tokens on at most {limit / 1e6:,.1f} MB of data.sources")
        shares = [limit * weight / sum(weights) for weight in weights]
        texts = (text for source, share in zip(sources, shares) for text in read_text(source, cache, int(share) or 1))
        save_tokenizer(train(texts, size), folder)

    return build_once(cache / "tokenizers" / key, build, say)


def train(texts: Iterator[str], size: int) -> Tokenizer:
    """A byte-level BPE of at most ``size`` tokens. Raises DataError where there is no text."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(DIGITS), "isolated"),
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    read = 0

    def counted() -> Iterator[str]:
        nonlocal read
        for text in texts:
            read += len(text)
            yield text

    backend.train_from_iterator(counted(), trainer)
    if not read:
        raise DataError("data.sources hold no readable text to train a tokenizer on; mend the files or their field")
    return Tokenizer(backend, {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD})
