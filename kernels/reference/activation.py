"""SwiGLU, optionally weighted per row by the router's gate: plain torch."""

import torch
from torch import Tensor

from deepv3.kernels.reference.norm import wide


def swiglu(h: Tensor, weight: Tensor | None = None) -> Tensor:
    """y = silu(gate) * up * weight with h = [gate | up]. h: [R, 2I]; weight: [R] FP32. Returns [R, I] in h's format."""
    gate, up = wide(h).chunk(2, dim=-1)
    y = gate * torch.sigmoid(gate) * up  # in the order of the backward, which makes the same bits
    return (y if weight is None else y * weight[:, None]).to(h.dtype)


def swiglu_backward(
    dy: Tensor, h: Tensor, weight: Tensor | None = None, want_output: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `swiglu`, and on request its output again, which the weight gradient of the next matrix needs.

    dy: [R, I]; h: [R, 2I]. Returns dh [R, 2I], dweight [R] FP32 = sum_i dy * silu(gate) * up (None without weight) and
    y [R, I] (None unless want_output).
    """
    gate, up = wide(h).chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    wide_dy = wide(dy)
    dact = wide_dy if weight is None else wide_dy * weight[:, None]
    dgate = dact * up * (sigmoid + silu * (1 - sigmoid))
    dh = torch.cat((dgate, dact * silu), dim=-1).to(h.dtype)
    act = silu * up
    dweight = None if weight is None else (wide_dy * act).sum(-1)
    output = (act if weight is None else act * weight[:, None]).to(h.dtype) if want_output else None
    return dh, dweight, output
