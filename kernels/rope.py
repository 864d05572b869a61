"""Rotary queries in place, key assembly and its backward for multi-head latent attention: Triton kernels.

Queries: a program takes 64 heads of any tokens and touches the rotated columns only. Keys: a program takes one token
and up to 32 heads; the shared rotary row is turned once and stored to every head. Backward: a program takes one token
and all its heads, so that the sum over heads happens in registers, in FP32 and in a fixed order.
Interleaved pairs stay in 16-byte loads: a tile [rows, rope] is split into its even and odd columns in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepv3.kernels.checks import ACTIVATIONS, FP32, cdiv, check, next_power_of_2

QUERY_ROWS = 64  # 64 rows x 64 columns of BF16 are 4 loads of 16 bytes per lane of 4 warps
KEY_HEADS = 32


@triton.jit
def _turn(even, odd, cos, sin):
    return even * cos - odd * sin, even * sin + odd * cos


@triton.jit
def _rope_query_kernel(
    q_ptr,
    cos_ptr,
    sin_ptr,
    n_rows,
    n_heads,
    nope,
    half,
    token_stride,
    head_stride,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = rows // n_heads
    heads = (rows - tokens * n_heads).to(tl.int64)
    tokens = tokens.to(tl.int64)
    row_mask = rows < n_rows
    cols = tl.arange(0, 2 * HALF)
    mask = row_mask[:, None] & (cols < 2 * half)[None, :]
    address = q_ptr + (tokens * token_stride + heads * head_stride + nope)[:, None] + cols[None, :]
    q = tl.load(address, mask=mask, other=0.0).to(tl.float32)

    pairs = tl.arange(0, HALF)
    table_mask = row_mask[:, None] & (pairs < half)[None, :]
    table = tokens[:, None] * half + pairs[None, :]
    cos = tl.load(cos_ptr + table, mask=table_mask, other=0.0)
    sin = tl.load(sin_ptr + table, mask=table_mask, other=0.0)
    if INVERSE:
        sin = -sin
    even, odd = tl.split(tl.reshape(q, (ROWS, HALF, 2)))
    even, odd = _turn(even, odd, cos, sin)
    turned = tl.reshape(tl.join(even, odd), (ROWS, 2 * HALF))
    tl.store(address, turned.to(q_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _assemble_key_kernel(
    kv_ptr,
    k_rope_ptr,
    cos_ptr,
    sin_ptr,
    k_ptr,
    n_heads,
    nope,
    half,
    kv_token_stride,
    kv_head_stride,
    k_rope_stride,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    head_mask = (heads < n_heads)[:, None]
    cols = tl.arange(0, NOPE)
    mask = head_mask & (cols < nope)[None, :]
    source = kv_ptr + token * kv_token_stride + heads[:, None] * kv_head_stride + cols[None, :]
    plain = tl.load(source, mask=mask, other=0.0)

    pairs = tl.arange(0, HALF)
    pair_mask = pairs < half
    even = tl.load(k_rope_ptr + token * k_rope_stride + 2 * pairs, mask=pair_mask, other=0.0).to(tl.float32)
    odd = tl.load(k_rope_ptr + token * k_rope_stride + 2 * pairs + 1, mask=pair_mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * half + pairs, mask=pair_mask, other=0.0)
    sin = tl.load(sin_ptr + token * half + pairs, mask=pair_mask, other=0.0)
    even, odd = _turn(even, odd, cos, sin)
    turned = tl.interleave(even, odd).to(k_ptr.dtype.element_ty)

    row = k_ptr + (token * n_heads + heads)[:, None] * (nope + 2 * half)
    tl.store(row + cols[None, :], plain, mask=mask)
    rope_cols = tl.arange(0, 2 * HALF)
    spread = tl.broadcast_to(turned[None, :], (HEADS, 2 * HALF))
    tl.store(row + nope + rope_cols[None, :], spread, mask=head_mask & (rope_cols < 2 * half)[None, :])


@triton.jit
def _assemble_key_backward_kernel(
    dk_ptr,
    dv_ptr,
    cos_ptr,
    sin_ptr,
    dkv_ptr,
    dk_rope_ptr,
    n_heads,
    nope,
    half,
    width_v,
    dk_token_stride,
    dk_head_stride,
    dv_token_stride,
    dv_head_stride,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH_V: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, NOPE)
    v_cols = tl.arange(0, WIDTH_V)
    rope_cols = tl.arange(0, 2 * HALF)
    total = tl.zeros((HEADS, 2 * HALF), dtype=tl.float32)
    for first in range(0, n_heads, HEADS):
        heads = first + tl.arange(0, HEADS)
        head_mask = (heads < n_heads)[:, None]
        dk_row = dk_ptr + token * dk_token_stride + heads[:, None] * dk_head_stride
        dv_row = dv_ptr + token * dv_token_stride + heads[:, None] * dv_head_stride
        mask = head_mask & (cols < nope)[None, :]
        v_mask = head_mask & (v_cols < width_v)[None, :]
        rope_mask = head_mask & (rope_cols < 2 * half)[None, :]
        plain = tl.load(dk_row + cols[None, :], mask=mask, other=0.0)
        values = tl.load(dv_row + v_cols[None, :], mask=v_mask, other=0.0)
        total += tl.load(dk_row + nope + rope_cols[None, :], mask=rope_mask, other=0.0).to(tl.float32)
        out = dkv_ptr + (token * n_heads + heads)[:, None] * (nope + width_v)
        tl.store(out + cols[None, :], plain, mask=mask)
        tl.store(out + nope + v_cols[None, :], values, mask=v_mask)

    pairs = tl.arange(0, HALF)
    pair_mask = pairs < half
    cos = tl.load(cos_ptr + token * half + pairs, mask=pair_mask, other=0.0)
    sin = tl.load(sin_ptr + token * half + pairs, mask=pair_mask, other=0.0)
    even, odd = tl.split(tl.reshape(tl.sum(total, axis=0), (HALF, 2)))
    even, odd = _turn(even, odd, cos, -sin)
    turned = tl.interleave(even, odd).to(dk_rope_ptr.dtype.element_ty)
    tl.store(dk_rope_ptr + token * (2 * half) + rope_cols, turned, mask=rope_cols < 2 * half)


def rope_query_(q: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """See `reference.rope.rope_query_`. Tokens and heads of q may be strided."""
    check("q", q, (None, None, None), ACTIVATIONS, q.device, contiguous=False)
    n_tokens, n_heads, width = q.shape
    half = _check_tables(cos, sin, n_tokens, width, q)
    if q.numel():
        _rope_query_kernel[(cdiv(n_tokens * n_heads, QUERY_ROWS),)](
            q,
            cos,
            sin,
            n_tokens * n_heads,
            n_heads,
            width - 2 * half,
            half,
            q.stride(0),
            q.stride(1),
            INVERSE=inverse,
            ROWS=QUERY_ROWS,
            HALF=next_power_of_2(half),
        )
    return q


def assemble_key(kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, nope: int | None = None) -> Tensor:
    """See `reference.rope.assemble_key`. Tokens and heads of kv and rows of k_rope may be strided."""
    check("kv", kv, (None, None, None), ACTIVATIONS, kv.device, contiguous=False)
    n_tokens, n_heads, width = kv.shape
    nope = width // 2 if nope is None else nope
    if not 0 < nope <= width:
        raise ValueError(f"nope is {nope}, needed 1 to kv's width {width}")
    check("k_rope", k_rope, (n_tokens, None), (kv.dtype,), kv.device, contiguous=False)
    half = _check_tables(cos, sin, n_tokens, k_rope.shape[1], kv)
    if k_rope.shape[1] != 2 * half:
        raise ValueError(f"k_rope has {k_rope.shape[1]} columns, cos and sin turn {2 * half}")
    k = torch.empty((n_tokens, n_heads, nope + 2 * half), dtype=kv.dtype, device=kv.device)
    if k.numel():
        heads = min(KEY_HEADS, next_power_of_2(n_heads))
        _assemble_key_kernel[(n_tokens, cdiv(n_heads, heads))](
            kv,
            k_rope,
            cos,
            sin,
            k,
            n_heads,
            nope,
            half,
            kv.stride(0),
            kv.stride(1),
            k_rope.stride(0),
            HEADS=heads,
            NOPE=next_power_of_2(nope),
            HALF=next_power_of_2(half),
        )
    return k


def assemble_key_backward(dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.rope.assemble_key_backward`. Tokens and heads of dk and dv may be strided."""
    check("dk", dk, (None, None, None), ACTIVATIONS, dk.device, contiguous=False)
    n_tokens, n_heads, width = dk.shape
    check("dv", dv, (n_tokens, n_heads, None), (dk.dtype,), dk.device, contiguous=False)
    half = _check_tables(cos, sin, n_tokens, width - 1, dk)
    nope, width_v = width - 2 * half, dv.shape[2]
    dkv = torch.empty((n_tokens, n_heads, nope + width_v), dtype=dk.dtype, device=dk.device)
    dk_rope = torch.empty((n_tokens, 2 * half), dtype=dk.dtype, device=dk.device)
    if dkv.numel():
        _assemble_key_backward_kernel[(n_tokens,)](
            dk,
            dv,
            cos,
            sin,
            dkv,
            dk_rope,
            n_heads,
            nope,
            half,
            width_v,
            dk.stride(0),
            dk.stride(1),
            dv.stride(0),
            dv.stride(1),
            HEADS=min(KEY_HEADS, next_power_of_2(n_heads)),
            NOPE=next_power_of_2(nope),
            HALF=next_power_of_2(half),
            WIDTH_V=next_power_of_2(width_v),
        )
    return dkv, dk_rope


def _check_tables(cos: Tensor, sin: Tensor, n_tokens: int, widest: int, first: Tensor) -> int:
    """Check cos and sin [T, rope / 2]; returns rope / 2, of which two must fit into `widest` columns."""
    check("cos", cos, (n_tokens, None), FP32, first.device)
    check("sin", sin, tuple(cos.shape), FP32, first.device)
    half = cos.shape[1]
    if not 0 < 2 * half <= widest:
        raise ValueError(f"cos and sin turn {2 * half} columns, the heads have room for {widest}")
    return half
