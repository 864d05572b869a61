"""FP8 GEMMs in Gluon: one warp that loads, two warpgroups that multiply. Same contract as `triton8`, its twin.

Written for Triton 3.6 (`gemm8` loads it for no other version); weight gradients are in `gluon8_wgrad`. A persistent
program per multiprocessor has
1. a producer warp with 40 registers: brings codes and scales of step after step into a ring of stages;
2. two consumer warpgroups with 232, each with 64 rows of a 128 x 128 tile: multiply 128 products into a fresh
   accumulator, hand the stage back, then scale and add in FP32. While one adds, the other's products keep the tensor
   cores busy: what plain Triton does one after the other. In turns, they are made to: one issues after the other.
Full and empty barriers per stage carry the order; stage and phase are counted alike on both sides. Results of `mm`
leave through shared memory, written while the next tile is multiplied.
Not in Triton's interpreter: tests run this source as Python instead, with threads for partitions.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from deepv3.kernels.checks import multiprocessors

M = 128  # rows of a tile: two warpgroups of 64
STEP = 128  # products of a step
BAND = 16  # tiles along m that share columns in L2 before the next column of tiles
GL = {torch.bfloat16: gl.bfloat16, torch.float32: gl.float32, torch.float8_e4m3fn: gl.float8e4nv}


class Tile(NamedTuple):
    """Columns of a tile and stages of the ring for a BF16 (wgrad: FP32) result; whether consumers take turns."""

    n: int
    stages: int
    turns: bool = False

    @property
    def name(self) -> str:
        return f"gluon {M}x{self.n}, {self.stages} stages" + (IN_TURNS if self.turns else "")


IN_TURNS = ", in turns"
MM_TILES = [Tile(128, 5), Tile(128, 4), Tile(128, 4, turns=True)]


@gluon.jit
def place(tile, tiles_m, tiles_n, BAND: gl.constexpr):
    """(row, column) of a tile, as in `triton8`."""
    band = tile // (BAND * tiles_n)
    height = gl.minimum(tiles_m - band * BAND, BAND)
    return band * BAND + tile % (BAND * tiles_n) % height, tile % (BAND * tiles_n) // height


@gluon.jit
def owner(offsets_ptr, row, n_groups, GROUPS: gl.constexpr):
    """The group that owns this row: how many groups end at or before it. Every warp computes it for itself."""
    WIDTH: gl.constexpr = GROUPS // 32 if GROUPS > 32 else 1
    groups = gl.arange(0, GROUPS, layout=gl.BlockedLayout([WIDTH], [32], [gl.num_warps()], [0]))
    ends = gl.load(offsets_ptr + groups, mask=groups < n_groups, other=0x7FFFFFFF)
    return gl.sum((ends <= row).to(gl.int32), axis=0)


@gluon.jit
def ring(STAGES: gl.constexpr):
    """Barriers of the ring: (stage is filled, stage is free again by both consumers)."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    return full, empty


@gluon.jit
def turns():
    """Barriers by which the consumers issue their products in turn: one multiplies while the other adds, never both."""
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(2):
        mbarrier.init(turn.index(half), count=1)
    return turn


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The stage after this one; the phase turns with every round."""
    stage += 1
    wrapped = stage == STAGES
    return gl.where(wrapped, 0, stage), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def _mm_tile(
    tile, offsets_ptr, n_rows, n_out, n_in, n_groups, GROUPS: gl.constexpr, N: gl.constexpr, BAND: gl.constexpr
):
    """(row, column, row of the weight, group, steps) of a tile; no steps where its rows are nobody's."""
    tile_m, tile_n = place(tile, gl.cdiv(n_rows, 128), gl.cdiv(n_out, N), BAND)
    row, col = tile_m * 128, tile_n * N
    steps = gl.cdiv(n_in, 128)
    group = 0
    if GROUPS > 0:
        group = owner(offsets_ptr, row, n_groups, GROUPS)
        steps = gl.where(group < n_groups, steps, 0)
        group = gl.minimum(group, n_groups - 1)
    return row, col, group * n_out + col, group, steps


@gluon.jit
def _mm_producer(
    codes,
    scales,
    weight,
    offsets_ptr,
    sizes,
    stages,
    GROUPS: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
):
    n_rows, n_out, n_in, n_groups, scale_rows, group_stride, scale_stride = sizes
    a, b, s, full, empty = stages
    tiles = gl.cdiv(n_rows, 128) * gl.cdiv(n_out, N)
    stage, phase = 0, 1  # every stage is free at first: waiting for the phase before passes
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, _, weight_row, _, steps = _mm_tile(tile, offsets_ptr, n_rows, n_out, n_in, n_groups, GROUPS, N, BAND)
        for step in range(steps):
            mbarrier.wait(empty.index(stage), phase)
            ready = full.index(stage)
            mbarrier.expect(ready, (128 + N) * 128 + 128 * 4)
            tma.async_copy_global_to_shared(codes, [row, step * 128], ready, a.index(stage))
            tma.async_copy_global_to_shared(weight, [weight_row, step * 128], ready, b.index(stage))
            tma.async_copy_global_to_shared(scales, [step * scale_rows + row], ready, s.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _mm_consumer(
    out,
    weight_scales_ptr,
    offsets_ptr,
    sizes,
    stages,
    c,
    turn,
    HALF: gl.constexpr,
    TURNS: gl.constexpr,
    GROUPS: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
):
    n_rows, n_out, n_in, n_groups, scale_rows, group_stride, scale_stride = sizes
    a, b, s, full, empty = stages
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 32])
    tiles = gl.cdiv(n_rows, 128) * gl.cdiv(n_out, N)
    stage, phase = 0, 0
    my_turn = 1 - HALF  # the first turn is that of the first consumer: waiting for the phase before passes
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, col, _, group, steps = _mm_tile(tile, offsets_ptr, n_rows, n_out, n_in, n_groups, GROUPS, N, BAND)
        block_scales = weight_scales_ptr + group * group_stride + col // 128 * scale_stride
        total = gl.zeros((64, N), gl.float32, MMA)
        for step in range(steps):
            block_scale = gl.load(block_scales + step)
            mbarrier.wait(full.index(stage), phase)
            fresh = gl.zeros((64, N), gl.float32, MMA)
            rows = a.index(stage).slice(HALF * 64, 64)
            if TURNS:
                mbarrier.wait(turn.index(HALF), my_turn)
            part = warpgroup_mma(rows, b.index(stage).permute((1, 0)), fresh, use_acc=False, is_async=True)
            if TURNS:
                mbarrier.arrive(turn.index(1 - HALF), count=1)
                my_turn ^= 1
            scale = s.index(stage).slice(HALF * 64, 64).load(gl.SliceLayout(1, MMA)) * block_scale
            part = warpgroup_mma_wait(0, deps=(part,))
            gl.thread_barrier()  # all warps have read the stage, not only the one that says so
            mbarrier.arrive(empty.index(stage), count=1)
            total += part * gl.expand_dims(scale, 1)
            stage, phase = next_stage(stage, phase, STAGES)
        tma.store_wait(0)
        gl.thread_barrier()  # the last tile has left shared memory, for the thread that sent it
        mine = c.index(HALF)
        mine.store(total.to(out.dtype))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(out, [row + HALF * 64, col], mine)
    tma.store_wait(0)


@gluon.jit
def mm_kernel(
    codes,
    scales,
    weight,
    out,
    weight_scales_ptr,
    offsets_ptr,
    n_rows,
    n_out,
    n_in,
    n_groups,
    scale_rows,
    group_stride,
    scale_stride,
    GROUPS: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
    TURNS: gl.constexpr,
):
    """GROUPS: n_groups as a power of two, 0 for a dense product."""
    a = gl.allocate_shared_memory(codes.dtype, [STAGES, 128, 128], codes.layout)
    b = gl.allocate_shared_memory(weight.dtype, [STAGES, N, 128], weight.layout)
    s = gl.allocate_shared_memory(gl.float32, [STAGES, 128], scales.layout)
    c = gl.allocate_shared_memory(out.dtype, [2, 64, N], out.layout)
    full, empty = ring(STAGES)
    turn = turns()
    sizes = (n_rows, n_out, n_in, n_groups, scale_rows, group_stride, scale_stride)
    stages = (a, b, s, full, empty)
    gl.warp_specialize(
        [
            (
                _mm_consumer,
                (out, weight_scales_ptr, offsets_ptr, sizes, stages, c, turn, 0, TURNS, GROUPS, N, STAGES, BAND),
            ),
            (
                _mm_consumer,
                (out, weight_scales_ptr, offsets_ptr, sizes, stages, c, turn, 1, TURNS, GROUPS, N, STAGES, BAND),
            ),
            (_mm_producer, (codes, scales, weight, offsets_ptr, sizes, stages, GROUPS, N, STAGES, BAND)),
        ],
        [4, 1],
        [232, 40],
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


def launch_mm(
    out: Tensor,
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    offsets: Tensor | None,
    tile: Tile,
) -> None:
    """`fp8_mm`, with offsets `grouped_fp8_mm`, into `out` and without checks."""
    (m, k), n, groups = codes.shape, weight.shape[-2], 1 if offsets is None else weight.shape[0]
    tiles = triton.cdiv(m, M) * triton.cdiv(n, tile.n)
    mm_kernel[(min(tiles, multiprocessors(codes.device)),)](
        matrix(codes, M),
        flat(scales.t(), M),
        matrix(weight.view(-1, k), tile.n),
        matrix(out, 64, tile.n),
        weight_scales,
        weight_scales if offsets is None else offsets,  # not read when dense
        m,
        n,
        k,
        groups,
        scales.stride(1),
        0 if offsets is None else weight_scales.stride(0),
        weight_scales.stride(-2),
        GROUPS=0 if offsets is None else triton.next_power_of_2(groups),
        N=tile.n,
        STAGES=tile.stages if out.dtype == torch.bfloat16 else min(tile.stages, 4),
        BAND=BAND,
        TURNS=tile.turns,
        num_warps=4,
    )
