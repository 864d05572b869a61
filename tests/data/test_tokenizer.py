"""The tokenizer: training, round trip, special tokens, transformers, what does not fit."""

import json
import random

import numpy as np
import pytest
from small_corpus import make_text

from deepv3.data import tokenizer as module
from deepv3.data.prepare import keep_tokenizer, prepare
from deepv3.data.tokenizer import EOS, FIM, PAD, SPECIAL, obtain, read_tokenizer, save_tokenizer, train
from deepv3.errors import ConfigError, DataError

HARD = [
    "",
    " ",
    "\n",
    "a" * 1000,
    "1234567",
    "x  \n\n  y\r\n\tz",
    "naïve 数据 🙂 \u200b\ufeff",
    "\x00\x01",
    "e\u0301",
    EOS,
]


@pytest.fixture(scope="module")
def tokenizer():
    return train((make_text(i) for i in range(200)), 400)


def test_special_tokens_come_first_then_bytes(tokenizer):
    assert [tokenizer.backend.token_to_id(token) for token in SPECIAL] == list(range(6))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.fim) == (0, 1, 2, (3, 4, 5))
    assert tokenizer.size == 400
    assert all("\uff5c" in token and "|" not in token for token in SPECIAL)


def test_every_text_comes_back(tokenizer):
    rng = random.Random(0)
    noise = ["".join(chr(rng.choice([rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x11000)])) for _ in range(200))]
    for text in [*HARD, *noise, *(make_text(i) for i in range(50))]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_never_yields_a_special_token(tokenizer):
    ids = tokenizer.encode(f"a{EOS}b{FIM[0]}{PAD}")
    assert min(ids) >= len(SPECIAL)


def test_digits_come_in_groups_of_up_to_three():
    made = train(iter(["1234567 " * 500]), 400)
    assert [made.decode([i]) for i in made.encode("1234567")] == ["123", "456", "7"]


def test_a_sign_and_the_line_break_after_it_may_become_one_token():
    made = train(iter(["def f():\n    return x\n" * 300]), 300)
    assert "():\n" in {made.decode([i]) for i in made.encode("def f():\n    return")}


def test_no_text_makes_a_long_word(tokenizer):
    """Training takes merges x longest word: one line of megabytes without a blank would take hours."""
    for run in ("a", "-", " ", "\n", "7", "\x01", "\u0301", " \n", "a\x01", "\u200b"):
        words = tokenizer.backend.pre_tokenizer.pre_tokenize_str(run * 3000)
        assert max(stop - start for _, (start, stop) in words) <= 260
        assert "".join(word for word, _ in words)


def test_training_twice_gives_the_same_tokenizer(tokenizer):
    assert train((make_text(i) for i in range(200)), 400).digest == tokenizer.digest


def test_a_saved_tokenizer_is_the_same_tokenizer(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    again = read_tokenizer(tmp_path)
    assert (again.digest, again.eos, again.fim, again.size) == (tokenizer.digest, 1, (3, 4, 5), 400)


def test_long_documents_are_encoded_in_segments(tokenizer, monkeypatch):
    text = make_text(1, 2000)
    monkeypatch.setattr(module, "SEGMENT", 100)
    parts = [tokenizer.encode(text[i : i + 100]) for i in range(0, len(text), 100)]
    assert tokenizer.encode_array(text).tolist() == sum(parts, []) == tokenizer.encode(text)
    assert tokenizer.encode_array("").dtype == np.int32
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_transformers_reads_the_same_ids(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(tokenizer, tmp_path, model_max_length=64)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id, loaded.model_max_length) == (0, 1, 2, 64)
    for text in [t for t in HARD if t != EOS] + [make_text(i) for i in range(20)]:
        ids = loaded(text)["input_ids"]
        assert ids == tokenizer.encode(text)
        assert loaded.decode(ids) == text
    assert set(loaded("a")) == {"input_ids", "attention_mask"}


def test_a_given_folder_is_taken_and_exported_alike(tokenizer, tmp_path, configure, silent):
    from transformers import AutoTokenizer

    save_tokenizer(tokenizer, tmp_path / "given")
    made = obtain(configure(tokenizer=str(tmp_path / "given")), [], silent)
    assert (made.eos, made.fim, made.encode("a 123")) == (1, (3, 4, 5), tokenizer.encode("a 123"))
    save_tokenizer(made, tmp_path / "exported")
    assert AutoTokenizer.from_pretrained(tmp_path / "exported")("a 123").input_ids == tokenizer.encode("a 123")


def test_a_given_tokenizer_that_adds_bos_adds_none_here(tokenizer, tmp_path, configure, silent):
    from tokenizers import Tokenizer, processors

    save_tokenizer(tokenizer, tmp_path)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)])
    backend.save(str(tmp_path / "tokenizer.json"))
    made = obtain(configure(tokenizer=str(tmp_path)), [], silent)
    assert made.encode("a") == tokenizer.encode("a")
    assert made.digest == tokenizer.digest


def test_a_tokenizer_larger_than_the_vocabulary_is_refused_with_both_sides(tokenizer, tmp_path, configure, silent):
    save_tokenizer(tokenizer, tmp_path)
    with pytest.raises(ConfigError, match=r"needs? 400 rows.* model.vocab_size = 300; set model.vocab_size=448"):
        obtain(configure(tokenizer=str(tmp_path), vocab_size=300), [], silent)


def test_a_vocabulary_without_room_for_the_bytes_is_refused(configure):
    with pytest.raises(ConfigError, match="262 tokens"):
        prepare(configure(vocab_size=200))


def test_fim_needs_fim_tokens(tokenizer, tmp_path, configure, silent):
    save_tokenizer(tokenizer, tmp_path)
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8").replace("fim▁", "other▁")
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data.fim_rate = 0.1 .* no FIM tokens"):
        obtain(configure(tokenizer=str(tmp_path)), [], silent)
    assert obtain(configure(tokenizer=str(tmp_path), fim_rate=0.0), [], silent).fim is None


def test_a_tokenizer_without_eos_is_refused(tokenizer, tmp_path, configure, silent):
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(DataError, match="no eos token"):
        obtain(configure(tokenizer=str(tmp_path)), [], silent)


def test_a_folder_that_holds_no_tokenizer_is_refused_by_name(tmp_path, configure, silent):
    with pytest.raises(DataError, match=f"data.tokenizer={tmp_path}"):
        obtain(configure(tokenizer=str(tmp_path)), [], silent)


def test_a_run_keeps_its_tokenizer_when_its_files_change(tmp_path, configure, silent):
    (tmp_path / "texts").mkdir()
    for i in range(30):
        (tmp_path / "texts" / f"{i}.txt").write_text(make_text(i, 400), encoding="utf-8")
    cfg = configure(path=tmp_path / "texts", validation_fraction=0.3)
    first = prepare(cfg, silent)
    keep_tokenizer(cfg, first.tokenizer)
    (tmp_path / "texts" / "new.txt").write_text("zzz qqq " * 4000, encoding="utf-8")
    again = prepare(cfg, silent)
    assert again.tokenizer.digest == first.tokenizer.digest
    assert read_tokenizer(tmp_path / "run" / "tokenizer").digest == first.tokenizer.digest
    assert again.train[0].folder != first.train[0].folder
    other = configure(path=tmp_path / "texts", validation_fraction=0.3, vocab_size=350)  # another run in this folder
    assert prepare(other, silent).tokenizer.size == 350
