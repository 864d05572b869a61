"""Sampling: greedy follows the logits, draws follow the distribution and the seed."""

import pytest
import torch

from deepv3.config.schema import ModelConfig
from deepv3.generate.sample import choose, generate
from deepv3.model.transformer import Transformer

CFG = ModelConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
    first_k_dense_replace=1, num_attention_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8,
    qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    max_position_embeddings=12, num_nextn_predict_layers=1, initializer_range=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    model = Transformer(CFG, device="cpu", dtype=torch.float32)
    model.init_weights(0)
    return model


@pytest.fixture
def prompt():
    return torch.randint(50, (3, 4), generator=torch.Generator().manual_seed(1))


def test_greedy_takes_the_likeliest_token_each_time(model, prompt):
    out = generate(model, prompt, 5)
    assert out.shape == (3, 9) and torch.equal(out[:, :4], prompt)
    logits = model.logits(out)
    assert torch.equal(logits[:, 3:-1].argmax(-1), out[:, 4:])


def test_rows_of_a_batch_do_not_see_each_other(model, prompt):
    together = generate(model, prompt, 5)
    assert all(torch.equal(generate(model, prompt[i : i + 1], 5)[0], together[i]) for i in range(3))


def test_a_context_beyond_the_models_reach_is_cut_from_the_left(model, prompt):
    out = generate(model, prompt, 20)
    assert out.shape == (3, 24)
    last = model.logits(out[:, -13:-1])[:, -1].argmax(-1)
    assert torch.equal(last, out[:, -1])


def test_the_same_seed_gives_the_same_text_and_another_one_another(model, prompt):
    first, again, other = (generate(model, prompt, 8, temperature=1.0, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_no_new_tokens_gives_the_prompt_and_the_training_mode_stays(model, prompt):
    model.train()
    assert torch.equal(generate(model, prompt, 0), prompt)
    generate(model, prompt, 1)
    assert model.training


def test_draws_follow_the_tempered_distribution():
    logits = torch.tensor([1.0, 0.0, 3.0, -2.0, 2.0])
    draws = choose(logits.expand(40_000, 5), 2.0, 1.0, torch.Generator().manual_seed(0))
    shares = torch.bincount(draws, minlength=5) / 40_000
    torch.testing.assert_close(shares, (logits / 2).softmax(0), atol=0.01, rtol=0)


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, {2}), (0.7, {2, 4}), (0.95, {2, 4, 0}), (1.0, {0, 1, 2, 3, 4})])
def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p(top_p, kept):
    probability = torch.tensor([0.2, 0.04, 0.5, 0.01, 0.25])
    draws = choose(probability.log().expand(5_000, 5), 1.0, top_p, torch.Generator().manual_seed(0))
    assert set(draws.tolist()) == kept


def test_a_tiny_top_p_still_leaves_the_likeliest_token():
    draws = choose(torch.tensor([[0.0, 5.0, 1.0]]).expand(100, 3), 1.0, 0.0, torch.Generator().manual_seed(0))
    assert set(draws.tolist()) == {1}
