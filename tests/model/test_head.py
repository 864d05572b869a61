"""Chunked cross-entropy: the full logits' values without the full logits."""

import pytest
import torch
import torch.nn.functional as F

from deepv3.model import head as module
from deepv3.model.head import Head

ROWS, VOCAB, WIDTH, SCALE = 23, 50, 8, 0.04


def _case(dtype=torch.float64, chunk=2048):
    generator = torch.Generator().manual_seed(2)
    head = Head(VOCAB, WIDTH, chunk).to(dtype)
    torch.nn.init.normal_(head.weight, generator=generator)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    labels[4] = -100
    return head, hidden, labels


@pytest.mark.parametrize("chunk", [1, 7, 23, 100])
def test_chunked_loss_and_gradients_equal_the_full_logits(chunk):
    head, hidden, labels = _case(chunk=chunk)
    term, total = head.loss(hidden, labels, SCALE)
    term.backward()
    reference, weight = hidden.detach().requires_grad_(), head.weight.detach().requires_grad_()
    expected = F.cross_entropy(reference @ weight.T, labels, reduction="sum")
    (expected * SCALE).backward()
    torch.testing.assert_close(total, expected.detach())
    torch.testing.assert_close(term.detach(), expected.detach() * SCALE)
    torch.testing.assert_close(hidden.grad, reference.grad)
    torch.testing.assert_close(head.weight.grad, weight.grad)


@pytest.mark.parametrize("with_gradient", [True, False])
def test_no_more_than_a_chunk_of_logits_exists_at_once(with_gradient, monkeypatch):
    sizes = []

    def watched(x, weight):
        sizes.append(x.shape[0])
        return x @ weight.t()

    monkeypatch.setattr(module, "multiply", watched)
    head, hidden, labels = _case(chunk=7)
    with torch.set_grad_enabled(with_gradient):
        head.loss(hidden, labels, SCALE)
    assert sizes == [7, 7, 7, 2]


def test_logits_are_computed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "multiply", lambda x, w: (calls.append(1), x @ w.t())[1])
    head, hidden, labels = _case()
    head.loss(hidden, labels, SCALE)[0].backward()
    assert len(calls) == 1


def test_a_loss_term_scaled_after_the_fact_is_refused():
    head, hidden, labels = _case()
    with pytest.raises(AssertionError, match="factor 1"):
        (2 * head.loss(hidden, labels, SCALE)[0]).backward()


def test_the_term_is_differentiable_and_the_reported_sum_is_not():
    head, hidden, labels = _case()
    term, total = head.loss(hidden, labels, SCALE)
    assert term.requires_grad and not total.requires_grad


def test_different_scales_on_one_head_add_up():
    """As with prediction depths: each use has its own factor, the buffer takes them all."""
    head, hidden, labels = _case(torch.float32)
    head.weight.main_grad, head.weight.grad_ready = torch.full(head.weight.shape, 7.0), False
    terms = [head.loss(hidden, labels, scale)[0] for scale in (0.5, 0.25)]
    sum(terms).backward()
    weight, reference = head.weight.detach().requires_grad_(), hidden.detach().requires_grad_()
    (0.75 * F.cross_entropy(reference @ weight.T, labels, reduction="sum")).backward()
    torch.testing.assert_close(head.weight.main_grad, weight.grad)
    torch.testing.assert_close(hidden.grad, reference.grad)
    assert head.weight.grad is None
