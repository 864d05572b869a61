"""Fill-in-the-middle: form, rate, and what the choice hangs on."""

import pytest
from small_corpus import make_text

from deepv3.data import fim
from deepv3.data.encoding import TRAIN, VALIDATION, Encoder, Rules
from deepv3.data.reading import PLACE_BITS
from deepv3.data.tokenizer import EOS, FIM, train

NUMBERS = [i << PLACE_BITS for i in range(400)]


@pytest.fixture(scope="module")
def tokenizer():
    return train((make_text(i) for i in range(100)), 350)


def test_a_rewritten_document_is_prefix_suffix_middle_and_eos(tokenizer):
    encoder = Encoder(tokenizer, Rules(seed=3, fim_rate=1.0, held_out=0.0))
    for number in NUMBERS[:40]:
        text = make_text(number)
        prefix, middle, suffix = fim.cut(text, number, 3)
        assert prefix + middle + suffix == text
        expected = f"{FIM[0]}{prefix}{FIM[1]}{suffix}{FIM[2]}{middle}{EOS}"
        assert tokenizer.decode(encoder.encode(number, text)) == expected


def test_a_document_left_whole_is_itself_and_eos(tokenizer):
    encoder = Encoder(tokenizer, Rules(seed=3, fim_rate=0.0, held_out=0.0))
    ids = encoder.encode(NUMBERS[1], "héllo")
    assert tokenizer.decode(ids) == f"héllo{EOS}"
    assert tokenizer.bos not in ids


def test_cuts_fall_anywhere_between_characters():
    cuts = [fim.cut("abcd", n, 0) for n in range(2000)]
    assert {len(prefix) for prefix, _, _ in cuts} == {len(suffix) for _, _, suffix in cuts} == {0, 1, 2, 3, 4}
    assert fim.cut("", 5, 0) == ("", "", "")


def test_the_rate_is_met_and_the_choice_hangs_on_seed_and_number_only():
    chosen = [n for n in range(20_000) if fim.chosen(n << PLACE_BITS, 1, 0.1)]
    assert abs(len(chosen) / 20_000 - 0.1) < 0.01
    assert chosen == [n for n in range(20_000) if fim.chosen(n << PLACE_BITS, 1, 0.1)]
    assert chosen != [n for n in range(20_000) if fim.chosen(n << PLACE_BITS, 2, 0.1)]


def test_held_out_documents_stay_whole_and_are_the_same_for_every_seed(tokenizer):
    encoders = [Encoder(tokenizer, Rules(seed, fim_rate=1.0, held_out=0.2)) for seed in (0, 1)]
    parts = [[encoder.part(n) for n in NUMBERS] for encoder in encoders]
    assert parts[0] == parts[1]
    assert 50 < parts[0].count(VALIDATION) < 110
    for number, part in zip(NUMBERS, parts[0]):
        assert encoders[0].rewritten(number) == (part == TRAIN)
