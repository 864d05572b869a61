"""Where the tiles of FP8 products in Gluon lie (`gluon8_mm`), in groups of rows whose sizes stay on the device.

A group's rows begin a tile, and its last tile may reach into the next group: those rows are multiplied and not written.
How many tiles the groups have is counted once per program, into a table that producer and consumers look a tile up in.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from deepv3.kernels.gluon8 import place, uniform


@gluon.jit
def count_tiles(table, offsets_ptr, n_groups, M: gl.constexpr, GROUPS: gl.constexpr):
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
def rows_of_tiles(table, offsets_ptr, n_rows, n_groups, M: gl.constexpr, GROUPS: gl.constexpr):
    """Tiles one below the other."""
    if GROUPS == 0:
        return gl.cdiv(n_rows, M)
    else:
        owned = uniform(gl.max(_counted(table, GROUPS), axis=0))
        return owned + gl.cdiv(n_rows - gl.load(offsets_ptr + n_groups - 1), M)


@gluon.jit
def find_tile(
    tile,
    tiles_m,
    table,
    offsets_ptr,
    sizes,
    M: gl.constexpr,
    N: gl.constexpr,
    GROUPS: gl.constexpr,
    BAND: gl.constexpr,
):
    """(row, end of its group, first columns of the parts, group, whether the rows are anybody's, steps: one if not).

    A part lies in one block of weight scales: of 192 columns, those on the left are the 64 in tiles of odd columns and
    the 128 in others.
    """
    n_rows, n_out, n_in, n_groups, scale_rows, group_stride, scale_stride = sizes
    tile_m, tile_n = place(tile, tiles_m, gl.cdiv(n_out, N), BAND)
    row, end, col, odd = tile_m * M, n_rows, tile_n * N, tile_n % 2
    cols = (col, col + 128) if N == 256 else (col,)
    if N == 192:
        cols = (col + (1 - odd) * 128, col + odd * 64)
    steps, group, owned = gl.cdiv(n_in, 128), 0, True
    if GROUPS > 0:
        counts = _counted(table, GROUPS)
        group = uniform(gl.minimum(gl.sum((counts <= tile_m).to(gl.int32), axis=0), n_groups))
        before = uniform(gl.max(gl.where(counts <= tile_m, counts, 0), axis=0))
        start = gl.load(offsets_ptr + group - 1, mask=group > 0, other=0)
        end = gl.load(offsets_ptr + group, mask=group < n_groups, other=n_rows)
        row = start + (tile_m - before) * M
        owned = group < n_groups
        steps = gl.where(owned, steps, 1)
        group = gl.minimum(group, n_groups - 1)
    return row, end, cols, group, owned, steps
