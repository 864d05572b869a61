"""Rotary embedding of queries and assembly of keys for multi-head latent attention (V3 2.1.1): plain torch.

A head's query or key is [nope | rope]: `nope` columns without a position, then `rope` columns in interleaved pairs
(2j, 2j + 1) turned by the angle of frequency j. The rotated part of the key is one row shared by all heads.
"""

import torch
from torch import Tensor

from deepv3.kernels.reference.norm import wide


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn interleaved pairs of x [..., rope]: (a, b) -> (a cos - b sin, a sin + b cos); cos, sin: [..., rope / 2]."""
    even, odd = wide(x[..., 0::2]), wide(x[..., 1::2])
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def rope_query_(q: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the last `rope` columns of every head in place and return q; `inverse` turns back, which is the backward.

    q: [T, H, nope + rope]; cos, sin: [T, rope / 2], FP32.
    """
    if inverse:
        sin = -sin
    rotary = q[..., q.shape[-1] - 2 * cos.shape[-1] :]
    rotary.copy_(rotate(rotary, cos[:, None], sin[:, None]))
    return q


def assemble_key(kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, nope: int | None = None) -> Tensor:
    """k[t, h] = [kv[t, h, :nope] | rotate(k_rope[t])].

    kv: [T, H, nope + v]; k_rope: [T, rope], rows may be strided; cos, sin: [T, rope / 2] FP32; nope: key columns of kv,
    half of its width where not given (V3: nope = v = 128). Returns k [T, H, nope + rope].
    """
    nope = kv.shape[-1] // 2 if nope is None else nope
    rotary = rotate(k_rope, cos, sin)[:, None].expand(-1, kv.shape[1], -1)
    return torch.cat((kv[..., :nope], rotary), dim=-1)


def assemble_key_backward(dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the up-projected [key | value] and of the shared rotary key.

    dk: [T, H, nope + rope]; dv: [T, H, v]. Returns dkv [T, H, nope + v] and dk_rope [T, rope], the latter summed over
    heads in FP32 and turned back.
    """
    nope = dk.shape[-1] - 2 * cos.shape[-1]
    summed = wide(dk[..., nope:]).sum(1)
    return torch.cat((dk[..., :nope], dv), dim=-1), rotate(summed, cos, -sin).to(dk.dtype)
