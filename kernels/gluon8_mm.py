"""FP8 products in Gluon, dense and grouped: ring, producer and consumers as in `gluon8`; twin: `triton8`.

Consumers have 64 rows of a tile each: three of 192 x 128, two of 128 x 128 or 128 x 192. The larger tiles read a sixth
less from L2 per product; with three, two multiply while one adds, and 192 columns give a consumer half as much time
again for what is not a product. Of a step, only what needs the products lies behind them:
1. issue them, of 192 columns 128 and 64 apart; behind their back hand the stage before back and load the scales;
2. scale and add the 128 while the 64 are still multiplied, see that the next stage is there, scale and add the 64.
A tile is found, and the tile before it leaves through shared memory, behind the first products of that tile: there is
no pause between tiles. Given up: stages go back a step late, so that a ring of n stages holds n - 1 ahead.
A group's rows begin a tile, and its last tile may reach into the next group: those rows are multiplied and not written.
"""

from typing import NamedTuple

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

from deepv3.kernels.checks import multiprocessors
from deepv3.kernels.gluon8 import BAND, STEP, flat, matrix, next_stage, place, uniform

SHARED = 232_448 - 2048  # bytes a program can have, less the barriers and the groups' table


class Tile(NamedTuple):
    """Consumers of 64 rows each, 2 or 3; columns, 128 or for two consumers 192; the most stages of the ring."""

    consumers: int
    n: int
    stages: int

    @property
    def m(self) -> int:
        return 64 * self.consumers

    @property
    def name(self) -> str:
        return f"gluon {self.m}x{self.n}, {self.stages} stages"

    def fitting(self, dtype: torch.dtype) -> int:
        """Stages for which there is room beside a result of this format."""
        lines = triton.next_power_of_2(self.m)  # of scales
        return min(self.stages, (SHARED - self.m * self.n * dtype.itemsize) // ((self.m + self.n) * STEP + lines * 4))


MM_TILES = [Tile(3, 128, 4), Tile(2, 192, 4), Tile(2, 128, 5)]


@gluon.jit
def _count_tiles(table, offsets_ptr, n_groups, M: gl.constexpr, GROUPS: gl.constexpr):
    """Into the table, how many tiles of M rows the groups up to each have together; behind the last one, all tiles."""
    SQUARE: gl.constexpr = gl.BlockedLayout([1, GROUPS // 8], [4, 8], [4, 1], [1, 0])
    groups = gl.arange(0, GROUPS, layout=gl.SliceLayout(0, SQUARE))
    start = gl.load(offsets_ptr + groups - 1, mask=(groups > 0) & (groups < n_groups), other=0)
    end = gl.load(offsets_ptr + groups, mask=groups < n_groups, other=0)
    tiles = gl.expand_dims(gl.cdiv(end - start, M), 0)
    upto = gl.expand_dims(gl.arange(0, GROUPS, layout=gl.SliceLayout(1, SQUARE)), 1)
    table.store(gl.sum(gl.where(gl.expand_dims(groups, 0) <= upto, tiles, 0), axis=1))


@gluon.jit
def _counted(table, GROUPS: gl.constexpr):
    """The table, in every warp."""
    return table.load(gl.BlockedLayout([GROUPS // 32], [32], [gl.num_warps()], [0]))


@gluon.jit
def _rows_of_tiles(table, offsets_ptr, n_rows, n_groups, M: gl.constexpr, GROUPS: gl.constexpr):
    """Tiles one below the other."""
    if GROUPS == 0:
        return gl.cdiv(n_rows, M)
    else:
        owned = uniform(gl.max(_counted(table, GROUPS), axis=0))
        return owned + gl.cdiv(n_rows - gl.load(offsets_ptr + n_groups - 1), M)


@gluon.jit
def ring(STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """Barriers of the ring: (stage is filled, stage is free again by all consumers); a last one for no stage."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
    for stage in gl.static_range(STAGES + 1):
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    return full, empty


@gluon.jit
def _mm_tile(
    tile,
    tiles_m,
    table,
    offsets_ptr,
    sizes,
    CONSUMERS: gl.constexpr,
    GROUPS: gl.constexpr,
    N: gl.constexpr,
    BAND: gl.constexpr,
):
    """(row, end of its group, first columns of the parts, group, whether the rows are anybody's, steps: one if not).

    A tile of 192 columns is a part of 128, which lies in one block of weight scales, and one of 64: in tiles of odd
    columns the 64 come first.
    """
    n_rows, n_out, n_in, n_groups, scale_rows, group_stride, scale_stride = sizes
    tile_m, tile_n = place(tile, tiles_m, gl.cdiv(n_out, N), BAND)
    row, end, col, odd = tile_m * (64 * CONSUMERS), n_rows, tile_n * N, tile_n % 2
    cols = (col + odd * 64, col + (1 - odd) * 128) if N > 128 else (col,)
    steps, group, owned = gl.cdiv(n_in, 128), 0, True
    if GROUPS > 0:
        counts = _counted(table, GROUPS)
        group = uniform(gl.minimum(gl.sum((counts <= tile_m).to(gl.int32), axis=0), n_groups))
        before = uniform(gl.max(gl.where(counts <= tile_m, counts, 0), axis=0))
        start = gl.load(offsets_ptr + group - 1, mask=group > 0, other=0)
        end = gl.load(offsets_ptr + group, mask=group < n_groups, other=n_rows)
        row = start + (tile_m - before) * (64 * CONSUMERS)
        owned = group < n_groups
        steps = gl.where(owned, steps, 1)
        group = gl.minimum(group, n_groups - 1)
    return row, end, cols, group, owned, steps


@gluon.jit
def _mm_producer(
    of,
    CONSUMERS: gl.constexpr,
    GROUPS: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
):
    codes, scales, weights, table, offsets_ptr, sizes, stages = of
    n_rows, n_out, n_in, n_groups, scale_rows, group_stride, scale_stride = sizes
    a, b, s, full, empty = stages
    tiles_m = _rows_of_tiles(table, offsets_ptr, n_rows, n_groups, 64 * CONSUMERS, GROUPS)
    stage, phase = 0, 1  # every stage is free at first: waiting for the phase before passes
    for tile in range(gl.program_id(0), tiles_m * gl.cdiv(n_out, N), gl.num_programs(0)):
        row, _, cols, group, _, steps = _mm_tile(tile, tiles_m, table, offsets_ptr, sizes, CONSUMERS, GROUPS, N, BAND)
        for step in range(steps):
            mbarrier.wait(empty.index(stage), phase)
            ready = full.index(stage)
            mbarrier.expect(ready, (64 * CONSUMERS + N) * 128 + scales.block_shape[0] * 4)
            for part in gl.static_range(CONSUMERS):
                corner = [row + part * 64, step * 128]
                tma.async_copy_global_to_shared(codes, corner, ready, a.index(stage * CONSUMERS + part))
            for i in gl.static_range(len(weights)):
                corner = [group * n_out + cols[i], step * 128]
                tma.async_copy_global_to_shared(weights[i], corner, ready, b[i].index(stage))
            tma.async_copy_global_to_shared(scales, [step * scale_rows + row], ready, s.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)
    mbarrier.wait(empty.index(stage), phase)
    mbarrier.arrive(full.index(stage), count=1)  # consumers look one step ahead, at last for one that is not


@gluon.jit
def _zeros(WIDTH: gl.constexpr):
    """A warpgroup's accumulator."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 32])
    return gl.zeros((64, WIDTH), gl.float32, MMA)


@gluon.jit
def _product(rows, columns):
    """A warpgroup's rows times a part's columns, on its way."""
    return warpgroup_mma(rows, columns.permute((1, 0)), _zeros(columns.shape[0]), use_acc=False, is_async=True)


@gluon.jit
def _row_scales(scales, WIDTH: gl.constexpr):
    """Scales of a warpgroup's rows, for its accumulator."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 32])
    return scales.load(gl.SliceLayout(1, MMA))


@gluon.jit
def _multiply(at, stages, PART: gl.constexpr, CONSUMERS: gl.constexpr):
    """The products of a step, part by part, on their way; behind their back the stage before is handed back."""
    a, b, s, full, empty = stages
    before, stage, phase = at
    rows = a.index(stage * CONSUMERS + PART)
    parts = [_product(rows, columns.index(stage)) for columns in b]
    gl.thread_barrier()  # all warps are done with the stage before, not only the one that says so
    mbarrier.arrive(empty.index(before), count=1)
    return parts


@gluon.jit
def _add(total, part, scale, ready, phase, LATER: gl.constexpr, FIRST: gl.constexpr):
    """A part that is there once only LATER parts are missing, scaled and added to the total, which at FIRST is none.

    Before the last one, the next stage is waited for: also so that the compiler cannot wait for both parts first, and
    add the first while nothing is multiplied.
    """
    if LATER == 0:
        mbarrier.wait(ready, phase)
    scaled = warpgroup_mma_wait(LATER, deps=(part,)) * gl.expand_dims(scale, 1)
    return scaled if FIRST else total + scaled


@gluon.jit
def _promote(totals, parts, at, stages, block_scales, PART: gl.constexpr, STAGES: gl.constexpr, FIRST: gl.constexpr):
    """(the totals with the scaled products added; the next step's place in the ring)."""
    a, b, s, full, empty = stages
    before, stage, phase = at
    rows = s.index(stage).slice(PART * 64, 64)
    scales = [_row_scales(rows, columns.shape[1]) for columns in b]
    following, following_phase = next_stage(stage, phase, STAGES)
    ready = full.index(following)
    totals = [
        _add(totals[i], parts[i], scales[i] * block_scales[i], ready, following_phase, len(b) - 1 - i, FIRST)
        for i in ((0, 1) if len(b) > 1 else (0,))
    ]
    return totals, (stage, following, following_phase)


@gluon.jit
def _send(outs, totals, staging, row, end, cols, PART: gl.constexpr):
    """A result leaves through shared memory, once the one before has left it; not if its rows begin behind the end."""
    tma.store_wait(0)
    gl.thread_barrier()  # it has, for the thread that sent it
    for i in gl.static_range(len(outs)):
        staging[i].index(PART).store(totals[i].to(outs[i].dtype))
    fence_async_shared()
    gl.thread_barrier()
    if row + PART * 64 < end:
        for i in gl.static_range(len(outs)):
            tma.async_copy_shared_to_global(outs[i], [row + PART * 64, cols[i]], staging[i].index(PART))


@gluon.jit
def _load_scales(pointers, step):
    """The weight's scales of a step, one per part."""
    return [gl.load(pointer + step) for pointer in pointers]


@gluon.jit
def _mm_consumer(
    to,
    PART: gl.constexpr,
    CONSUMERS: gl.constexpr,
    GROUPS: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
):
    outs, weight_scales_ptr, table, offsets_ptr, sizes, stages, staging = to
    n_rows, n_out, n_in, n_groups, scale_rows, group_stride, scale_stride = sizes
    a, b, s, full, empty = stages
    tiles_m = _rows_of_tiles(table, offsets_ptr, n_rows, n_groups, 64 * CONSUMERS, GROUPS)
    # Before the first tile comes one of zeros, all of it behind the end.
    row, end, cols, totals = n_rows, n_rows, [n_out for _ in b], [_zeros(columns.shape[1]) for columns in b]
    at = (STAGES, 0, 0)  # the stage before, at first none; this step's and its phase
    mbarrier.wait(full.index(0), 0)
    for tile in range(gl.program_id(0), tiles_m * gl.cdiv(n_out, N), gl.num_programs(0)):
        parts = _multiply(at, stages, PART, CONSUMERS)
        # Behind the first products, the tile before is sent and this one is found.
        _send(outs, totals, staging, row, end, cols, PART)
        row, end, cols, group, owned, steps = _mm_tile(
            tile, tiles_m, table, offsets_ptr, sizes, CONSUMERS, GROUPS, N, BAND
        )
        scales_ptr = weight_scales_ptr + group * group_stride
        pointers = [scales_ptr + gl.minimum(col, n_out - 1) // 128 * scale_stride for col in cols]
        block_scales = _load_scales(pointers, 0)
        totals, at = _promote(totals, parts, at, stages, block_scales, PART, STAGES, True)
        if GROUPS > 0:
            totals = [gl.where(owned, total, 0.0) for total in totals]
        block_scales = _load_scales(pointers, gl.minimum(1, steps - 1))
        for step in range(1, steps):
            parts = _multiply(at, stages, PART, CONSUMERS)
            next_scales = _load_scales(pointers, gl.minimum(step + 1, steps - 1))
            totals, at = _promote(totals, parts, at, stages, block_scales, PART, STAGES, False)
            block_scales = next_scales
    _send(outs, totals, staging, row, end, cols, PART)
    tma.store_wait(0)


@gluon.jit
def mm_kernel(
    codes,
    scales,
    wide_weight,
    narrow_weight,
    wide_out,
    narrow_out,
    weight_scales_ptr,
    offsets_ptr,
    n_rows,
    n_out,
    n_in,
    n_groups,
    scale_rows,
    group_stride,
    scale_stride,
    CONSUMERS: gl.constexpr,
    GROUPS: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
):
    """narrow: of the part of 64 columns, None where a tile has none. GROUPS: at least n_groups, 0 if dense."""
    weights = (wide_weight, narrow_weight) if N > 128 else (wide_weight,)
    outs = (wide_out, narrow_out) if N > 128 else (wide_out,)
    a = gl.allocate_shared_memory(codes.dtype, [STAGES * CONSUMERS, 64, 128], codes.layout)
    s = gl.allocate_shared_memory(gl.float32, [STAGES, scales.block_shape[0]], scales.layout)
    b = [gl.allocate_shared_memory(w.dtype, [STAGES, w.block_shape[0], 128], w.layout) for w in weights]
    staging = [gl.allocate_shared_memory(o.dtype, [CONSUMERS, 64, o.block_shape[1]], o.layout) for o in outs]
    table = gl.allocate_shared_memory(gl.int32, [GROUPS if GROUPS > 0 else 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    if GROUPS > 0:
        _count_tiles(table, offsets_ptr, n_groups, 64 * CONSUMERS, GROUPS)
    full, empty = ring(STAGES, CONSUMERS)
    sizes = (n_rows, n_out, n_in, n_groups, scale_rows, group_stride, scale_stride)
    stages = (a, b, s, full, empty)
    load = (codes, scales, weights, table, offsets_ptr, sizes, stages)
    send = (outs, weight_scales_ptr, table, offsets_ptr, sizes, stages, staging)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_mm_consumer, (send, 0, 2, GROUPS, N, STAGES, BAND)),
                (_mm_consumer, (send, 1, 2, GROUPS, N, STAGES, BAND)),
                (_mm_producer, (load, 2, GROUPS, N, STAGES, BAND)),
            ],
            [4, 1],
            [232, 40],
        )
    else:
        gl.warp_specialize(
            [
                (_mm_consumer, (send, 0, 3, GROUPS, N, STAGES, BAND)),
                (_mm_consumer, (send, 1, 3, GROUPS, N, STAGES, BAND)),
                (_mm_consumer, (send, 2, 3, GROUPS, N, STAGES, BAND)),
                (_mm_producer, (load, 3, GROUPS, N, STAGES, BAND)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


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
    rows_of_tiles = triton.cdiv(m, tile.m) + (0 if offsets is None else groups)  # at most
    tall, narrow = weight.view(-1, k), tile.n > 128
    mm_kernel[(min(rows_of_tiles * triton.cdiv(n, tile.n), multiprocessors(codes.device)),)](
        matrix(codes, 64),
        flat(scales.t(), triton.next_power_of_2(tile.m)),
        matrix(tall, 128),
        matrix(tall, 64) if narrow else None,
        matrix(out, 64, 128),
        matrix(out, 64, 64) if narrow else None,
        weight_scales,
        weight_scales if offsets is None else offsets,  # not read when dense
        m,
        n,
        k,
        groups,
        scales.stride(1),
        0 if offsets is None else weight_scales.stride(0),
        weight_scales.stride(-2),
        CONSUMERS=tile.consumers,
        GROUPS=0 if offsets is None else max(32, triton.next_power_of_2(groups)),
        N=tile.n,
        STAGES=tile.fitting(out.dtype),
        BAND=BAND,
        num_warps=4,
    )
