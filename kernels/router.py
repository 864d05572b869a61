"""Router: choice of experts, their gates, and the gates' backward. Triton kernels, one warp a program.

Scores are compared as integers that order like the floats (`_ordered`), so a maximum over a warp is one instruction,
ties go to the smaller index by a second one, and NaN has a place (largest) instead of poisoning the choice.
Experts lie in registers as [tokens, groups, experts per group], padded to powers of two; the order is the experts' own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepv3.kernels.activation import sigmoid
from deepv3.kernels.checks import FP32, INT32, cdiv, check, next_power_of_2

LOWEST = tl.constexpr(-(2**31))  # below `_ordered` of every float, -inf included
TINY = tl.constexpr(1e-20)
ELEMENTS = 256  # scores one warp holds: 8 a lane


@triton.jit
def _ordered(x):
    """int32 that compares as the FP32 does: negative floats have their magnitude bits turned over."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # + 0.0 makes -0 into +0, which equals it
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _first_largest(keys, positions):
    """(largest key, smallest position that has it) along the last axis."""
    best = tl.max(keys, axis=-1, keep_dims=True)
    return best, tl.min(tl.where(keys == best, positions, 0x7FFFFFFF), axis=-1, keep_dims=True)


@triton.jit
def _two_largest(first, second, other_first, other_second):
    """The two largest of two descending pairs."""
    return tl.maximum(first, other_first), tl.maximum(tl.minimum(first, other_first), tl.maximum(second, other_second))


@triton.jit
def _number(keys):
    """The FP32 of which this is `_ordered`; -inf for LOWEST."""
    bits = tl.where(keys < 0, keys ^ 0x7FFFFFFF, keys)
    return tl.where(keys == LOWEST, float("-inf"), bits.to(tl.float32, bitcast=True))


@triton.jit
def _best_groups(keys, WANTED: tl.constexpr, COLS: tl.constexpr):
    """[tokens, COLS]: the WANTED groups whose two best choices have the largest sums; the rest of COLS is undefined.

    keys: `_ordered` choices [tokens, groups, size], LOWEST in padding.
    """
    TOKENS: tl.constexpr = keys.shape[0]
    GROUPS: tl.constexpr = keys.shape[1]
    SIZE: tl.constexpr = keys.shape[2]
    first, second = tl.reduce((keys, tl.full(keys.shape, LOWEST, tl.int32)), 2, _two_largest)
    score = _number(first)
    if SIZE > 1:
        score += _number(second)
    group_keys = _ordered(score)
    groups = tl.broadcast_to(tl.arange(0, GROUPS)[None, :], (TOKENS, GROUPS))
    cols = tl.arange(0, COLS)[None, :]
    best = tl.zeros((TOKENS, COLS), dtype=tl.int32)
    for place in tl.static_range(WANTED):
        _, chosen = _first_largest(group_keys, groups)
        best = tl.where(cols == place, chosen, best)
        group_keys = tl.where(groups == chosen, LOWEST, group_keys)
    return best


@triton.jit
def _choices(logits_ptr, bias_ptr, row, experts, real):
    """`_ordered` choices of these experts, LOWEST where not real; row: of the logits, broadcasts."""
    logits = tl.load(logits_ptr + row + experts, mask=real, other=0.0)
    bias = tl.load(bias_ptr + experts, mask=real, other=0.0)
    return tl.where(real, _ordered(sigmoid(logits) + bias), LOWEST)


@triton.jit
def _router_topk_kernel(
    logits_ptr,
    bias_ptr,
    indices_ptr,
    weights_ptr,
    n_tokens,
    n_experts,
    n_group,
    group_size,
    scale,
    TOP_K: tl.constexpr,
    GROUPS_KEPT: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    COLS: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tokens.to(tl.int64) * n_experts
    groups = tl.arange(0, GROUPS)[None, :, None]
    within = tl.arange(0, SIZE)[None, None, :]
    inside = (tokens < n_tokens)[:, None, None] & (within < group_size)
    experts = tl.broadcast_to(groups * group_size + within, (TOKENS, GROUPS, SIZE))
    keys = _choices(logits_ptr, bias_ptr, row[:, None, None], experts, inside & (groups < n_group))
    if GROUPS_KEPT > 0:  # read the groups that stay again: fewer numbers to look through
        KEPT: tl.constexpr = triton.next_power_of_2(GROUPS_KEPT)
        best = _best_groups(keys, GROUPS_KEPT, KEPT)
        experts = best[:, :, None] * group_size + within
        wanted = tl.arange(0, KEPT)[None, :, None] < GROUPS_KEPT
        keys = _choices(logits_ptr, bias_ptr, row[:, None, None], experts, inside & wanted)

    keys = tl.reshape(keys, (TOKENS, keys.shape[1] * SIZE))
    experts = tl.reshape(experts, keys.shape)
    cols = tl.arange(0, COLS)[None, :]
    chosen = tl.zeros((TOKENS, COLS), dtype=tl.int32)
    for k in tl.static_range(TOP_K):
        _, best = _first_largest(keys, experts)
        chosen = tl.where(cols == k, best, chosen)
        keys = tl.where(experts == best, LOWEST, keys)

    out_mask = (tokens < n_tokens)[:, None] & (cols < TOP_K)
    scores = sigmoid(tl.load(logits_ptr + row[:, None] + chosen, mask=out_mask, other=0.0))
    scores = tl.where(out_mask, scores, 0.0)
    weights = scores / (tl.sum(scores, axis=1, keep_dims=True) + TINY) * scale
    out = tokens.to(tl.int64)[:, None] * TOP_K + cols
    tl.store(indices_ptr + out, chosen, mask=out_mask)
    tl.store(weights_ptr + out, weights, mask=out_mask)


@triton.jit
def _router_topk_backward_kernel(
    dweights_ptr,
    logits_ptr,
    indices_ptr,
    dlogits_ptr,
    n_tokens,
    n_experts,
    scale,
    TOP_K: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row_mask = tokens < n_tokens
    experts = tl.arange(0, EXPERTS)[None, :]
    mask = row_mask[:, None] & (experts < n_experts)
    row = tokens.to(tl.int64)
    address = row[:, None] * n_experts + experts
    scores = sigmoid(tl.load(logits_ptr + address, mask=mask, other=0.0))
    chosen = tl.zeros((TOKENS, EXPERTS), dtype=tl.int32)
    dweights = tl.zeros((TOKENS, EXPERTS), dtype=tl.float32)
    for k in tl.static_range(TOP_K):  # spread the K values over the experts' columns
        index = tl.load(indices_ptr + row * TOP_K + k, mask=row_mask, other=-1)
        value = tl.load(dweights_ptr + row * TOP_K + k, mask=row_mask, other=0.0)
        here = experts == index[:, None]
        chosen = tl.where(here, 1, chosen)
        dweights = tl.where(here, value[:, None], dweights)
    picked = tl.where(chosen != 0, scores, 0.0)
    total = tl.sum(picked, axis=1, keep_dims=True) + TINY
    inner = tl.sum(dweights * picked, axis=1, keep_dims=True) / total
    dlogits = scale * (dweights - inner) / total * picked * (1 - scores)
    tl.store(dlogits_ptr + address, dlogits, mask=mask)


def router_topk(
    logits: Tensor, bias: Tensor, top_k: int, n_group: int, topk_group: int, scale: float
) -> tuple[Tensor, Tensor]:
    """See `reference.router.router_topk`."""
    check("logits", logits, (None, None), FP32, logits.device)
    n_tokens, n_experts = logits.shape
    check("bias", bias, (n_experts,), FP32, logits.device)
    if n_group < 1 or n_experts % n_group or not 1 <= topk_group <= n_group:
        raise ValueError(
            f"{n_experts} experts, {n_group} groups, {topk_group} kept: n_group must divide the experts, "
            "topk_group lie in 1 to n_group"
        )
    if not 1 <= top_k <= topk_group * (n_experts // n_group):
        raise ValueError(f"top_k is {top_k}, the groups that stay hold {topk_group * (n_experts // n_group)} experts")
    indices = torch.empty((n_tokens, top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((n_tokens, top_k), dtype=torch.float32, device=logits.device)
    if n_tokens:
        limited = topk_group < n_group
        groups = n_group if limited else 1
        padded_groups, padded_size = next_power_of_2(groups), next_power_of_2(n_experts // groups)
        tokens = max(1, ELEMENTS // (padded_groups * padded_size))
        _router_topk_kernel[(cdiv(n_tokens, tokens),)](
            logits,
            bias,
            indices,
            weights,
            n_tokens,
            n_experts,
            groups,
            n_experts // groups,
            scale,
            TOP_K=top_k,
            GROUPS_KEPT=topk_group if limited else 0,
            TOKENS=tokens,
            GROUPS=padded_groups,
            SIZE=padded_size,
            COLS=next_power_of_2(top_k),
            num_warps=1,
        )
    return indices, weights


def router_topk_backward(dweights: Tensor, logits: Tensor, indices: Tensor, scale: float) -> Tensor:
    """See `reference.router.router_topk_backward`."""
    check("dweights", dweights, (None, None), FP32, dweights.device)
    n_tokens, top_k = dweights.shape
    check("logits", logits, (n_tokens, None), FP32, dweights.device)
    check("indices", indices, (n_tokens, top_k), INT32, dweights.device)
    n_experts = logits.shape[1]
    dlogits = torch.empty_like(logits)
    if dlogits.numel():
        experts = next_power_of_2(n_experts)
        tokens = max(1, 4 * ELEMENTS // experts)
        _router_topk_backward_kernel[(cdiv(n_tokens, tokens),)](
            dweights,
            logits,
            indices,
            dlogits,
            n_tokens,
            n_experts,
            scale,
            TOP_K=top_k,
            TOKENS=tokens,
            EXPERTS=experts,
        )
    return dlogits
