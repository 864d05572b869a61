"""The acceptance rule keeps the distribution; guesses are those of the chained modules."""

import pytest
import torch
from agreeable import SMALL, agreeable, prompts

from deepv3.generate.decode import Sampling, decode
from deepv3.generate.sample import draw
from deepv3.generate.speculative import Drafter, verify

ROWS = 60_000


def distributions(depth: int, vocab: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """p [depth + 1, V] and q [depth, V], unlike each other, with zeros in both."""
    p, q = torch.rand(depth + 1, vocab) ** 3, torch.rand(depth, vocab) ** 3
    p[:, 0], q[:, 1] = 0.0, 0.0
    return p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)


def run(p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(guesses, stands, token) of many rows."""
    generator = torch.Generator().manual_seed(0)
    guesses = torch.stack([draw(row.expand(ROWS, -1), generator) for row in q], dim=1)
    return guesses, *verify(p.expand(ROWS, -1, -1), guesses, q.expand(ROWS, -1, -1), generator)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_token_that_comes_out_follows_p_whatever_q_was(depth):
    p, q = distributions(depth)
    guesses, stands, token = run(p, q)
    for place in range(depth + 1):
        reached = stands >= place  # tokens before this place all stood, so this one was decided here
        settled = guesses[reached, place] if place < depth else token[reached]
        settled = torch.where(stands[reached] == place, token[reached], settled)
        shares = torch.bincount(settled, minlength=5) / len(settled)
        torch.testing.assert_close(shares, p[place], atol=3.5 / len(settled) ** 0.5, rtol=0)


def test_guesses_stand_with_the_overlap_of_p_and_q():
    p, q = distributions(1)
    _, stands, _ = run(p, q)
    assert stands.double().mean().item() == pytest.approx(torch.minimum(p[0], q[0]).sum().item(), abs=0.01)


def test_a_guess_drawn_from_p_itself_always_stands():
    p, _ = distributions(2)
    _, stands, _ = run(p, p[:2])
    assert (stands == 2).all()


def test_greedy_takes_guesses_up_to_the_first_that_differs():
    p = torch.eye(4)[[2, 0, 1]].expand(3, -1, -1)
    guesses = torch.tensor([[2, 0], [2, 3], [1, 0]])
    stands, token = verify(p, guesses, torch.eye(4)[guesses], torch.Generator())
    assert stands.tolist() == [2, 1, 0] and token.tolist() == [1, 0, 2]


def chained(model, known: list[int]) -> list[int]:
    """Guesses by whole forward passes: module k after k - 1 guesses, at the last position it can see."""
    depth, guesses = len(model.mtp), []
    for k in range(1, depth + 1):
        row = (known + guesses + [0] * depth)[: len(known) + depth - 1]
        guesses.append(int(model.logits(torch.tensor([row]), mtp=True)[k, 0, len(known) - 2].argmax()))
    return guesses


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_guesses_are_those_of_the_chained_modules_computed_without_any_cache(depth, monkeypatch):
    model = agreeable(SMALL.__class__(**vars(SMALL) | {"num_nextn_predict_layers": depth}), seed=depth)
    seen = []

    def recorded(self, tokens, known, *rest):
        q = propose(self, tokens, known, *rest)
        seen.extend(zip(tokens.tolist(), known.tolist()))
        return q

    propose = Drafter._propose
    monkeypatch.setattr(Drafter, "_propose", recorded)
    out = decode(model, prompts(model.cfg, 4, (1, 5, 2)), Sampling(9, speculative=True))
    assert len(seen) > 10 and out.stood[-1] > 0
    for tokens, known in seen:
        assert tokens[known : known + depth] == chained(model, tokens[:known])
