"""Rotary position embedding of the decoupled query and key parts, with YaRN (V3 2.1.1, 4.3).

Angles are computed in FP32 the way every reader of exported weights computes them (FP32 frequency times position), so a
trained model and its export see the same angles. Pairs are interleaved, (2j, 2j + 1), as in the released weights.
"""

import math
from typing import Any

import torch
from torch import Tensor

import deepv3.kernels as kernels
from deepv3.config.schema import ModelConfig, RopeScaling


def inverse_frequencies(width: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position of every pair: theta^(-2j / width), slow pairs divided by YaRN's factor. [width / 2] FP32.

    YaRN (Peng 2023): pairs that turn more than beta_fast times over the original context keep their frequency, pairs
    that turn less than beta_slow times are divided by factor, a linear ramp over the pair index lies between. V3:
    theta 10000, width 64, 4096 tokens put the ramp between pairs 10 and 23.
    """
    pairs = torch.arange(0, width, 2, dtype=torch.float32)
    wavelength = theta ** (pairs / width)
    plain = 1.0 / wavelength
    if scaling is None:
        return plain

    def pair_of(turns: float) -> float:
        context = scaling.original_max_position_embeddings
        return width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_of(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_of(scaling.beta_slow)), width - 1)
    span = high - low if high > low else 0.001
    stretched = torch.clamp((torch.arange(width // 2, dtype=torch.float32) - low) / span, 0, 1)
    return 1.0 / (scaling.factor * wavelength) * stretched + plain * (1 - stretched)


def softmax_scale(cfg: ModelConfig) -> float:
    """(d_h + d_h^R)^-1/2 (V3 Eq. 10), times (0.1 m ln s + 1)^2 with YaRN: 1.8739 for s = 40."""
    scale = (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim) ** -0.5
    yarn = cfg.rope_scaling
    if yarn is not None and yarn.factor > 1:
        scale *= (0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1.0) ** 2
    return scale


class RotaryTables:
    """cos and sin per token, built on first use and kept for the last shape: no buffers, so nothing to load or move."""

    def __init__(self, cfg: ModelConfig) -> None:
        self._frequencies = inverse_frequencies(cfg.qk_rope_head_dim, cfg.rope_theta, cfg.rope_scaling)
        self._key: tuple[int, int, torch.device] | None = None
        self._tables: tuple[Tensor, Tensor] | None = None

    def __call__(self, batch: int, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos, sin: [batch * seq_len, width / 2] FP32; positions restart at 0 in every sequence."""
        key = (batch, seq_len, device)
        if self._tables is None or self._key != key:
            angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), self._frequencies).repeat(batch, 1)
            self._key, self._tables = key, (angles.cos().to(device), angles.sin().to(device))
        return self._tables


class _RotateQuery(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.heads, ctx.tables = heads, (cos, sin)
        ctx.mark_dirty(q)
        kernels.rope_query_(q.view(q.shape[0], heads, -1), cos, sin)
        return q

    @staticmethod
    def backward(ctx: Any, dq: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # In place: the gradient was made for this function alone, attention is the only reader of q.
        dq = dq.contiguous()
        kernels.rope_query_(dq.view(dq.shape[0], ctx.heads, -1), *ctx.tables, inverse=True)
        return dq, None, None, None


def rotate_query(q: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last part of every head of q [T, heads * (nope + rope)] in place."""
    return _RotateQuery.apply(q, heads, cos, sin)


class _AssembleKey(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kv: Tensor, k_rope: Tensor, heads: int, nope: int, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.tables = (cos, sin)
        kv = kv.view(kv.shape[0], heads, -1)
        return kernels.assemble_key(kv, k_rope, cos, sin, nope), kv[..., nope:]

    @staticmethod
    def backward(ctx: Any, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dkv, dk_rope = kernels.assemble_key_backward(dk.contiguous(), dv.contiguous(), *ctx.tables)
        return dkv.flatten(1), dk_rope, None, None, None, None


def assemble_key(kv: Tensor, k_rope: Tensor, heads: int, nope: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values from kv [T, heads * (nope + v)] and the shared rotary key k_rope [T, rope], not yet rotated.

    Returns k [T, heads, nope + rope] and v [T, heads, v], the latter a view of kv.
    """
    return _AssembleKey.apply(kv, k_rope, heads, nope, cos, sin)
