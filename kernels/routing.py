"""Tables that sort rows by expert, the copy to that order and the sum back: Triton kernels.

Tables, by counting, in two launches whose work grows with the pairs (blocks of 128 (token, choice) pairs), shared by at
most 128 programs:
1. Each program counts its pairs per expert: histograms [programs, E]. Rows of the sorted order are marked as empty.
2. Each program adds up the histograms: all are an expert's count, those of earlier programs what lies before. An
   expert's first row is the sum of the (filled up) counts before it. A pair's row is that, plus its expert's pairs in
   earlier blocks, plus those before it in its own block, found by comparing all pairs of the block.
Rows are copied down strips of columns, so that a token's copies are read while its piece is in L2.
No atomics: tables are the same in every run, and tokens keep their order within an expert.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepv3.kernels.casts import INTERPRETED
from deepv3.kernels.checks import ACTIVATIONS, INT32, block, cdiv, check, next_power_of_2
from deepv3.kernels.reference.routing import row_bound

PAIRS = 128  # of a block; times experts below 2^24, so that FP32 holds the keys
COUNTED = 1024  # pairs that are counted at once
PROGRAMS = 128  # histograms that every program reads: few
SUMMED = 16384  # counts a program has under way: 64 words a lane
WARPS = 4  # of the second launch
BLOCKS = 255  # of a program at most, so that its counts fit 16 bits
COPY_ELEMENTS = 4096
STRIP = 1  # column tiles that programs gather side by side


@triton.jit
def _histogram_kernel(
    indices_ptr,
    histogram_ptr,
    token_of_slot_ptr,
    n_pairs,
    n_slots,
    share,
    PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    counts = tl.zeros((EXPERTS,), dtype=tl.int32)
    end = (tl.program_id(0) + 1) * share
    for first in range(end - share, end, PAIRS):
        pairs = first + tl.arange(0, PAIRS)
        expert = tl.load(indices_ptr + pairs, mask=(pairs < n_pairs) & (pairs < end), other=-1)
        counts += tl.histogram(tl.maximum(expert, 0), EXPERTS, mask=expert >= 0)
    place = histogram_ptr + tl.program_id(0) * (2 * _stride(EXPERTS)) + tl.arange(0, EXPERTS)
    tl.store(place, counts.to(tl.int16))
    for first in range(tl.program_id(0) * PAIRS, n_slots, tl.num_programs(0) * PAIRS):
        slots = first + tl.arange(0, PAIRS)
        tl.store(token_of_slot_ptr + slots, tl.full((PAIRS,), -1, tl.int32), mask=slots < n_slots)


@triton.jit
def _above(a, b):
    """1.0 where a is larger, else 0.0, of whole numbers in FP32."""
    if INTERPRETED:
        return tl.clamp(a - b, 0.0, 1.0)
    else:  # a comparison would take a predicate, and instructions of half the speed
        return tl.inline_asm_elementwise("sub.sat.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, is_pure=True, pack=1)


@triton.jit
def _rank_in_block(expert, PAIRS: tl.constexpr):
    """How many earlier pairs of the block have the same expert: keys below the pair's, less those of other experts."""
    least = (expert * PAIRS).to(tl.float32)
    keys = least + tl.arange(0, PAIRS).to(tl.float32)
    earlier = _above(keys[None, :], keys[:, None]) - _above(least[None, :], keys[:, None])
    return tl.sum(earlier, axis=0).to(tl.int32)  # along the axis a lane holds whole


@triton.constexpr_function
def _stride(experts):
    """Words from one program's histogram to the next."""
    return experts // 2 + 1


@triton.jit
def _packed_sums(words, PACKED: tl.constexpr):
    ROWS: tl.constexpr = words.shape[0]
    return tl.sum(tl.reshape(words, (ROWS // PACKED, PACKED, words.shape[1])), axis=1)


@triton.jit
def _counts(histogram_ptr, program, EXPERTS: tl.constexpr, SUMMED: tl.constexpr, PACKED: tl.constexpr):
    """(pairs of every expert, those of them in programs before this one): int32 [EXPERTS] each.

    A lane reads the counts of two neighbouring experts of one program in a word, and adds PACKED of them as they are.
    All programs' are added where they were loaded: sums over an axis that lies across warps go through shared memory,
    there all lanes of a warp through one bank. Hence the odd `_stride`: rows do not begin where a lane could read more.
    """
    words = tl.arange(0, EXPERTS // 2)
    low = tl.zeros((EXPERTS // 2,), dtype=tl.int32)
    high, low_before, high_before = low, low, low
    for first in range(0, tl.num_programs(0), SUMMED):
        rows = first + tl.arange(0, SUMMED)
        place = histogram_ptr + first * _stride(EXPERTS) + words[None, :]
        place += tl.arange(0, SUMMED)[:, None] * _stride(EXPERTS)
        count = tl.load(place, mask=(rows < tl.num_programs(0))[:, None], other=0)
        part = _packed_sums(count, PACKED)
        low, high = low + tl.sum(part & 0xFFFF, axis=0), high + tl.sum((part >> 16) & 0xFFFF, axis=0)
        part = _packed_sums(tl.where((rows < program)[:, None], count, 0), PACKED)
        low_before += tl.sum(part & 0xFFFF, axis=0)
        high_before += tl.sum((part >> 16) & 0xFFFF, axis=0)
    return tl.interleave(low, high), tl.interleave(low_before, high_before)


@triton.jit
def _slots_kernel(
    indices_ptr,
    histogram_ptr,
    slot_of_token_ptr,
    token_of_slot_ptr,
    offsets_ptr,
    counts_ptr,
    n_pairs,
    n_experts,
    top_k,
    align,
    share,
    PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SUMMED: tl.constexpr,
    PACKED: tl.constexpr,
):
    program = tl.program_id(0)
    end = (program + 1) * share
    pairs = end - share + tl.arange(0, PAIRS)
    expert = tl.load(indices_ptr + pairs, mask=pairs < n_pairs, other=-1)  # before there is something to wait for
    experts = tl.arange(0, EXPERTS)
    counts, before = _counts(histogram_ptr, program, EXPERTS, SUMMED, PACKED)
    filled = (counts + align - 1) // align * align
    offsets = tl.cumsum(filled, axis=0)
    if program == 0:
        tl.store(offsets_ptr + experts, offsets, mask=experts < n_experts)
        tl.store(counts_ptr + experts, counts, mask=experts < n_experts)
    base = offsets - filled + before

    for first in range(end - share, end, PAIRS):
        pairs = first + tl.arange(0, PAIRS)
        ahead = pairs + PAIRS
        following = tl.load(indices_ptr + ahead, mask=(ahead < n_pairs) & (ahead < end), other=-1)
        rank = _rank_in_block(expert, PAIRS)
        slot = tl.where(expert >= 0, tl.gather(base, tl.maximum(expert, 0), 0) + rank, -1)
        tl.store(slot_of_token_ptr + pairs, slot, mask=pairs < n_pairs)
        tl.store(token_of_slot_ptr + slot, pairs // top_k, mask=expert >= 0)
        if first + PAIRS < end:
            base += tl.histogram(tl.maximum(expert, 0), EXPERTS, mask=expert >= 0)
        expert = following


@triton.jit
def strip_tile(row_tiles, col_tiles, WIDTH: tl.constexpr):
    """(row tile, column tile) of this program: strips of WIDTH column tiles one by one, each from top to bottom.

    Rows that a strip gathers several times then fit into L2, where whole rows would not.
    """
    strip = tl.program_id(0) // (row_tiles * WIDTH)
    width = tl.minimum(col_tiles - strip * WIDTH, WIDTH)
    place = tl.program_id(0) - strip * row_tiles * WIDTH
    return place // width, strip * WIDTH + place % width


@triton.jit
def _permute_kernel(
    x_ptr,
    token_of_slot_ptr,
    rows_ptr,
    n_rows,
    n_cols,
    x_stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STRIP: tl.constexpr,
):
    row_tile, col_tile = strip_tile(tl.cdiv(n_rows, ROWS), tl.cdiv(n_cols, COLS), STRIP)
    slots = row_tile * ROWS + tl.arange(0, ROWS)
    cols = col_tile * COLS + tl.arange(0, COLS)
    row_mask = slots < n_rows
    mask = row_mask[:, None] & (cols < n_cols)[None, :]
    tokens = tl.load(token_of_slot_ptr + slots, mask=row_mask, other=-1).to(tl.int64)
    taken = (tokens >= 0)[:, None] & (cols < n_cols)[None, :]
    values = tl.load(x_ptr + tokens[:, None] * x_stride + cols[None, :], mask=taken, other=0.0)
    tl.store(rows_ptr + slots.to(tl.int64)[:, None] * n_cols + cols[None, :], values, mask=mask)


@triton.jit
def _unpermute_kernel(
    rows_ptr,
    slot_of_token_ptr,
    base_ptr,
    y_ptr,
    n_cols,
    base_stride,
    BASE: tl.constexpr,
    TOP_K: tl.constexpr,
    COLS: tl.constexpr,
):
    col_blocks = tl.cdiv(n_cols, COLS)
    token = (tl.program_id(0) // col_blocks).to(tl.int64)
    cols = tl.program_id(0) % col_blocks * COLS + tl.arange(0, COLS)
    mask = cols < n_cols
    total = tl.zeros((COLS,), dtype=tl.float32)
    if BASE:
        total += tl.load(base_ptr + token * base_stride + cols, mask=mask, other=0.0).to(tl.float32)
    for k in tl.static_range(TOP_K):
        slot = tl.load(slot_of_token_ptr + token * TOP_K + k).to(tl.int64)
        total += tl.load(rows_ptr + slot * n_cols + cols, mask=mask & (slot >= 0), other=0.0).to(tl.float32)
    tl.store(y_ptr + token * n_cols + cols, total.to(y_ptr.dtype.element_ty), mask=mask)


def routing_tables(indices: Tensor, n_experts: int, align: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.routing.routing_tables`. Indices of n_experts and more are not noticed."""
    check("indices", indices, (None, None), INT32, indices.device)
    if n_experts < 1 or align < 1:
        raise ValueError(f"n_experts is {n_experts}, align {align}, needed 1 or more")
    n_pairs, device = indices.numel(), indices.device
    n_slots = row_bound(n_pairs, n_experts, align)
    slot_of_token = torch.empty_like(indices)
    token_of_slot = torch.empty(n_slots, dtype=torch.int32, device=device)
    if n_pairs == 0:
        offsets, counts = torch.zeros((2, n_experts), dtype=torch.int32, device=device)
        return slot_of_token, token_of_slot, offsets, counts
    offsets, counts = torch.empty((2, n_experts), dtype=torch.int32, device=device).unbind()
    experts = max(2, next_power_of_2(n_experts))
    share = PAIRS * min(BLOCKS, cdiv(n_pairs, PAIRS * PROGRAMS))  # pairs of a program
    programs = cdiv(n_pairs, share)
    histogram = torch.empty((programs, _stride(experts)), dtype=torch.int32, device=device)
    counted = min(COUNTED, next_power_of_2(share))
    _histogram_kernel[(programs,)](
        indices, histogram.view(torch.int16), token_of_slot, n_pairs, n_slots, share, PAIRS=counted, EXPERTS=experts
    )
    summed = max(1, min(64, SUMMED // experts))
    _slots_kernel[(programs,)](
        indices,
        histogram,
        slot_of_token,
        token_of_slot,
        offsets,
        counts,
        n_pairs,
        n_experts,
        indices.shape[1],
        align,
        share,
        PAIRS=PAIRS,
        EXPERTS=experts,
        SUMMED=summed,
        PACKED=min(summed, 1 << (0xFFFF // share).bit_length() - 1),  # a power of two, the sum below 2^16
        num_warps=WARPS,
    )
    return slot_of_token, token_of_slot, offsets, counts


def permute(x: Tensor, token_of_slot: Tensor) -> Tensor:
    """See `reference.routing.permute`. Rows of x may be strided."""
    check("x", x, (None, None), ACTIVATIONS, x.device, contiguous=False)
    check("token_of_slot", token_of_slot, (None,), INT32, x.device)
    n_rows, n_cols = token_of_slot.shape[0], x.shape[1]
    rows = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
    if rows.numel():
        cols = block(n_cols, 2048)
        per_program = max(1, COPY_ELEMENTS // cols)
        _permute_kernel[(cdiv(n_rows, per_program) * cdiv(n_cols, cols),)](
            x, token_of_slot, rows, n_rows, n_cols, x.stride(0), ROWS=per_program, COLS=cols, STRIP=STRIP
        )
    return rows


def unpermute(rows: Tensor, slot_of_token: Tensor, base: Tensor | None = None) -> Tensor:
    """See `reference.routing.unpermute`. Rows of base may be strided."""
    check("rows", rows, (None, None), ACTIVATIONS, rows.device)
    check("slot_of_token", slot_of_token, (None, None), INT32, rows.device)
    n_tokens, n_cols = slot_of_token.shape[0], rows.shape[1]
    if base is not None:
        check("base", base, (n_tokens, n_cols), ACTIVATIONS, rows.device, contiguous=False)
    y = torch.empty((n_tokens, n_cols), dtype=rows.dtype, device=rows.device)
    if y.numel():
        cols = block(n_cols, 1024)
        start = rows if base is None else base  # not read without BASE
        _unpermute_kernel[(n_tokens * cdiv(n_cols, cols),)](
            rows,
            slot_of_token,
            start,
            y,
            n_cols,
            start.stride(0),
            BASE=base is not None,
            TOP_K=slot_of_token.shape[1],
            COLS=cols,
        )
    return y
