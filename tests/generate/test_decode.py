"""Decoding over the cache gives the tokens of full forward passes, alone, in batches, and with speculation."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from agreeable import SMALL, YARN, agreeable, prompts, worn

from deepv3.errors import ConfigError
from deepv3.generate.decode import Sampling, check, decode, without_cache

NEW = 11


def shape(depth: int, **fields):
    return replace(SMALL, num_nextn_predict_layers=depth, **fields)


@pytest.mark.parametrize("fields", [{}, {"q_lora_rank": None}, {"rope_scaling": YARN}, {"n_group": 1, "topk_group": 1}])
def test_prompts_of_different_length_continue_as_each_does_alone_without_a_cache(fields):
    model = worn(shape(1, **fields), seed=1)
    texts = prompts(model.cfg, 2)
    assert decode(model, texts, Sampling(NEW)).ids == without_cache(model, texts, Sampling(NEW)).ids


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_speculation_gives_the_greedy_text_token_for_token(depth):
    stood, rounds = [0] * depth, 0
    for seed in range(3):
        model = agreeable(shape(depth), seed, own=0.2)
        texts = prompts(model.cfg, seed)
        out = decode(model, texts, Sampling(NEW, speculative=True))
        assert out.ids == without_cache(model, texts, Sampling(NEW)).ids
        stood, rounds = [a + b for a, b in zip(stood, out.stood)], rounds + out.rounds
    assert 0.1 < stood[0] / rounds < 0.9 and stood[-1] > 0, (
        "guesses of every depth must stand and fall for this to say much"
    )
    assert rounds < 3 * len(texts) * (NEW - 1)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_speculation_gives_the_greedy_text_over_many_models_and_prompts(depth):
    for seed, fields in product(range(5, 25), ({}, {"q_lora_rank": None, "rope_scaling": YARN})):
        model = agreeable(shape(depth, **fields), seed, own=0.3 + 0.02 * (seed % 20))
        texts = prompts(model.cfg, seed, (3, 1, 20, 9, 2, 6))
        plain = decode(model, texts, Sampling(40)).ids
        assert plain == without_cache(model, texts, Sampling(40)).ids
        assert decode(model, texts, Sampling(40, speculative=True)).ids == plain


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_drawn_texts_follow_the_models_distribution(depth, top_p):
    """Three tokens of a vocabulary of 4: all 64 texts, against their exact probabilities."""
    model = agreeable(shape(max(depth, 1), vocab_size=4, num_hidden_layers=2), seed=3, own=0.8)
    rows, start = 4000, [1, 3]
    out = decode(model, [start] * rows, Sampling(3, temperature=1.5, top_p=top_p, seed=1, speculative=depth > 0))
    found = torch.bincount(torch.tensor(out.ids) @ torch.tensor([16, 4, 1]), minlength=64)
    texts = torch.tensor(list(product(range(4), repeat=3)))
    logits = model.logits(torch.cat((torch.tensor(start).expand(64, 2), texts), dim=1))[:, 1:4] / 1.5
    probability = torch.stack([nucleus(row, top_p) for row in logits.softmax(-1).flatten(0, 1)]).view(64, 3, 4)
    expected = rows * probability.gather(-1, texts[..., None]).squeeze(-1).prod(dim=-1)
    assert not found[expected == 0].any()
    likely = expected >= 5
    chi_square = ((found - expected)[likely] ** 2 / expected[likely]).sum().item()
    freedom = int(likely.sum()) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5, (chi_square, freedom)
    if depth:
        assert 0.1 < out.stood[0] / out.rounds < 0.97


def nucleus(probability: torch.Tensor, top_p: float) -> torch.Tensor:
    """The likeliest tokens up to top_p, one by one."""
    kept, total = torch.zeros_like(probability), 0.0
    for token in probability.argsort(descending=True).tolist():
        if total < top_p:
            kept[token] = probability[token]
            total += probability[token].item()
    return kept / kept.sum()


@pytest.mark.parametrize("speculative", [False, True])
def test_an_eos_ends_its_row_and_no_other(speculative):
    model = agreeable(shape(2), seed=3)
    texts = prompts(model.cfg, 7)
    plain = without_cache(model, texts, Sampling(NEW)).ids
    eos = plain[1][3]
    out = decode(model, texts, Sampling(NEW, speculative=speculative, eos=eos))
    assert out.ids == [row[: row.index(eos) + 1] if eos in row else row for row in plain]
    assert out.ids[1][-1] == eos and len(out.ids[1]) <= 4 and any(len(row) == NEW for row in out.ids)
    assert without_cache(model, texts, Sampling(NEW, eos=eos)).ids == out.ids


def test_the_same_seed_draws_the_same_text_and_another_seed_another():
    model, texts = worn(shape(1), seed=0), prompts(SMALL, 1)
    first, again, other = (decode(model, texts, Sampling(NEW, temperature=1.0, seed=s)).ids for s in (3, 3, 4))
    assert first == again != other


def test_a_text_may_fill_the_model_to_its_last_position():
    model = agreeable(shape(2, max_position_embeddings=20), seed=2)
    texts = prompts(model.cfg, 3, (6, 2))
    out = decode(model, texts, Sampling(14, speculative=True))
    assert out.ids == without_cache(model, texts, Sampling(14)).ids


def test_figures_count_what_was_done_and_the_training_mode_stays():
    model = agreeable(shape(1), seed=0).train()
    out = decode(model, prompts(SMALL, 0), Sampling(5, speculative=True))
    assert model.training
    assert out.new_tokens == 25 and out.prompt_tokens == 25
    assert "acceptance rate depth 1" in out.describe()[1] and "tokens/s" in out.describe()[0]
    plain = decode(model, prompts(SMALL, 0), Sampling(5))
    assert plain.rounds == 5 * 4 and len(plain.describe()) == 1


@pytest.mark.parametrize(
    ("texts", "sampling", "told"),
    [
        ([[1] * 60], Sampling(5), ("60 tokens", "max_new_tokens = 5 makes 65", "= 64", "max_new_tokens=4")),
        ([[1], [1] * 64], Sampling(1), ("prompt 2 of 2", "shorten the prompt")),
        ([[]], Sampling(5), ("empty",)),
        ([], Sampling(5), ("no prompt",)),
        ([[1]], Sampling(0), ("max_new_tokens = 0",)),
        ([[1]], Sampling(5, temperature=-1.0), ("temperature = -1.0",)),
        ([[1]], Sampling(5, temperature=float("nan")), ("temperature = nan",)),
        ([[1]], Sampling(5, top_p=0.0), ("top_p = 0.0",)),
        ([[1]], Sampling(5, top_p=1.1), ("top_p = 1.1",)),
    ],
)
def test_what_cannot_be_generated_is_refused_with_the_knob_that_mends_it(texts, sampling, told):
    with pytest.raises(ConfigError) as error:
        check(SMALL, texts, sampling)
    assert all(part in str(error.value) for part in told), str(error.value)


def test_speculation_without_a_prediction_module_is_refused():
    with pytest.raises(ConfigError, match="num_nextn_predict_layers = 0"):
        decode(worn(shape(0), seed=0), [[1]], Sampling(3, speculative=True))
