"""Initial weights (V3 4.2): one table, and values that depend on (seed, global name, expert) only.

Every tensor, and every expert of a stacked tensor, draws from a generator of its own, so a weight's initial value does
not depend on what else exists, in which order, or on which rank. Values are drawn in FP32 and rounded to the weight's
format; CPU and CUDA generators give different values. Tensors on the meta device are left alone.
"""

import hashlib
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

# First match wins. The report gives 0.006 for "all learnable parameters"; norm gains start at 1 (not stated).
TABLE = (
    ("*e_score_correction_bias", "zeros"),
    ("*norm.weight", "ones"),
    ("*", "normal"),
)


def kind_of(name: str) -> str:
    """zeros, ones or normal for a global parameter or buffer name."""
    return next(kind for pattern, kind in TABLE if fnmatchcase(name, pattern))


@torch.no_grad()
def initialise(model: nn.Module, seed: int, std: float, first_expert: int = 0) -> None:
    """Give every parameter and buffer its initial value. first_expert: global number of the first expert held."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            continue
        kind = kind_of(name)
        if kind == "normal":
            draw_(tensor, seed, name, std, first_expert)
        else:
            tensor.fill_(float(kind == "ones"))


@torch.no_grad()
def draw_(tensor: Tensor, seed: int, name: str, std: float, first_expert: int = 0) -> Tensor:
    """N(0, std^2) into `tensor`. A 3-D tensor stacks experts, of which the first is global number first_expert."""
    experts, first = (tensor.unbind(), first_expert) if tensor.dim() == 3 else ((tensor,), 0)
    for number, part in enumerate(experts, first):
        generator = torch.Generator(tensor.device).manual_seed(_stable_seed(seed, name, number))
        part.copy_(torch.randn(part.shape, generator=generator, device=part.device).mul_(std))
    return tensor


def _stable_seed(seed: int, name: str, expert: int) -> int:
    """63 bits that are the same in every process, unlike Python's own hash."""
    digest = hashlib.blake2b(f"{seed}/{name}/{expert}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
