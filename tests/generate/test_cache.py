"""The cache of latents gives, at every position, what the whole model gives there."""

from dataclasses import replace

import pytest
import torch
from agreeable import SMALL, YARN, worn

from deepv3.config.schema import ModelConfig
from deepv3.generate.cache import CachedModel
from deepv3.model.transformer import Transformer

LENGTH = 18
SHAPES = {
    "as_released": {},
    "no_query_latent": {"q_lora_rank": None},
    "yarn": {"rope_scaling": YARN},
    "scaled_latents": {"latent_scale_q": 1.7, "latent_scale_kv": 0.6, "attn_out_scale": 1.3},
    "one_group_no_shared_expert": {"n_group": 1, "topk_group": 1, "n_shared_experts": 0},
    "wide_values_deep_prediction": {"v_head_dim": 20, "num_nextn_predict_layers": 3},
}


@pytest.fixture(params=SHAPES)
def case(request):
    """(model, tokens [3, LENGTH + D], reference logits [1 + D, 3, LENGTH, V])."""
    cfg = replace(SMALL, **SHAPES[request.param])
    model = worn(cfg, seed=5)
    tokens = torch.randint(cfg.vocab_size, (3, LENGTH + cfg.num_nextn_predict_layers))
    return model, tokens, model.logits(tokens, mtp=True)


def all_depths(cached: CachedModel, tokens: torch.Tensor, starts: list[int], count: int, prefill: bool = False):
    """Logits [1 + D, B, count, V] of `count` positions from starts[b] on."""
    start = torch.tensor(starts)
    places = start[:, None] + torch.arange(count)
    span = cached.prefill(count) if prefill else cached.decode(start, count)
    hidden = cached.trunk(tokens.gather(1, places), span)
    rows = [cached.logits(hidden)]
    for k in range(1, len(cached.depths) + 1):
        hidden = cached.predict(k, tokens.gather(1, places + k), hidden, span)
        rows.append(cached.logits(hidden))
    return torch.stack(rows)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def test_prefill_in_one_go_is_the_model_bit_for_bit(case):
    model, tokens, reference = case
    cached = CachedModel(model, 3, LENGTH, mtp=True)
    assert torch.equal(all_depths(cached, tokens, [0, 0, 0], LENGTH, prefill=True), reference)


def test_token_by_token_from_nothing_is_the_model_at_every_position(case):
    model, tokens, reference = case
    cached = CachedModel(model, 3, LENGTH, mtp=True)
    for i in range(LENGTH):
        close(all_depths(cached, tokens, [i, i, i], 1)[:, :, 0], reference[:, :, i])


def test_rows_of_different_length_go_on_together_after_one_padded_prefill(case):
    model, tokens, reference = case
    lengths, rows = torch.tensor([9, 4, 1]), torch.arange(3)
    cached = CachedModel(model, 3, LENGTH, mtp=True)
    padded = tokens.clone()
    for row, length in enumerate(lengths):
        padded[row, length + len(cached.depths) :] = 0  # a row's own tokens, and those its modules look ahead at
    out = all_depths(cached, padded, [0, 0, 0], 9, prefill=True)
    for b, n in enumerate(lengths):
        close(out[:, b, :n], reference[:, b, :n])
    for step in range(0, 9, 3):
        at = lengths + step
        out = all_depths(cached, tokens, at.tolist(), 3)
        close(out, torch.stack([reference[:, rows, at + j] for j in range(3)], dim=2))


def test_tokens_taken_back_leave_no_trace(case):
    model, tokens, reference = case
    cached = CachedModel(model, 3, LENGTH, mtp=True)
    all_depths(cached, tokens, [0, 0, 0], 6, prefill=True)
    all_depths(cached, tokens.flip(0), [6, 5, 6], 4)  # wrong tokens
    close(
        all_depths(cached, tokens, [6, 5, 6], 4),
        reference[:, [[0], [1], [2]], [[6, 7, 8, 9], [5, 6, 7, 8], [6, 7, 8, 9]]],
    )


def test_positions_outside_the_sequence_change_nothing():
    model = worn(SMALL, seed=1)
    tokens = torch.randint(SMALL.vocab_size, (2, 12))
    cached = CachedModel(model, 2, 8)
    all_depths(cached, tokens, [0, 0], 6, prefill=True)
    before = cached.latents[:, :, :-1].clone()
    cached.trunk(tokens[:, :4], cached.decode(torch.tensor([-4, 8]), 4))
    assert torch.equal(cached.latents[:, :, :-1], before)


def test_rows_that_are_kept_go_on_as_before():
    model = worn(SMALL, seed=2)
    tokens = torch.randint(SMALL.vocab_size, (3, 10))
    cached = CachedModel(model, 3, 8)
    all_depths(cached, tokens, [0, 0, 0], 5, prefill=True)
    cached.keep(torch.tensor([2, 0]))
    out = all_depths(cached, tokens[[2, 0]], [5, 5], 2)[0]
    close(out, model.logits(tokens[:, :7])[[2, 0], 5:])


def test_bfloat16_stays_near_the_model():
    model = worn(SMALL, seed=3)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    tokens = torch.randint(SMALL.vocab_size, (2, 8))
    cached = CachedModel(model, 2, 8)
    assert cached.latents.dtype == torch.bfloat16
    reference = model.logits(tokens).float()
    out = torch.cat([all_depths(cached, tokens, [i, i], 1)[0] for i in range(8)], dim=1)
    nearest = (out - reference).flatten(2).norm(dim=-1) / reference.norm(dim=-1)
    assert nearest.median() < 0.03  # a near tie of the router may send single tokens elsewhere


def test_v3_keeps_576_values_a_token_and_layer():
    model = Transformer(replace(ModelConfig(), num_hidden_layers=5), device="meta", dtype=torch.bfloat16)
    cached = CachedModel(model, batch=2, capacity=7, mtp=True)
    assert cached.latents.shape == (5 + 1, 2, 7 + 1, 576)
    assert cached.latents.dtype == torch.bfloat16
