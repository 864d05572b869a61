"""Sequence-wise balance loss: Triton kernels, one warp a program, and two small sums.

Programs count the raw top-K and add up score shares over a few tokens of one sequence; their sums go through a buffer
[sequences, programs, 2, experts], so the result does not depend on the order in which programs finish. Backward counts
again: cheaper than keeping anything.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepv3.kernels.checks import FP32, cdiv, check, next_power_of_2
from deepv3.kernels.router import ELEMENTS, LOWEST, _first_largest, _ordered

SPAN = 8  # tokens whose statistics one program adds up


@triton.jit
def _shares(logits_ptr, row, mask, experts):
    """logits, sigmoid scores and their share of the token's sum; zeros outside the mask. row: [tokens, 1] int64."""
    logits = tl.load(logits_ptr + row + experts, mask=mask, other=0.0)
    scores = tl.where(mask, tl.sigmoid(logits), 0.0)
    total = tl.sum(scores, axis=1, keep_dims=True)
    return logits, scores, scores / tl.where(total > 0, total, 1.0)


@triton.jit
def _balance_kernel(
    logits_ptr,
    partial_ptr,
    n_experts,
    seq_len,
    TOP_K: tl.constexpr,
    SPAN: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    sequence, span = tl.program_id(1), tl.program_id(0)
    experts = tl.arange(0, EXPERTS)[None, :]
    positions = tl.broadcast_to(experts, (TOKENS, EXPERTS))
    counts = tl.zeros((TOKENS, EXPERTS), dtype=tl.float32)
    shares = tl.zeros((TOKENS, EXPERTS), dtype=tl.float32)
    for first in range(0, SPAN, TOKENS):
        places = span * SPAN + first + tl.arange(0, TOKENS)
        row = (sequence.to(tl.int64) * seq_len + places)[:, None] * n_experts
        mask = (places < seq_len)[:, None] & (experts < n_experts)
        logits, _, share = _shares(logits_ptr, row, mask, experts)
        shares += share
        keys = tl.where(mask, _ordered(logits), LOWEST)
        for _ in tl.static_range(TOP_K):
            _, best = _first_largest(keys, positions)
            here = positions == best
            counts += tl.where(here & mask, 1.0, 0.0)
            keys = tl.where(here, LOWEST, keys)
    out = partial_ptr + (sequence * tl.num_programs(0) + span) * 2 * n_experts + tl.arange(0, EXPERTS)
    tl.store(out, tl.sum(counts, axis=0), mask=tl.arange(0, EXPERTS) < n_experts)
    tl.store(out + n_experts, tl.sum(shares, axis=0), mask=tl.arange(0, EXPERTS) < n_experts)


@triton.jit
def _balance_backward_kernel(
    dloss_ptr,
    logits_ptr,
    fraction_ptr,
    dlogits_ptr,
    n_tokens,
    n_experts,
    seq_len,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    sequences = (tokens // seq_len)[:, None]
    experts = tl.arange(0, EXPERTS)[None, :]
    mask = (tokens < n_tokens)[:, None] & (experts < n_experts)
    row = tokens.to(tl.int64)[:, None] * n_experts
    _, scores, share = _shares(logits_ptr, row, mask, experts)
    fraction = tl.load(fraction_ptr + sequences * n_experts + experts, mask=mask, other=0.0)
    dloss = tl.load(dloss_ptr + sequences, mask=(tokens < n_tokens)[:, None], other=0.0)
    inner = tl.sum(fraction * share, axis=1, keep_dims=True)
    dlogits = dloss / seq_len * (fraction - inner) * share * (1 - scores)
    tl.store(dlogits_ptr + row + experts, dlogits, mask=mask)


def balance_loss(logits: Tensor, top_k: int, seq_len: int) -> Tensor:
    """See `reference.balance.balance_loss`."""
    sums = _statistics(logits, top_k, seq_len)
    return (sums[:, 0] * sums[:, 1]).sum(-1) * (logits.shape[1] / (top_k * seq_len * seq_len))


def balance_loss_backward(dloss: Tensor, logits: Tensor, top_k: int, seq_len: int) -> Tensor:
    """See `reference.balance.balance_loss_backward`."""
    fraction = _statistics(logits, top_k, seq_len)[:, 0] * (logits.shape[1] / (top_k * seq_len))
    n_tokens, n_experts = logits.shape
    check("dloss", dloss, (n_tokens // seq_len,), FP32, logits.device)
    dlogits = torch.empty_like(logits)
    if n_tokens:
        experts = next_power_of_2(n_experts)
        tokens = max(1, 4 * ELEMENTS // experts)
        _balance_backward_kernel[(cdiv(n_tokens, tokens),)](
            dloss, logits, fraction, dlogits, n_tokens, n_experts, seq_len, TOKENS=tokens, EXPERTS=experts
        )
    return dlogits


def _statistics(logits: Tensor, top_k: int, seq_len: int) -> Tensor:
    """Per sequence the raw top-K counts and the sums of score shares: [B, 2, E]."""
    check("logits", logits, (None, None), FP32, logits.device)
    n_tokens, n_experts = logits.shape
    if seq_len < 1 or n_tokens % seq_len:
        raise ValueError(f"logits has {n_tokens} rows, not a multiple of seq_len {seq_len}")
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k is {top_k}, needed 1 to {n_experts} experts")
    sequences, spans = n_tokens // seq_len, cdiv(seq_len, SPAN)
    partial = torch.empty((sequences, spans, 2, n_experts), dtype=torch.float32, device=logits.device)
    if sequences:
        experts = next_power_of_2(n_experts)
        _balance_kernel[(spans, sequences)](
            logits,
            partial,
            n_experts,
            seq_len,
            TOP_K=top_k,
            SPAN=SPAN,
            TOKENS=min(SPAN, max(1, ELEMENTS // experts)),
            EXPERTS=experts,
            num_warps=1,
        )
    return partial.sum(1)
