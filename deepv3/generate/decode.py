"""Prompts to continuations over a cache of latents, one token a pass, or several with speculation: one loop.

1. Prefill all prompts in one go, padded on the right; draw each row's next token.
2. Rows that are done leave the batch and the cache.
3. One pass over the newest token and the guesses after it (none without speculation); the rule of `speculative.verify`
   says how many stand and draws the next token.
4. New guesses; back to 2.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from deepv3.config.schema import ModelConfig
from deepv3.errors import ConfigError
from deepv3.generate.cache import CachedModel
from deepv3.generate.sample import distribution, draw, generate
from deepv3.generate.speculative import Drafter, verify
from deepv3.model.transformer import Transformer


@dataclass(frozen=True)
class Sampling:
    """How to continue. eos: a token that ends a row, None for none. temperature, top_p: see sample.distribution."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    speculative: bool = False
    eos: int | None = None


@dataclass
class Generated:
    """ids: the new tokens of every prompt, the eos that ended it included. stood: guesses of depth 1, 2 ... that stood.

    rounds: row-passes of the main model after the prefill, each of which checked one guess per depth; prompt_tokens
    without padding. Seconds are wall clock: prefill_seconds up to the first token, seconds in all.
    """

    ids: list[list[int]]
    prompt_tokens: int
    stood: list[int] = field(default_factory=list)
    rounds: int = 0
    prefill_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def new_tokens(self) -> int:
        """Tokens generated, over all rows."""
        return sum(map(len, self.ids))

    def describe(self) -> list[str]:
        """Lines for people: speed, and with speculation the acceptance rate."""
        rate = self.new_tokens / self.seconds if self.seconds else 0.0
        lines = [
            f"{self.new_tokens:,} tokens for {len(self.ids)} prompt(s) in {self.seconds:.2f} s: {rate:,.1f} tokens/s "
            f"(prefill of {self.prompt_tokens:,} tokens {self.prefill_seconds:.2f} s)"
        ]
        if self.stood and self.rounds:
            shares = ", ".join(f"depth {k}: {n / self.rounds:.1%}" for k, n in enumerate(self.stood, 1))
            per_pass = 1 + sum(self.stood) / self.rounds
            lines.append(f"acceptance rate {shares}; {per_pass:.2f} tokens a pass of the main model")
        return lines


def check(cfg: ModelConfig, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    """Raises ConfigError for what cannot be generated, before any work."""
    new = sampling.max_new_tokens
    if new < 1:
        raise ConfigError(f"max_new_tokens = {new} must be at least 1")
    if not sampling.temperature >= 0:
        raise ConfigError(f"temperature = {sampling.temperature} must be 0 (the likeliest token) or more")
    if not 0 < sampling.top_p <= 1:
        raise ConfigError(f"top_p = {sampling.top_p} must be above 0 and at most 1 (no nucleus)")
    if not prompts:
        raise ConfigError("there is no prompt; give prompt=TEXT or prompts=[TEXT, TEXT]")
    for number, prompt in enumerate(prompts, 1):
        which = f"prompt {number} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
        if not prompt:
            raise ConfigError(f"{which} is empty: 0 tokens; give at least one character of text")
        longest = cfg.max_position_embeddings
        if len(prompt) + new > longest:
            room = longest - len(prompt)
            mend = f"set max_new_tokens={room} or less, or shorten it" if room > 0 else "shorten the prompt"
            raise ConfigError(
                f"{which} has {len(prompt):,} tokens, + max_new_tokens = {new:,} makes {len(prompt) + new:,}, but "
                f"model.max_position_embeddings = {longest:,}; {mend}"
            )
    if sampling.speculative and not cfg.num_nextn_predict_layers:
        raise ConfigError(
            "speculative = true, but model.num_nextn_predict_layers = 0: this model has no prediction module to guess "
            "with; set speculative=false"
        )


@torch.no_grad()
def decode(model: Transformer, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Generated:
    """Continue each prompt (token ids, any lengths). Greedy rows do not depend on their neighbours, drawn ones on the
    seed and the list of prompts. Raises ConfigError as `check`."""
    check(model.cfg, prompts, sampling)
    training = model.training
    model.eval()
    try:
        return _Batch(model, prompts, sampling).run()
    finally:
        model.train(training)


def without_cache(model: Transformer, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Generated:
    """The same by full forward passes, one prompt after the other: slow, and the measure of `decode`."""
    check(model.cfg, prompts, replace(sampling, speculative=False))
    out = Generated([], sum(map(len, prompts)))
    started = time.perf_counter()
    for prompt in prompts:
        start = torch.tensor([list(prompt)], device=next(model.parameters()).device)
        arguments = (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.seed)
        out.ids.append(_up_to(generate(model, start, *arguments)[0, len(prompt) :].tolist(), sampling.eos))
    out.seconds = time.perf_counter() - started
    return out


def _up_to(ids: list[int], eos: int | None) -> list[int]:
    return ids[: ids.index(eos) + 1] if eos is not None and eos in ids else ids


class _Batch:
    """Rows still going. tokens: [B, L], settled ones, then guesses; known: [B], settled; origin: [B], their prompts."""

    def __init__(self, model: Transformer, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        self.sampling, self.prompts = sampling, prompts
        device = next(model.parameters()).device
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.depth = len(model.mtp) if sampling.speculative else 0
        most = max(map(len, prompts)) + sampling.max_new_tokens + self.depth
        self.tokens = torch.zeros(len(prompts), most + self.depth + 1, dtype=torch.int64, device=device)
        for row, prompt in zip(self.tokens, prompts):
            row[: len(prompt)] = torch.tensor(prompt)
        self.known = self.lengths.clone()
        self.origin = torch.arange(len(prompts), device=device)
        self.cached = CachedModel(model, len(prompts), most, mtp=self.depth > 0)
        self.generator = torch.Generator().manual_seed(sampling.seed)
        arguments = (self.cached, sampling.temperature, sampling.top_p, self.generator)
        self.drafter = Drafter(*arguments) if self.depth else None

    def run(self) -> Generated:
        started = time.perf_counter()
        out = Generated([[] for _ in self.prompts], int(self.lengths.sum()), [0] * self.depth)
        q = self._prefill()
        out.prefill_seconds = time.perf_counter() - started
        while True:
            q = self._retire(out, q)
            if not len(self.known):
                out.seconds = time.perf_counter() - started
                return out
            q, stands = self._pass(q)
            out.rounds += len(stands)
            out.stood = [n + sum(s > k for s in stands) for k, n in enumerate(out.stood)]

    def _prefill(self) -> Tensor | None:
        """Step 1. Returns what the first guesses were drawn from."""
        longest = int(self.lengths.max())
        span = self.cached.prefill(longest)
        hidden = self.cached.trunk(self.tokens[:, :longest], span)
        rows = torch.arange(len(self.known), device=self.known.device)
        p = self._distribution(self.cached.logits(hidden[rows, self.lengths - 1]))
        self.tokens[rows, self.known] = draw(p, self.generator)
        self.known = self.known + 1
        return self.drafter.first(self.tokens, self.known, hidden, span) if self.drafter else None

    def _retire(self, out: Generated, q: Tensor | None) -> Tensor | None:
        """Step 2: rows with enough tokens or an eos are copied out; returns q of those that stay."""
        places = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        new = (places >= self.lengths[:, None]) & (places < self.known[:, None])
        done = self.known - self.lengths >= self.sampling.max_new_tokens
        if self.sampling.eos is not None:
            done |= (new & (self.tokens == self.sampling.eos)).any(dim=1)
        if not done.any():
            return q
        for row in done.nonzero()[:, 0].tolist():
            ids = self.tokens[row][new[row]].tolist()[: self.sampling.max_new_tokens]
            out.ids[int(self.origin[row])] = _up_to(ids, self.sampling.eos)
        stay = (~done).nonzero()[:, 0]
        self.tokens, self.known, self.lengths = self.tokens[stay], self.known[stay], self.lengths[stay]
        self.origin = self.origin[stay]
        self.cached.keep(stay)
        if self.drafter is None or q is None:
            return None
        self.drafter.keep(stay)
        return q[stay]

    def _pass(self, q: Tensor | None) -> tuple[Tensor | None, list[int]]:
        """Steps 3 and 4. Returns what the new guesses were drawn from, and how many old ones stood in each row."""
        before, rows = self.known, torch.arange(len(self.known), device=self.known.device)
        places = before[:, None] - 1 + torch.arange(1 + self.depth, device=before.device)
        window = self.tokens.gather(1, places)
        hidden = self.cached.trunk(window, self.cached.decode(before - 1, 1 + self.depth))
        p = self._distribution(self.cached.logits(hidden))
        stands, token = verify(p, window[:, 1:], p[:, :0] if q is None else q, self.generator)
        self.tokens[rows, before + stands] = token
        self.known = before + stands + 1
        q = self.drafter.next(self.tokens, self.known, hidden, before) if self.drafter else None
        return q, stands.tolist()

    def _distribution(self, logits: Tensor) -> Tensor:
        return distribution(logits, self.sampling.temperature, self.sampling.top_p)
