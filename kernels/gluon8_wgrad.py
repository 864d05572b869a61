"""FP8 weight gradients in Gluon, dense and grouped: producer, consumers and ring as in `gluon8`; twin: `triton8`.

Both operands have a scale per 128 rows and column, so a step brings two lines of scales. A group is a range of the
reduced rows: no descriptor changes between groups, and sizes stay on the device. Results go to memory from the
registers, a lane's pairs of columns filling whole sectors; what is there already is read just before.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from deepv3.kernels.checks import multiprocessors
from deepv3.kernels.gluon8 import BAND, M, Tile, flat, matrix, next_stage, place, ring, turns

WGRAD_TILES = [Tile(128, 6), Tile(128, 5), Tile(128, 6, turns=True)]


@gluon.jit
def _wgrad_tile(tile, offsets_ptr, n_out, n_in, n_rows, GROUPED: gl.constexpr, N: gl.constexpr, BAND: gl.constexpr):
    """(group, row, column, first and end of the reduced rows) of a tile."""
    tiles_m, tiles_n = gl.cdiv(n_out, 128), gl.cdiv(n_in, N)
    group = tile // (tiles_m * tiles_n)
    tile_m, tile_n = place(tile % (tiles_m * tiles_n), tiles_m, tiles_n, BAND)
    start, end = 0, n_rows
    if GROUPED:
        start = gl.load(offsets_ptr + group - 1, mask=group > 0, other=0)
        end = gl.load(offsets_ptr + group)
    return group, tile_m * 128, tile_n * N, start, end


@gluon.jit
def _wgrad_producer(
    dy,
    x,
    dy_scales,
    x_scales,
    offsets_ptr,
    sizes,
    stages,
    GROUPED: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
):
    n_out, n_in, n_rows, tiles = sizes
    a, b, s, t, full, empty = stages
    stage, phase = 0, 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        _, row, col, start, end = _wgrad_tile(tile, offsets_ptr, n_out, n_in, n_rows, GROUPED, N, BAND)
        for first in range(start, end, 128):
            mbarrier.wait(empty.index(stage), phase)
            ready = full.index(stage)
            mbarrier.expect(ready, (128 + N) * 128 + (128 + N) * 4)
            tma.async_copy_global_to_shared(dy, [row, first], ready, a.index(stage))
            tma.async_copy_global_to_shared(x, [col, first], ready, b.index(stage))
            tma.async_copy_global_to_shared(dy_scales, [first // 128 * n_out + row], ready, s.index(stage))
            tma.async_copy_global_to_shared(x_scales, [first // 128 * n_in + col], ready, t.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _wgrad_consumer(
    grad_ptr,
    offsets_ptr,
    sizes,
    stages,
    turn,
    HALF: gl.constexpr,
    TURNS: gl.constexpr,
    GROUPED: gl.constexpr,
    ACCUMULATE: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
):
    n_out, n_in, n_rows, tiles = sizes
    a, b, s, t, full, empty = stages
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 32])
    stage, phase = 0, 0
    my_turn = 1 - HALF
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        group, row, col, start, end = _wgrad_tile(tile, offsets_ptr, n_out, n_in, n_rows, GROUPED, N, BAND)
        total = gl.zeros((64, N), gl.float32, MMA)
        for _ in range(start, end, 128):
            mbarrier.wait(full.index(stage), phase)
            fresh = gl.zeros((64, N), gl.float32, MMA)
            rows = a.index(stage).slice(HALF * 64, 64)
            if TURNS:
                mbarrier.wait(turn.index(HALF), my_turn)
            part = warpgroup_mma(rows, b.index(stage).permute((1, 0)), fresh, use_acc=False, is_async=True)
            if TURNS:
                mbarrier.arrive(turn.index(1 - HALF), count=1)
                my_turn ^= 1
            row_scale = s.index(stage).slice(HALF * 64, 64).load(gl.SliceLayout(1, MMA))
            col_scale = t.index(stage).load(gl.SliceLayout(0, MMA))
            part = warpgroup_mma_wait(0, deps=(part,))
            gl.thread_barrier()  # all warps have read the stage, not only the one that says so
            mbarrier.arrive(empty.index(stage), count=1)
            total += part * (gl.expand_dims(row_scale, 1) * gl.expand_dims(col_scale, 0))
            stage, phase = next_stage(stage, phase, STAGES)
        if not ACCUMULATE or end > start:
            rows = row + HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))
            cols = col + gl.arange(0, N, layout=gl.SliceLayout(0, MMA))
            mask = gl.expand_dims(rows < n_out, 1) & gl.expand_dims(cols < n_in, 0)
            places = (group.to(gl.int64) * n_out + gl.expand_dims(rows, 1)) * n_in + gl.expand_dims(cols, 0)
            if ACCUMULATE:  # pairs of columns a lane, 32 bytes a row and instruction: whole sectors
                total += gl.load(grad_ptr + places, mask=mask, other=0.0)
            gl.store(grad_ptr + places, total, mask=mask)


@gluon.jit
def wgrad_kernel(
    dy,
    x,
    dy_scales,
    x_scales,
    grad_ptr,
    offsets_ptr,
    n_out,
    n_in,
    n_rows,
    tiles,
    GROUPED: gl.constexpr,
    ACCUMULATE: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
    TURNS: gl.constexpr,
):
    a = gl.allocate_shared_memory(dy.dtype, [STAGES, 128, 128], dy.layout)
    b = gl.allocate_shared_memory(x.dtype, [STAGES, N, 128], x.layout)
    s = gl.allocate_shared_memory(gl.float32, [STAGES, 128], dy_scales.layout)
    t = gl.allocate_shared_memory(gl.float32, [STAGES, N], x_scales.layout)
    full, empty = ring(STAGES)
    turn = turns()
    sizes = (n_out, n_in, n_rows, tiles)
    stages = (a, b, s, t, full, empty)
    gl.warp_specialize(
        [
            (
                _wgrad_consumer,
                (grad_ptr, offsets_ptr, sizes, stages, turn, 0, TURNS, GROUPED, ACCUMULATE, N, STAGES, BAND),
            ),
            (
                _wgrad_consumer,
                (grad_ptr, offsets_ptr, sizes, stages, turn, 1, TURNS, GROUPED, ACCUMULATE, N, STAGES, BAND),
            ),
            (_wgrad_producer, (dy, x, dy_scales, x_scales, offsets_ptr, sizes, stages, GROUPED, N, STAGES, BAND)),
        ],
        [4, 1],
        [232, 40],
    )


def launch_wgrad(
    grad: Tensor,
    dy_codes: Tensor,
    dy_scales: Tensor,
    x_codes: Tensor,
    x_scales: Tensor,
    offsets: Tensor | None,
    accumulate: bool,
    tile: Tile,
) -> None:
    """`fp8_wgrad_`, with offsets `grouped_fp8_wgrad_`, without checks."""
    n, k = grad.shape[-2:]
    tiles = (1 if offsets is None else grad.shape[0]) * triton.cdiv(n, M) * triton.cdiv(k, tile.n)
    wgrad_kernel[(min(tiles, multiprocessors(grad.device)),)](
        matrix(dy_codes, M),
        matrix(x_codes, tile.n),
        flat(dy_scales, M),
        flat(x_scales, tile.n),
        grad,
        grad if offsets is None else offsets,  # not read when dense
        n,
        k,
        dy_codes.shape[1],
        tiles,
        GROUPED=offsets is not None,
        ACCUMULATE=accumulate,
        N=tile.n,
        STAGES=tile.stages,
        BAND=BAND,
        TURNS=tile.turns,
        num_warps=4,
    )
