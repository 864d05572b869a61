"""Random inputs of every kernel, by name and shape, and the comparison of a kernel with its reference.

`make(name, generator, dtype, **shape)` returns (positional, keyword) arguments of deepv3.kernels.<name>; numbers are
seeded, routing decisions are kept away from ties so that rounding cannot turn them.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import deepv3.kernels as kernels
from deepv3.kernels.testing import TOLERANCES, relative_norm, worst_block

Arguments = tuple[tuple, dict]


class Maker:
    """Tensors of one seed, device and activation format."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str = "cpu") -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self.generator = torch.Generator(device=self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device)
        return values.to(dtype or self.dtype)

    def fp32(self, *shape: int) -> Tensor:
        return self.normal(*shape, dtype=torch.float32)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def angles(self, tokens: int, half: int) -> tuple[Tensor, Tensor]:
        angle = self.fp32(tokens, half) * 10
        return angle.cos(), angle.sin()

    def choices(self, tokens: int, experts: int, top_k: int) -> Tensor:
        """Distinct experts of every token, int32."""
        return self.fp32(tokens, experts).argsort(dim=1)[:, :top_k].int()

    def offsets(self, rows: int, groups: int) -> Tensor:
        """Cumulative ends of groups of random sizes, some of them empty."""
        cuts = self.integers(rows + 1, groups - 1).sort().values
        return torch.cat((cuts, torch.tensor([rows], device=self.device))).int()

    def untied_logits(self, tokens: int, experts: int, groups: int) -> tuple[Tensor, Tensor]:
        """FP32 logits and bias whose biased scores, and sums of two best per group, differ by 1e-5 at least."""
        bias = (torch.rand(experts, generator=self.generator, device=self.device) - 0.5) * 0.02
        step = 0.9 / experts
        logits = torch.empty(tokens, experts, device=self.device)
        todo = torch.arange(tokens, device=self.device)
        while todo.numel():
            places = self.fp32(todo.numel(), experts).argsort(dim=1)
            jitter = torch.rand(places.shape, generator=self.generator, device=self.device) * 0.5
            choice = 0.05 + step * (places + jitter)
            sums = choice.view(todo.numel(), groups, -1)
            sums = sums.topk(min(2, sums.shape[-1]), dim=-1).values.sum(-1).sort(dim=1).values
            logits[todo] = torch.logit((choice - bias).double()).float()
            todo = todo[(sums.diff(dim=1) < 1e-5).any(dim=1)]
        return logits, bias


def rmsnorm(m: Maker, tokens: int, width: int, residual: bool = True) -> Arguments:
    return (m.normal(tokens, width), m.normal(width), 1e-6, m.normal(tokens, width) if residual else None), {}


def rmsnorm_backward(m: Maker, tokens: int, width: int, residual: bool = True) -> Arguments:
    x = m.normal(tokens, width)
    rstd = torch.rsqrt(x.float().square().mean(-1) + 1e-6)
    return (m.normal(tokens, width), x, m.normal(width), rstd, m.normal(tokens, width) if residual else None), {}


def rope_query_(m: Maker, tokens: int, heads: int, nope: int, rope: int, inverse: bool = False) -> Arguments:
    return (m.normal(tokens, heads, nope + rope), *m.angles(tokens, rope // 2), inverse), {}


def assemble_key(m: Maker, tokens: int, heads: int, nope: int, rope: int, v: int) -> Arguments:
    k_rope = m.normal(tokens, 16 + rope)[:, 16:]  # a strided slice, as the model's
    return (m.normal(tokens, heads, nope + v), k_rope, *m.angles(tokens, rope // 2), nope), {}


def assemble_key_backward(m: Maker, tokens: int, heads: int, nope: int, rope: int, v: int) -> Arguments:
    return (m.normal(tokens, heads, nope + rope), m.normal(tokens, heads, v), *m.angles(tokens, rope // 2)), {}


def router_topk(m: Maker, tokens: int, experts: int, top_k: int, groups: int, kept: int) -> Arguments:
    return (*m.untied_logits(tokens, experts, groups), top_k, groups, kept, 2.5), {}


def router_topk_backward(m: Maker, tokens: int, experts: int, top_k: int) -> Arguments:
    return (m.fp32(tokens, top_k), m.fp32(tokens, experts), m.choices(tokens, experts, top_k), 2.5), {}


def balance_loss(m: Maker, sequences: int, seq_len: int, experts: int, top_k: int) -> Arguments:
    return (m.fp32(sequences * seq_len, experts), top_k, seq_len), {}


def balance_loss_backward(m: Maker, sequences: int, seq_len: int, experts: int, top_k: int) -> Arguments:
    return (m.fp32(sequences), m.fp32(sequences * seq_len, experts), top_k, seq_len), {}


def routing_tables(m: Maker, tokens: int, experts: int, top_k: int) -> Arguments:
    return (m.choices(tokens, experts, top_k), experts), {}


def permute(m: Maker, tokens: int, width: int, top_k: int) -> Arguments:
    token_of_slot = torch.arange(tokens * top_k, device=m.device) // top_k
    order = m.fp32(tokens * top_k).argsort()
    return (m.normal(tokens, width), token_of_slot[order].int()), {}


def unpermute(m: Maker, tokens: int, width: int, top_k: int, base: bool = True) -> Arguments:
    slots = m.fp32(tokens * top_k).argsort().view(tokens, top_k).int()
    return (m.normal(tokens * top_k, width), slots, m.normal(tokens, width) if base else None), {}


def swiglu(m: Maker, rows: int, width: int, weight: bool = True) -> Arguments:
    return (m.normal(rows, 2 * width), m.fp32(rows) if weight else None), {}


def swiglu_backward(m: Maker, rows: int, width: int, weight: bool = True, output: bool = True) -> Arguments:
    return (m.normal(rows, width), m.normal(rows, 2 * width), m.fp32(rows) if weight else None, output), {}


def cross_entropy(m: Maker, rows: int, vocabulary: int) -> Arguments:
    labels = m.integers(vocabulary, rows)
    labels[1::3] = -100
    return (m.normal(rows, vocabulary) * 3, labels), {}


def cross_entropy_(m: Maker, rows: int, vocabulary: int) -> Arguments:
    return (*cross_entropy(m, rows, vocabulary)[0], 0.125), {}


def grouped_mm(m: Maker, rows: int, groups: int, n: int, k: int) -> Arguments:
    return (m.normal(rows, k), m.normal(groups, n, k), m.offsets(rows, groups)), {}


def grouped_mm_t(m: Maker, rows: int, groups: int, n: int, k: int) -> Arguments:
    return (m.normal(rows, n), m.normal(groups, n, k), m.offsets(rows, groups)), {}


def grouped_wgrad_(m: Maker, rows: int, groups: int, n: int, k: int, accumulate: bool = False) -> Arguments:
    grad = m.fp32(groups, n, k)
    return (grad, m.normal(rows, n), m.normal(rows, k), m.offsets(rows, groups), accumulate), {}


def dense_wgrad_(m: Maker, rows: int, n: int, k: int, accumulate: bool = False) -> Arguments:
    return (m.fp32(n, k), m.normal(rows, n), m.normal(rows, k), accumulate), {}


def embedding_wgrad_(m: Maker, tokens: int, vocabulary: int, width: int) -> Arguments:
    ids = m.integers(vocabulary, tokens)
    ids[: tokens // 4] = vocabulary // 2  # one token makes up a quarter of the batch
    ids = ids[m.fp32(tokens).argsort()]
    return (m.fp32(vocabulary, width), ids, m.normal(tokens, width)), {}


def adamw_(m: Maker, n: int, step: int | Tensor = 3, param: torch.dtype | None = torch.bfloat16) -> Arguments:
    out = None if param is None else torch.zeros(n, dtype=param, device=m.device)
    state = (m.fp32(n), m.fp32(n), m.normal(n) * 0.1, m.normal(n).square(), out)
    return (*state, 1e-2, 0.9, 0.95, 1e-8, 0.1, step, torch.tensor(0.5, device=m.device)), {}


def sum_of_squares(m: Maker, n: int) -> Arguments:
    return (m.fp32(n),), {}


def make(name: str, maker: Maker, **shape: Any) -> Arguments:
    """Arguments of the kernel `name`."""
    return globals()[name](maker, **shape)


def kernel(name: str) -> Callable[..., Any]:
    """The Triton launcher itself, past the choice by device."""
    reference = getattr(kernels, name).__wrapped__
    return getattr(importlib.import_module("deepv3.kernels." + reference.__module__.rsplit(".", 1)[-1]), name)


def compare(name: str, arguments: Arguments, tolerance: float | None = None, blocks: float = 50.0) -> None:
    """Run kernel and FP64 reference on copies of the arguments; compare what they return and every tensor they wrote.

    Integers must be equal; floats within `tolerance` (by default their format's) by norm, and within `blocks` times
    that in the worst 128 elements.
    """
    positional, keyword = arguments
    ours = [value.clone() if isinstance(value, Tensor) else value for value in positional]
    theirs = [_widen(value) for value in positional]
    returned = _tensors(kernel(name)(*ours, **keyword))
    expected = _tensors(getattr(kernels, name).__wrapped__(*theirs, **keyword))
    pairs = list(zip(returned, expected, strict=True))
    if name.endswith("_"):
        pairs += [(a, b) for a, b in zip(ours, theirs) if isinstance(a, Tensor)]
    assert pairs, f"{name} returned and wrote nothing"
    for place, (actual, wanted) in enumerate(pairs):
        if not actual.is_floating_point():
            assert torch.equal(actual, wanted), f"{name}: integers of result {place} differ"
            continue
        allowed = TOLERANCES[actual.dtype] if tolerance is None else tolerance
        error, worst = relative_norm(actual, wanted), worst_block(actual, wanted)
        assert error <= allowed, f"{name}: result {place} is off by {error:.2e} of its norm, allowed {allowed:.1e}"
        assert worst <= blocks * allowed, f"{name}: a block of result {place} is off by {worst:.2e}"


def _widen(value: Any) -> Any:
    """A copy in FP64; integers and plain numbers as they are."""
    if not isinstance(value, Tensor):
        return value
    return value.double() if value.is_floating_point() else value.clone()


def _tensors(result: Any) -> list[Tensor]:
    """The tensors among what a function returned."""
    values = result if isinstance(result, tuple) else (result,)
    return [value for value in values if isinstance(value, Tensor)]
