"""FP8 products in Gluon, dense and grouped: ring, producer and consumers as in `gluon8`; twin: `triton8`.

Copies from L2 are what bounds them, and a larger tile reads less per product: consumers have 64 rows of a tile each,
three of 192 x 128, two of 128 x 128, 192 or 256. A step is multiplied and added part by part:
- 128 columns are one part: while it is added, one or two other consumers multiply;
- 192 columns are 64 and 128 at once: the 64 are added while the 128 are multiplied;
- 256 columns are 128 after 128, in the same registers, as there are not enough for both. The first are added before the
  second are issued; the other consumer multiplies meanwhile.
Where the ring has a stage to spare, what need not wait for the products is done behind them: the stage before is handed
back, the next one waited for. Three consumers have none: with a stage kept a step longer, four hold too little ahead.
They hand back a stage as soon as its products are there, before these are added, and wait for the next one only when
they need it. 256 columns hand back as early, and wait behind the second 128.
A tile is found (`gluon8_tiles`), and the tile before it leaves through shared memory, behind the first products of that
tile: there is no pause between tiles.
"""

from typing import NamedTuple

import torch
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

from deepv3.kernels.checks import cdiv, multiprocessors, next_power_of_2
from deepv3.kernels.gluon8 import BAND, STEP, flat, matrix, next_stage
from deepv3.kernels.gluon8_tiles import count_tiles, find_tile, rows_of_tiles

SHARED = 232_448 - 384  # bytes a program can have, less the barriers and what partitions are told


class Tile(NamedTuple):
    """Consumers of 64 rows each, 2 or 3; columns, 128 or for two consumers 192 or 256; the most stages of the ring."""

    consumers: int
    n: int
    stages: int

    @property
    def m(self) -> int:
        return 64 * self.consumers

    def band(self, groups: int) -> int:
        """Tiles along m that share columns in L2.

        With groups and three consumers bands of 8 made 1177 TFLOP/s, of 16 1150, of 32 1143 (H100, geometric means).
        """
        return BAND // 2 if groups > 1 and self.consumers == 3 else BAND

    @property
    def name(self) -> str:
        return f"gluon {self.m}x{self.n}, {self.stages} stages"

    def fitting(self, dtype: torch.dtype, table: int) -> int:
        """Stages for which there is room beside results of this format on their way and a table of this length."""
        lines = next_power_of_2(self.m)  # of scales
        leaving = self.m * (128 if self.n == 256 else self.n) * dtype.itemsize
        return min(self.stages, (SHARED - table * 4 - leaving) // ((self.m + self.n) * STEP + lines * 4))


MM_TILES = [Tile(3, 128, 4), Tile(2, 192, 4), Tile(2, 128, 5), Tile(2, 256, 4)]


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
    tiles_m = rows_of_tiles(table, offsets_ptr, n_rows, n_groups, 64 * CONSUMERS, GROUPS)
    stage, phase = 0, 1  # every stage is free at first: waiting for the phase before passes
    for tile in range(gl.program_id(0), tiles_m * gl.cdiv(n_out, N), gl.num_programs(0)):
        row, _, cols, group, _, steps = find_tile(
            tile, tiles_m, table, offsets_ptr, sizes, 64 * CONSUMERS, N, GROUPS, BAND
        )
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
    if CONSUMERS == 2:
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
def _hand_back(empty):
    """This consumer is done with a stage: all warps of it, not only the one that says so."""
    gl.thread_barrier()
    mbarrier.arrive(empty, count=1)


@gluon.jit
def _multiply(at, stages, PART: gl.constexpr, CONSUMERS: gl.constexpr, N: gl.constexpr):
    """A step's products on their way, part by part; of 256 columns the first part's only."""
    a, b, s, full, empty = stages
    before, stage, phase = at
    if CONSUMERS == 3:
        mbarrier.wait(full.index(stage), phase)
    rows = a.index(stage * CONSUMERS + PART)
    parts = [_product(rows, columns.index(stage)) for columns in (b if N < 256 else (b[0],))]
    if CONSUMERS == 2 and N < 256:
        _hand_back(empty.index(before))
    return parts


@gluon.jit
def _add(total, products, scale, FIRST: gl.constexpr):
    """Products, scaled and added to the total, which at FIRST is none."""
    scaled = products * gl.expand_dims(scale, 1)
    return scaled if FIRST else total + scaled


@gluon.jit
def _add_now(total, products, scale):
    """The same, where it is written: the compiler would add behind the next products, without registers for both."""
    args = [products, gl.expand_dims(scale, 1), total]
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", args, dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _promote(
    totals,
    parts,
    at,
    stages,
    block_scales,
    PART: gl.constexpr,
    CONSUMERS: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    FIRST: gl.constexpr,
):
    """(the totals with the scaled products added, at FIRST those alone; the next step's place in the ring)."""
    a, b, s, full, empty = stages
    before, stage, phase = at
    rows = s.index(stage).slice(PART * 64, 64)
    scales = [_row_scales(rows, b[i].shape[1]) * block_scales[i] for i in ((0, 1) if N > 128 else (0,))]
    last = parts[len(parts) - 1]
    if N == 192:
        other = _add(totals[0], warpgroup_mma_wait(1, deps=(parts[0],)), scales[0], FIRST)
    if N == 256:
        products = warpgroup_mma_wait(0, deps=(last,))
        other = _add_now(_zeros(128) if FIRST else totals[0], products, scales[0])
        # No stage is below zero, but the compiler cannot know: these products take the registers of those just added.
        columns = b[1].index(stage).permute((1, 0))
        last = warpgroup_mma(a.index(stage * CONSUMERS + PART), columns, products, use_acc=stage < 0, is_async=True)
    following, following_phase = next_stage(stage, phase, STAGES)
    if CONSUMERS == 2:
        # Also so that the compiler cannot wait for all parts first, and add the 64 columns while nothing is multiplied.
        mbarrier.wait(full.index(following), following_phase)
    products = warpgroup_mma_wait(0, deps=(last,))
    if CONSUMERS == 3 or N == 256:
        _hand_back(empty.index(stage))
    total = _add(totals[len(b) - 1], products, scales[len(b) - 1], FIRST)
    return [other, total] if N > 128 else [total], (stage, following, following_phase)


@gluon.jit
def _send(outs, totals, staging, row, end, cols, PART: gl.constexpr):
    """A result leaves through shared memory, once the one before has left it; not if its rows begin behind the end."""
    for i in gl.static_range(len(outs)):
        if i % len(staging) == 0:
            tma.store_wait(0)
            gl.thread_barrier()  # it has, for the thread that sent it
        leaving = staging[i % len(staging)].index(PART)
        leaving.store(totals[i].to(outs[i].dtype))
        fence_async_shared()
        gl.thread_barrier()
        if row + PART * 64 < end:
            tma.async_copy_shared_to_global(outs[i], [row + PART * 64, cols[i]], leaving)


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
    tiles_m = rows_of_tiles(table, offsets_ptr, n_rows, n_groups, 64 * CONSUMERS, GROUPS)
    # Before the first tile comes one of zeros, all of it behind the end.
    row, end, cols, totals = n_rows, n_rows, [n_out for _ in b], [_zeros(columns.shape[1]) for columns in b]
    at = (STAGES, 0, 0)  # the stage before, at first none; this step's and its phase
    if CONSUMERS == 2:
        mbarrier.wait(full.index(0), 0)
    for tile in range(gl.program_id(0), tiles_m * gl.cdiv(n_out, N), gl.num_programs(0)):
        parts = _multiply(at, stages, PART, CONSUMERS, N)
        # Behind the first products, the tile before is sent and this one is found.
        _send(outs, totals, staging, row, end, cols, PART)
        row, end, cols, group, owned, steps = find_tile(
            tile, tiles_m, table, offsets_ptr, sizes, 64 * CONSUMERS, N, GROUPS, BAND
        )
        scales_ptr = weight_scales_ptr + group * group_stride
        pointers = [scales_ptr + gl.minimum(col, n_out - 1) // 128 * scale_stride for col in cols]
        block_scales = _load_scales(pointers, 0)
        totals, at = _promote(totals, parts, at, stages, block_scales, PART, CONSUMERS, N, STAGES, True)
        if GROUPS > 0:
            totals = [gl.where(owned, total, 0.0) for total in totals]
        block_scales = _load_scales(pointers, gl.minimum(1, steps - 1))
        for step in range(1, steps):
            parts = _multiply(at, stages, PART, CONSUMERS, N)
            next_scales = _load_scales(pointers, gl.minimum(step + 1, steps - 1))
            totals, at = _promote(totals, parts, at, stages, block_scales, PART, CONSUMERS, N, STAGES, False)
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
    weights = (narrow_weight, wide_weight) if N == 192 else (wide_weight,) * (N // 128)
    outs = (narrow_out, wide_out) if N == 192 else (wide_out,) * (N // 128)
    a = gl.allocate_shared_memory(codes.dtype, [STAGES * CONSUMERS, 64, 128], codes.layout)
    s = gl.allocate_shared_memory(gl.float32, [STAGES, scales.block_shape[0]], scales.layout)
    b = [gl.allocate_shared_memory(w.dtype, [STAGES, w.block_shape[0], 128], w.layout) for w in weights]
    leaving = outs if N < 256 else (wide_out,)  # there is no room for both halves at once
    staging = [gl.allocate_shared_memory(o.dtype, [CONSUMERS, 64, o.block_shape[1]], o.layout) for o in leaving]
    table = gl.allocate_shared_memory(gl.int32, [GROUPS if GROUPS > 0 else 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    if GROUPS > 0:
        count_tiles(table, offsets_ptr, n_groups, 64 * CONSUMERS, GROUPS)
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
    rows_of_tiles = cdiv(m, tile.m) + (0 if offsets is None else groups)  # at most
    tall, narrow = weight.view(-1, k), tile.n == 192
    table = 0 if offsets is None else max(32, next_power_of_2(groups))
    mm_kernel[(min(rows_of_tiles * cdiv(n, tile.n), multiprocessors(codes.device)),)](
        matrix(codes, 64),
        flat(scales.t(), next_power_of_2(tile.m)),
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
        GROUPS=table,
        N=tile.n,
        STAGES=tile.fitting(out.dtype, table),
        BAND=tile.band(groups),
        num_warps=4,
    )
