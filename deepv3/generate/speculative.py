"""Speculative decoding with the model's own prediction modules (V3 5.4.3): several tokens a pass, the same text.

The modules, chained as in training (V3 Eq. 21-23), guess the next D tokens; one pass of the main model over them all
says which stand. With n tokens known, h^0 known for positions up to n - 2, and W = n - 2:

    module 1 at W: h^0_W and token n - 1 (known)    -> h^1_W, guess of token n
    module 2 at W: h^1_W and the guess of token n   -> h^2_W, guess of token n + 1        and so on

What module k computed with a guess that fell is computed again with the token that came instead: each round starts D
positions before the first unknown token, with the last D - 1 rows of h^0 kept for it.

The rule (Leviathan et al. 2023, Chen et al. 2023): a guess x drawn from q stands with probability min(1, p(x) / q(x));
the first that falls is replaced by a draw from max(p - q, 0), normalised; if all stand, one more token is drawn from p.
What comes out is distributed as p, token for token. At temperature 0 p and q are one-hot and this is plain greedy.
"""

import torch
from torch import Tensor

from deepv3.generate.cache import CachedModel, Span
from deepv3.generate.sample import distribution, draw


class Drafter:
    """Guesses from the prediction modules of `cached`, whose caches it keeps up to date."""

    def __init__(self, cached: CachedModel, temperature: float, top_p: float, generator: torch.Generator) -> None:
        self.cached, self.temperature, self.top_p, self.generator = cached, temperature, top_p, generator
        self.depth = len(cached.depths)
        self._tail: Tensor | None = None  # [B, depth - 1, D], h^0 of positions n - depth ... n - 2

    def first(self, tokens: Tensor, known: Tensor, hidden: Tensor, span: Span) -> Tensor:
        """After the prefill: hidden [B, longest prompt, D] and its span. Returns as `next`."""
        return self._propose(tokens, known, hidden, torch.zeros_like(known), span)

    def next(self, tokens: Tensor, known: Tensor, hidden: Tensor, before: Tensor) -> Tensor:
        """Write guesses of tokens known ... known + depth - 1 into `tokens`.

        tokens: [B, L]; known: [B], tokens settled; before: [B], the same before this pass; hidden: [B, 1 + depth, D],
        h^0 of positions before - 1 on. Returns q, [B, depth, V], what each guess was drawn from.
        """
        assert self._tail is not None, "`first` comes first"
        window = torch.cat((self._tail, hidden), dim=1)
        start = before - self.depth
        return self._propose(tokens, known, window, start, self.cached.decode(start, window.shape[1]))

    def keep(self, rows: Tensor) -> None:
        """Forget all rows of the batch but these."""
        assert self._tail is not None, "`first` comes first"
        self._tail = self._tail[rows]

    def _propose(self, tokens: Tensor, known: Tensor, window: Tensor, start: Tensor, span: Span) -> Tensor:
        """window: [B, W, D], h^0 from position `start` on; columns beyond known - 2 are rubbish."""
        rows = torch.arange(len(known), device=known.device)
        positions = start[:, None] + torch.arange(window.shape[1], device=known.device)
        hidden, guesses = window, []
        for k in range(1, self.depth + 1):
            ahead = tokens.gather(1, (positions + k).clamp(0, tokens.shape[1] - 1))
            hidden = self.cached.predict(k, ahead, hidden, span)
            q = distribution(self.cached.logits(hidden[rows, known - 2 - start]), self.temperature, self.top_p)
            tokens[rows, known + k - 1] = draw(q, self.generator)
            guesses.append(q)
        last = known - start - self.depth + torch.arange(self.depth - 1, device=known.device)[:, None]
        self._tail = window[rows, last.clamp(min=0)].transpose(0, 1)  # before position 0 there is nothing to keep
        return torch.stack(guesses, dim=1)


def verify(p: Tensor, guesses: Tensor, q: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """How many guesses stand, [B], and the token that follows them, [B].

    p: [B, depth + 1, V], the main model's distributions where the guesses stand and after the last; guesses: [B, depth]
    int64; q: [B, depth, V], what they were drawn from. depth may be 0: a plain draw.
    """
    depth = guesses.shape[1]
    places = torch.rand(guesses.shape, generator=generator, dtype=torch.float64).to(p.device)
    chance, drawn = (d.gather(-1, guesses[..., None]).squeeze(-1).double() for d in (p[:, :depth], q))
    stands = (places * drawn < chance).int().cumprod(dim=1).sum(dim=1)
    rows = torch.arange(len(p), device=p.device)
    wanted = p[rows, stands]
    rest = (wanted - torch.cat((q, torch.zeros_like(p[:, :1])), dim=1)[rows, stands]).clamp(min=0)
    # p = q up to rounding leaves nothing over and is rejected with a probability of as little: p itself will do.
    return stands, draw(torch.where(rest.sum(-1, keepdim=True) > 0, rest, wanted), generator)
