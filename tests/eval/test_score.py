"""Scores are the log-probabilities that the model gives, whatever the rows' lengths and the batch."""

import pytest
import torch

from deepv3.config.schema import ModelConfig
from deepv3.eval.score import Row, fitted, score, windows
from deepv3.model.transformer import Transformer

CFG = ModelConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
    first_k_dense_replace=1, num_attention_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8,
    qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    max_position_embeddings=32, num_nextn_predict_layers=1, initializer_range=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    model = Transformer(CFG, loss_chunk=5, device="cpu", dtype=torch.float32)
    model.init_weights(0)
    return model.eval()


def rows(lengths, seed: int = 1) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(CFG.vocab_size, (c + t,), generator=generator).tolist() for c, t in lengths]
    return [Row(row[:c], row[c:]) for row, (c, _) in zip(ids, lengths)]


def one_by_one(model, row: Row) -> tuple[float, bool]:
    """Each target from its own forward pass."""
    total, greedy = 0.0, True
    for i, target in enumerate(row.targets):
        logits = model.logits(torch.tensor([row.context + row.targets[:i]]))[0, -1].double()
        total += logits.log_softmax(-1)[target].item()
        greedy &= int(logits.argmax()) == target
    return total, greedy


@pytest.mark.parametrize("batch_tokens", [1, 20, 8192])
def test_scores_are_those_of_single_forward_passes_in_the_order_of_the_rows(model, batch_tokens):
    asked = rows([(3, 4), (1, 1), (8, 2), (1, 9), (5, 0), (2, 4)])
    best = Row(asked[0].context, [int(model.logits(torch.tensor([asked[0].context]))[0, -1].argmax())])
    got = score(model, [*asked, best], batch_tokens)
    for row, (logprob, greedy) in zip([*asked, best], got, strict=True):
        wanted, likeliest = one_by_one(model, row)
        assert logprob == pytest.approx(wanted, abs=1e-4) and greedy == likeliest
    assert got[-1].greedy and got[4] == (0.0, True)


def test_windows_score_every_token_once_and_the_last_reaches_back():
    assert windows(list(range(9)), start=99, length=4) == [
        Row([99], [0, 1, 2, 3]), Row([3], [4, 5, 6, 7]), Row([4, 5, 6, 7], [8]),
    ]  # fmt: skip
    assert windows([7, 8], 99, 4) == [Row([99], [7, 8])]
    assert windows([], 99, 4) == []


@pytest.mark.parametrize("length", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("size", [1, 6, 7, 8, 21])
def test_windows_fit_and_cover_texts_of_every_length(length, size):
    cut = windows(list(range(size)), 99, length)
    assert [target for row in cut for target in row.targets] == list(range(size))
    assert all(len(row.inputs()) <= length and row.context for row in cut)
    assert all(row.context[-1] == (row.targets[0] - 1 if row.targets[0] else 99) for row in cut)


def test_a_context_too_long_loses_its_beginning_and_then_the_targets_theirs():
    assert fitted([1, 2, 3], [4, 5], 4) == Row([1, 2, 3], [4, 5])
    assert fitted([1, 2, 3], [4, 5], 3) == Row([2, 3], [4, 5])
    assert fitted([1], [2, 3, 4, 5], 2) == Row([3], [4, 5])


def test_a_window_of_the_whole_text_scores_as_one_row(model):
    ids = rows([(0, 20)])[0].targets
    whole = score(model, windows(ids, 0, 32))[0].logprob
    assert whole == pytest.approx(one_by_one(model, Row([0], ids))[0], abs=1e-4)
