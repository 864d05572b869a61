"""How likely a model finds given tokens: rows of context and targets, scored in batches.

Rows are sorted by length and padded on the right, which a causal model does not see. Each target's probability is
taken from logits in FP32; logits of contexts are never made.

A text longer than the model's window is cut as evaluation harnesses do it: every token is a target once, windows do not
overlap, and the last one reaches back so far that it is full. With a window of 4 and the tokens 0 ... 8 after `<eos>`:

    input  <eos> 0 1 2   3 4 5 6    4 5 6 7
    target     0 1 2 3   4 5 6 7          8
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

import deepv3.kernels as kernels
from deepv3.model.transformer import Transformer

BATCH_TOKENS = 8192  # of one forward pass, padding included

# Decoding, which lives in generate/ and comes from outside:
# (model, prompts, max_new_tokens, temperature, top_p, eos) -> new tokens of each prompt, up to and with the eos
Extend = Callable[[Transformer, list[list[int]], int, float, float, int], list[list[int]]]


class Row(NamedTuple):
    """context: at least one token; targets: what follows, possibly nothing."""

    context: list[int]
    targets: list[int]

    def inputs(self) -> list[int]:
        """What the model reads: all but the last token."""
        return [*self.context, *self.targets][:-1]


class Score(NamedTuple):
    """Sum of the targets' log-probabilities, nats, and whether each target was the likeliest token."""

    logprob: float
    greedy: bool


def windows(ids: Sequence[int], start: int, length: int) -> list[Row]:
    """A whole text as rows of at most `length` inputs; `start` is the token in front of it."""
    whole = [start, *ids]
    rows = []
    for begin in range(0, len(ids), length):
        end = min(begin + length, len(ids))
        rows.append(Row(whole[max(0, end - length) : begin + 1], whole[begin + 1 : end + 1]))
    return rows


def fitted(context: Sequence[int], targets: Sequence[int], length: int) -> Row:
    """A row of at most `length` inputs: too long a context loses its beginning, too long targets theirs."""
    whole = [*context, *targets][-(length + 1) :]
    kept = min(len(targets), len(whole) - 1)
    return Row(whole[: len(whole) - kept], whole[len(whole) - kept :])


def score(model: Transformer, rows: Sequence[Row], batch_tokens: int = BATCH_TOKENS) -> list[Score]:
    """Scores of the rows, in their order. The model is in evaluation mode."""
    scores = [Score(0.0, True)] * len(rows)
    for numbers in _batches(rows, batch_tokens):
        for number, result in zip(numbers, _score([rows[n] for n in numbers], model)):
            scores[number] = result
    return scores


def _batches(rows: Sequence[Row], batch_tokens: int) -> Iterable[list[int]]:
    """Numbers of the rows with targets, longest first, as many as fit."""
    order = sorted((n for n, row in enumerate(rows) if row.targets), key=lambda n: -len(rows[n].inputs()))
    while order:
        count = max(1, batch_tokens // len(rows[order[0]].inputs()))
        yield order[:count]
        order = order[count:]


@torch.no_grad()
def _score(rows: Sequence[Row], model: Transformer) -> list[Score]:
    device = next(model.parameters()).device
    inputs = [row.inputs() for row in rows]
    width = len(inputs[0])
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    for padded, ids in zip(tokens, inputs):
        padded[: len(ids)] = torch.tensor(ids)
    layout = model.layout(len(rows), width, device)
    hidden, _ = model.trunk(tokens.to(device), layout)
    places = [n * width + len(row.context) - 1 + i for n, row in enumerate(rows) for i in range(len(row.targets))]
    labels = torch.tensor([target for row in rows for target in row.targets], device=device)
    losses, likeliest = [], []
    for chunk, wanted in zip(
        hidden[torch.tensor(places, device=device)].split(model.lm_head.chunk), labels.split(model.lm_head.chunk)
    ):
        logits = model.lm_head(chunk)
        losses.append(kernels.cross_entropy(logits, wanted))
        likeliest.append(logits.argmax(dim=-1) == wanted)
    parts = [len(row.targets) for row in rows]
    per_row = zip(torch.cat(losses).double().cpu().split(parts), torch.cat(likeliest).cpu().split(parts))
    return [Score(-loss.sum().item(), bool(right.all())) for loss, right in per_row]
