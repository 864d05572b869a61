"""What the FP8 GEMMs in Gluon share: tile order, places in the ring, and descriptors made once.

Written for Triton 3.6 (`gemm8` loads them for no other version): products in `gluon8_mm`, weight gradients in
`gluon8_wgrad`, with the contract of `triton8`, their twin. In both, a persistent program per multiprocessor has a
producer warp that brings codes and scales of step after step into a ring of stages, and consumer warpgroups that
multiply 128 products into a fresh accumulator and add it, scaled, in FP32. Full and empty barriers per stage carry the
order; stage and phase are counted alike on both sides. While one consumer adds, another's products keep the tensor
cores busy: what plain Triton does one after the other.
Not in Triton's interpreter: tests run this source as Python instead, with threads for partitions.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

STEP = 128  # products of a step
BAND = 16  # tiles along m that share columns in L2 before the next column of tiles
GL = {torch.bfloat16: gl.bfloat16, torch.float32: gl.float32, torch.float8_e4m3fn: gl.float8e4nv}


@gluon.jit
def place(tile, tiles_m, tiles_n, BAND: gl.constexpr):
    """(row, column) of a tile, as in `triton8`."""
    band = tile // (BAND * tiles_n)
    height = gl.minimum(tiles_m - band * BAND, BAND)
    return band * BAND + tile % (BAND * tiles_n) % height, tile % (BAND * tiles_n) // height


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The stage after this one; the phase turns with every round."""
    wrapped = stage + 1 == STAGES
    return gl.where(wrapped, 0, stage + 1), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def uniform(value):
    """The value of a warp's first lane, for an integer that all lanes share though the compiler cannot see it.

    A loop as long as such a number says is otherwise one that lanes leave at different times: what it counts then
    lives in lanes' registers, and is fetched for every product.
    """
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", "=r,r", [value], dtype=gl.int32, is_pure=True, pack=1
    )


class Address(NamedTuple):
    """What a descriptor needs of a tensor: kept descriptors keep no memory."""

    pointer: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.pointer


@functools.lru_cache(maxsize=4096)
def _described(base: Address, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]) -> Any:
    if len(block) == 1:
        layout = gl.NVMMASharedLayout(0, 32, rank=1)
    else:
        layout = gl.NVMMASharedLayout.get_default_for(list(block), GL[base.dtype])
    return TensorDescriptor(base, list(shape), list(strides), list(block), layout)


def describe(tensor: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]) -> Any:
    """Descriptor of tiles of this memory. Made once per address and shape: making one takes longer than launching."""
    return _described(Address(tensor.data_ptr(), tensor.dtype), shape, strides, block)


def matrix(tensor: Tensor, rows: int, cols: int = STEP) -> Any:
    """A matrix of which a tile is rows x cols."""
    return describe(tensor, tuple(tensor.shape), (tensor.stride(0), 1), (rows, cols))


def flat(scales: Tensor, rows: int) -> Any:
    """Scales [blocks, rows] with rows contiguous as one vector, of which a step takes `rows`: one line of a tile."""
    size = (scales.shape[0] - 1) * scales.stride(0) + scales.shape[1]
    return describe(scales, (size,), (1,), (rows,))
