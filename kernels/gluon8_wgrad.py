"""FP8 weight gradients in Gluon, dense and grouped: producer, consumers and ring as in `gluon8`; twin: `triton8`.

Both operands have a scale per 128 rows and column, so a step brings two lines of scales. A group is a range of the
reduced rows: no descriptor changes between groups, and sizes stay on the device. Two or three consumers have 64 rows of
a tile each. Of a step, only what needs the products lies behind them:
1. issue the products; behind their back hand the stage before back, load the scales, multiply rows' by columns', and
   wait for the next stage; three consumers lack the registers and load scales last, while two others multiply;
2. wait for the products, scale and add.
Results leave through shared memory in chunks of 32 columns while the next tile is multiplied. To add to what is there
is the memory's work too (reduction by TMA). Programs that begin together would all send their results at once, tile
after tile, while nothing multiplies: so every program begins amid its first tile, each at another step, and does that
tile's first steps last. Given up: this tile leaves in two parts, the second added once the first is complete in memory.
The order of sums is fixed, so a GPU's bits are the same every time; where the cut lies depends on its multiprocessors.
Where a group has few rows, memory is all that counts: a tile without chunks asks for what is there before its first
products, adds it in registers, and writes from there, every tile whole.
"""

from typing import NamedTuple

from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from deepv3.kernels.checks import cdiv, multiprocessors
from deepv3.kernels.gluon8 import BAND, describe, flat, matrix, next_stage, place

N = 128  # columns of a tile


class WgradTile(NamedTuple):
    """Consumers of 64 rows each, stages of the ring, chunks of results a consumer may have on their way out.

    Without chunks, results leave from registers: two consumers only, three lack the registers.
    """

    consumers: int
    stages: int
    chunks: int

    @property
    def name(self) -> str:
        leaves = "" if self.chunks else ", from registers"
        return f"gluon {64 * self.consumers}x{N}, {self.stages} stages{leaves}"


WGRAD_TILES = [WgradTile(3, 4, 2), WgradTile(2, 4, 4), WgradTile(2, 6, 0)]


@builtin
def reduce_add(descriptor, coordinates, source, _semantic=None):
    """`tma.async_copy_shared_to_global` that adds: Triton 3.6 has the instruction, its Gluon no name for it."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, descriptor.handle, coordinates, source.handle)


@gluon.jit
def _barriers(STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """Barriers of the ring: (stage is filled, stage is free again by all consumers)."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    return full, empty


@gluon.jit
def _complete():
    """All that this thread sent has been written, not only read from shared memory as after `tma.store_wait`."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.b32 $0, $1;", "=r,r", [gl.program_id(0)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _own(tiles):
    """Tiles of this program."""
    return gl.cdiv(tiles - gl.program_id(0), gl.num_programs(0))


@gluon.jit
def _wgrad_tile(
    turn, offsets_ptr, sizes, CONSUMERS: gl.constexpr, CUT: gl.constexpr, GROUPED: gl.constexpr, BAND: gl.constexpr
):
    """(group, row, column, first and end of the reduced rows, first tile again?) of a program's turn.

    With CUT, a program has one turn more than tiles: the first begins amid the first tile, the last one ends there. A
    cut at the tile's beginning, as in a program with one tile only, leaves no rows for the last turn.
    """
    n_out, n_in, n_rows, tiles = sizes
    tiles_m, tiles_n = gl.cdiv(n_out, 64 * CONSUMERS), gl.cdiv(n_in, 128)
    own = _own(tiles)
    again = turn == own
    tile = gl.program_id(0) + gl.where(again, 0, turn) * gl.num_programs(0)
    group = tile // (tiles_m * tiles_n)
    tile_m, tile_n = place(tile % (tiles_m * tiles_n), tiles_m, tiles_n, BAND)
    start, end = 0, n_rows
    if GROUPED:
        start = gl.load(offsets_ptr + group - 1, mask=group > 0, other=0)
        end = gl.load(offsets_ptr + group)
    if CUT:
        share = gl.where(own > 1, gl.program_id(0), 0)
        cut = start + share * ((end - start) // 128) // gl.num_programs(0) * 128
        start, end = gl.where(turn == 0, cut, start), gl.where(again, cut, end)
    return group, tile_m * (64 * CONSUMERS), tile_n * 128, start, end, again


@gluon.jit
def _wgrad_producer(
    operands,
    offsets_ptr,
    sizes,
    stages,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    CUT: gl.constexpr,
    GROUPED: gl.constexpr,
    BAND: gl.constexpr,
):
    dy, x, dy_scales, x_scales = operands
    n_out, n_in, _, tiles = sizes
    a, b, s, t, full, empty = stages
    stage, phase = 0, 1
    for turn in range(_own(tiles) + 1 if CUT else _own(tiles)):
        group, row, col, start, end, again = _wgrad_tile(turn, offsets_ptr, sizes, CONSUMERS, CUT, GROUPED, BAND)
        for first in range(start, end, 128):
            mbarrier.wait(empty.index(stage), phase)
            ready = full.index(stage)
            mbarrier.expect(ready, (64 * CONSUMERS + 128) * (128 + 4))
            for part in gl.static_range(CONSUMERS):
                mine = stage * CONSUMERS + part
                tma.async_copy_global_to_shared(dy, [row + part * 64, first], ready, a.index(mine))
                tma.async_copy_global_to_shared(
                    dy_scales, [first // 128 * n_out + row + part * 64], ready, s.index(mine)
                )
            tma.async_copy_global_to_shared(x, [col, first], ready, b.index(stage))
            tma.async_copy_global_to_shared(x_scales, [first // 128 * n_in + col], ready, t.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _scales(rows, cols, MMA: gl.constexpr):
    """[64, 128] of a row's scale times a column's."""
    row_scale = rows.load(gl.SliceLayout(1, MMA))
    return gl.expand_dims(row_scale, 1) * gl.expand_dims(cols.load(gl.SliceLayout(0, MMA)), 0)


@gluon.jit
def _send(
    out,
    group,
    row,
    col,
    quarters,
    c,
    add,
    FIRST: gl.constexpr,
    PART: gl.constexpr,
    CHUNKS: gl.constexpr,
):
    """As many 32 columns from the FIRST on as there is room for, once the chunks that took their places have left."""
    LAST: gl.constexpr = FIRST + CHUNKS if FIRST + CHUNKS < 4 else 4
    tma.store_wait(CHUNKS - (LAST - FIRST) if FIRST > 0 else 0)
    gl.thread_barrier()
    for i in gl.static_range(FIRST, LAST):
        c.index(PART * CHUNKS + i % CHUNKS).store(gl.reshape(quarters[i], (1, 64, 32)))
    fence_async_shared()
    gl.thread_barrier()
    for i in gl.static_range(FIRST, LAST):
        chunk = c.index(PART * CHUNKS + i % CHUNKS)
        if add:
            reduce_add(out, [group, row, col + i * 32], chunk)
        else:
            tma.async_copy_shared_to_global(out, [group, row, col + i * 32], chunk)


@gluon.jit
def _send_all(out, group, row, col, total, c, add, PART: gl.constexpr, CHUNKS: gl.constexpr):
    """A consumer's results, 32 columns by 32, added or stored."""
    even, odd = gl.split(gl.permute(gl.reshape(total, (64, 2, 2, 32)), (0, 3, 1, 2)))
    zeroth, second = gl.split(even)
    first, third = gl.split(odd)
    quarters = (zeroth, first, second, third)
    for i in gl.static_range(0, 4, CHUNKS):
        _send(out, group, row, col, quarters, c, add, i, PART, CHUNKS)


@gluon.jit
def _elements(group, row, col, sizes, MMA: gl.constexpr):
    """(places in the gradient, whether they are in it) of a consumer's results."""
    n_out, n_in, _, _ = sizes
    rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))
    cols = col + gl.arange(0, 128, layout=gl.SliceLayout(0, MMA))
    inside = gl.expand_dims(rows < n_out, 1) & gl.expand_dims(cols < n_in, 0)
    return gl.expand_dims((group.to(gl.int64) * n_out + rows) * n_in, 1) + gl.expand_dims(cols, 0), inside


@gluon.jit
def _wgrad_consumer(
    to,
    PART: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    CHUNKS: gl.constexpr,
    GROUPED: gl.constexpr,
    ACCUMULATE: gl.constexpr,
    BAND: gl.constexpr,
):
    out, grad_ptr, offsets_ptr, sizes, stages, c = to
    n_out, _, _, tiles = sizes
    a, b, s, t, full, empty = stages
    CUT: gl.constexpr = CHUNKS > 0
    SCALES_BEHIND: gl.constexpr = CONSUMERS == 2 and CHUNKS > 0  # there are registers for them
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    stage, phase, before = 0, 0, -1
    for turn in range(_own(tiles) + 1 if CUT else _own(tiles)):
        group, row, col, start, end, again = _wgrad_tile(turn, offsets_ptr, sizes, CONSUMERS, CUT, GROUPED, BAND)
        row += PART * 64
        total = gl.zeros((64, 128), gl.float32, MMA)
        if CHUNKS == 0:
            places, inside = _elements(group, row, col, sizes, MMA)
            if ACCUMULATE:
                there = gl.load(grad_ptr + places, mask=inside & (start < end), other=0.0)
        mbarrier.wait(full.index(stage), phase, pred=start < end)
        for first in range(start, end, 128):
            mine = stage * CONSUMERS + PART
            fresh = gl.zeros((64, 128), gl.float32, MMA)
            part = warpgroup_mma(a.index(mine), b.index(stage).permute((1, 0)), fresh, use_acc=False, is_async=True)
            gl.thread_barrier()  # all warps have read the stage before, and the products are issued before what follows
            mbarrier.arrive(empty.index(gl.maximum(before, 0)), count=1, pred=before >= 0)
            if SCALES_BEHIND:
                scale = _scales(s.index(mine), t.index(stage), MMA)
            following, following_phase = next_stage(stage, phase, STAGES)
            mbarrier.wait(full.index(following), following_phase, pred=first + 128 < end)
            part = warpgroup_mma_wait(0, deps=(part,))
            if not SCALES_BEHIND:
                scale = _scales(s.index(mine), t.index(stage), MMA)
            total += part * scale
            before, stage, phase = stage, following, following_phase
        if (end > start or (not ACCUMULATE and not again)) and row < n_out:
            if CHUNKS > 0:
                if again:
                    _complete()
                _send_all(out, group, row, col, total, c, True if ACCUMULATE else again, PART, CHUNKS)
            else:
                if ACCUMULATE:
                    total += there
                gl.store(grad_ptr + places, total, mask=inside)
    tma.store_wait(0)


@gluon.jit
def wgrad_kernel(
    dy,
    x,
    dy_scales,
    x_scales,
    out,
    grad_ptr,
    offsets_ptr,
    n_out,
    n_in,
    n_rows,
    tiles,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    CHUNKS: gl.constexpr,
    GROUPED: gl.constexpr,
    ACCUMULATE: gl.constexpr,
    BAND: gl.constexpr,
):
    a = gl.allocate_shared_memory(dy.dtype, [STAGES * CONSUMERS, 64, 128], dy.layout)
    b = gl.allocate_shared_memory(x.dtype, [STAGES, 128, 128], x.layout)
    s = gl.allocate_shared_memory(gl.float32, [STAGES * CONSUMERS, 64], dy_scales.layout)
    t = gl.allocate_shared_memory(gl.float32, [STAGES, 128], x_scales.layout)
    c = t if CHUNKS == 0 else gl.allocate_shared_memory(gl.float32, [CONSUMERS * CHUNKS, 1, 64, 32], out.layout)
    full, empty = _barriers(STAGES, CONSUMERS)
    operands = (dy, x, dy_scales, x_scales)
    sizes = (n_out, n_in, n_rows, tiles)
    stages = (a, b, s, t, full, empty)
    to = (out, grad_ptr, offsets_ptr, sizes, stages, c)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_wgrad_consumer, (to, 0, 2, STAGES, CHUNKS, GROUPED, ACCUMULATE, BAND)),
                (_wgrad_consumer, (to, 1, 2, STAGES, CHUNKS, GROUPED, ACCUMULATE, BAND)),
                (_wgrad_producer, (operands, offsets_ptr, sizes, stages, 2, STAGES, CHUNKS > 0, GROUPED, BAND)),
            ],
            [4, 1],
            [232, 40],
        )
    else:
        gl.warp_specialize(
            [
                (_wgrad_consumer, (to, 0, 3, STAGES, CHUNKS, GROUPED, ACCUMULATE, BAND)),
                (_wgrad_consumer, (to, 1, 3, STAGES, CHUNKS, GROUPED, ACCUMULATE, BAND)),
                (_wgrad_consumer, (to, 2, 3, STAGES, CHUNKS, GROUPED, ACCUMULATE, BAND)),
                (_wgrad_producer, (operands, offsets_ptr, sizes, stages, 3, STAGES, CHUNKS > 0, GROUPED, BAND)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


def launch_wgrad(
    grad: Tensor,
    dy_codes: Tensor,
    dy_scales: Tensor,
    x_codes: Tensor,
    x_scales: Tensor,
    offsets: Tensor | None,
    accumulate: bool,
    tile: WgradTile,
) -> None:
    """`fp8_wgrad_`, with offsets `grouped_fp8_wgrad_`, without checks; `grad` begins at a multiple of 16 bytes."""
    groups = 1 if offsets is None else grad.shape[0]
    n, k = grad.shape[-2:]
    tiles = groups * cdiv(n, 64 * tile.consumers) * cdiv(k, N)
    wgrad_kernel[(min(tiles, multiprocessors(grad.device)),)](
        matrix(dy_codes, 64),
        matrix(x_codes, N),
        flat(dy_scales, 64),
        flat(x_scales, N),
        describe(grad, (groups, n, k), (n * k, k, 1), (1, 64, 32)),
        grad,
        grad if offsets is None else offsets,  # not read when dense
        n,
        k,
        dy_codes.shape[1],
        tiles,
        CONSUMERS=tile.consumers,
        STAGES=tile.stages,
        CHUNKS=tile.chunks,
        GROUPED=offsets is not None,
        ACCUMULATE=accumulate,
        BAND=BAND,
        num_warps=4,
    )
