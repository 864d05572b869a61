"""The FP8 references against definitions spelt out: the nearest code by search, the edge cases of docs/numerics.md."""

import math

import pytest
import torch
from inputs import Maker
from inputs8 import bits

import deepv3.kernels as kernels
from deepv3.kernels.reference.e5m6 import e5m6_bits, e5m6_values
from deepv3.kernels.reference.quantise import dequantise_blocks, dequantise_columns, to_codes
from deepv3.kernels.testing import relative_norm


def nearest_even(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Index of the nearest entry of an ascending table, the even index where two are as near."""
    values, table = values.double(), table.double()
    high = torch.searchsorted(table, values.contiguous()).clamp(1, len(table) - 1)
    below, above = values - table[high - 1], table[high] - values
    return torch.where((above < below) | ((above == below) & (high % 2 == 0)), high, high - 1)


def test_codes_are_the_nearest_e4m3_ties_to_even():
    table = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # +0 to 448, by code
    middles = (table[1:] + table[:-1]) / 2
    values = torch.cat((table, middles, middles.nextafter(table[1:]), middles.nextafter(table[:-1])))
    values = torch.cat((values, torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 460))
    codes = to_codes(values).view(torch.uint8)
    assert torch.equal(codes.long(), nearest_even(values.clamp(max=448), table))
    assert torch.equal(to_codes(-values).view(torch.uint8), codes | 0x80)


def test_e5m6_is_the_nearest_of_its_numbers_ties_to_even():
    table = e5m6_values(torch.arange(0x7C0, dtype=torch.int32))
    assert table[-1] == 65024 and table[1] == 2.0**-20 and (table.diff() > 0).all()
    middles = (table[1:] + table[:-1]) / 2
    values = torch.cat((table, middles, middles.nextafter(table[1:]), middles.nextafter(table[:-1])))
    assert torch.equal(e5m6_bits(values).long(), nearest_even(values, table))
    assert torch.equal(e5m6_bits(-values), e5m6_bits(values) | 0x800)
    assert e5m6_bits(torch.tensor([1e9, math.nan, -math.inf])).tolist() == [0x7BF, 0x7E0, 0xFBF]


@pytest.mark.parametrize("rows", [1, 2, 128])
def test_e5m6_keeps_seven_bits(rows):
    x = Maker(rows, torch.float32).normal(rows, 256)
    words, scales = kernels.e5m6_pack(x)
    assert words.shape == (rows, 96) and words.dtype == torch.int32 and scales.shape == (rows, 2)
    assert (scales.log2() % 1 == 0).all()
    back = kernels.e5m6_unpack(words, scales, torch.float32)
    assert ((back - x).abs() <= x.abs() * 2.0**-7 + 1e-6).all()
    assert torch.equal(kernels.e5m6_unpack(words, scales), back.bfloat16()) and torch.equal(
        back.bfloat16().float(), back
    )


def test_scales_are_the_rounded_quotient_and_powers_of_two_the_next_above():
    x = Maker(0, torch.float32).normal(64, 256)
    amax = x.view(64, 2, 128).abs().amax(2)
    _, scales = kernels.quantise_rows(x)
    assert torch.equal(scales, amax / torch.full_like(amax, 448.0))
    assert scales.stride() == (1, 64) and kernels.quantise_rows(x[:5])[1].stride() == (1, 8)
    _, powers = kernels.quantise_rows(x, True)
    assert (powers.log2() % 1 == 0).all() and ((powers >= scales) & (powers < 2 * scales)).all()
    exact = torch.full((1, 128), 448.0 * 2.0**-5)
    assert kernels.quantise_rows(exact, True)[1].item() == 2.0**-5
    assert kernels.quantise_rows(exact.nextafter(torch.tensor(1e9)), True)[1].item() == 2.0**-4


def test_columns_are_rows_of_the_transpose():
    x = Maker(1, torch.float32).normal(256, 144)
    codes, scales = kernels.quantise_columns(x)
    rows, row_scales = kernels.quantise_rows(x.t().contiguous())
    assert torch.equal(bits(codes), bits(rows)) and torch.equal(scales.t(), row_scales)
    both = kernels.quantise_both(x, True)
    alone = *kernels.quantise_rows(x, True), *kernels.quantise_columns(x, True)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(both, alone, strict=True))


def test_columns_are_filled_up_with_positive_zeros():
    codes, scales = kernels.quantise_columns(-torch.ones(130, 16))
    assert codes.shape == (16, 256) and scales.shape == (2, 16)
    assert (bits(codes)[:, 130:] == 0).all() and (bits(codes)[:, :130] == 0xFE).all()


@pytest.mark.parametrize("shape", [(576, 144), (3, 144, 272)])
def test_both_orders_of_a_weight_are_the_same_numbers(shape):
    w = Maker(2, torch.float32).normal(*shape)
    codes, scales, codes_t, scales_t = kernels.quantise_blocks(w)
    assert torch.equal(bits(codes_t.transpose(-1, -2).contiguous()), bits(codes))
    assert torch.equal(scales_t.transpose(-1, -2), scales)
    assert scales.stride(-2) % 4 == 0 and scales_t.stride(-2) % 4 == 0
    blocks = w[..., :128, 128:].abs().amax((-1, -2))
    assert torch.equal(scales[..., 0, 1], blocks / torch.full_like(blocks, 448.0))
    assert relative_norm(dequantise_blocks(codes, scales), w) < 0.03


def test_edge_cases_of_the_contract():
    x = torch.ones(7, 128)
    x[0] = 0.0
    x[1, 3] = -0.0
    x[2, 5] = math.nan
    x[3, 5] = -math.inf
    x[4, 6] = 2.0**-11 / 448  # below half the smallest subnormal of a block whose largest is 1
    x[5] = 1e-30
    x[6] = torch.finfo(torch.bfloat16).max
    for pow2 in (False, True):
        codes, scales = kernels.quantise_rows(x, pow2)
        raw, zero = bits(codes), 2.0**-88 if pow2 else torch.tensor(2.0**-80) / torch.tensor(448.0)
        assert scales[0] == zero and (raw[0] == 0).all() and scales[5] == zero and (raw[5] == 0).all()
        assert raw[1, 3] == 0x80 and raw[4, 6] == 0
        assert raw[2, 5] == 0x7F and (raw[2] == 0x7F).sum() == 1 and scales[2] == scales[1]
        assert raw[3, 5] == 0x7F and (raw[3] == 0).sum() == 127 and scales[3] == math.inf
        assert torch.isnan(kernels.dequantise_rows(codes, scales)).sum(1).tolist() == [0, 0, 1, 128, 0, 0, 0]
        back = kernels.dequantise_rows(codes, scales, torch.float32)[6]
        assert (back == math.inf).all() if pow2 else relative_norm(back, x[6]) < 0.07  # 256 x 2^120 is beyond FP32


def test_powers_of_two_make_the_second_quantisation_free():
    x = Maker(3, torch.float32).normal(512, 512)
    errors = {}
    for pow2 in (False, True):
        columns = kernels.requantise(*kernels.quantise_rows(x, pow2), None, pow2)
        errors[pow2] = relative_norm(dequantise_columns(*columns).t(), x)
    assert errors[True] < 0.0272 and errors[False] > 0.034


def test_requantising_gathered_rows_is_gathering_requantised_rows():
    m = Maker(4, torch.float32)
    codes, scales = kernels.quantise_rows(m.normal(20, 144), True)
    tokens = torch.tensor([3, 3, 19, -1, 0] + [7] * 130, dtype=torch.int32)
    rows, row_scales = kernels.permute_fp8(codes, scales, tokens)
    assert (
        torch.equal(bits(rows[0]), bits(codes[3])) and (bits(rows[3]) == 0).all() and (row_scales[3] == 2.0**-88).all()
    )
    one, two = kernels.requantise(codes, scales, tokens), kernels.requantise(rows, row_scales)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("align", [1, 4, 128])
def test_every_pair_has_its_own_row_in_its_experts_range(align):
    m = Maker(5, torch.float32)
    indices = m.choices(50, 6, 3).where(m.fp32(50, 3) > -0.5, -1)
    slots, tokens, offsets, counts = kernels.routing_tables(indices, 6, align)
    assert (offsets % align == 0).all() and tokens.numel() == kernels.row_bound(150, 6, align)
    assert torch.equal(counts, torch.stack([(indices == e).sum() for e in range(6)]).int())
    starts = [0, *offsets.tolist()]
    for expert in range(6):
        mine = tokens[starts[expert] : starts[expert] + int(counts[expert])]
        assert torch.equal(mine.long(), (indices == expert).nonzero()[:, 0])  # by token, ascending
        assert (tokens[starts[expert] + int(counts[expert]) : starts[expert + 1]] == -1).all()
    assert (tokens[starts[-1] :] == -1).all() and torch.equal(slots < 0, indices < 0)
    rows, pairs = slots[slots >= 0].long(), (slots >= 0).nonzero()[:, 0]
    assert torch.equal(tokens[rows].long(), pairs) and rows.unique().numel() == rows.numel()


def test_fp8_products_are_near_and_unbiased():
    """The recipe's own error on normal data: FP8 linear against FP32, forward and both gradients."""
    m = Maker(6, torch.float32)
    x, w, dy = m.normal(256, 512), m.normal(384, 512), m.normal(256, 384)
    w8, w_scales, w8_t, w_t_scales = kernels.quantise_blocks(w)
    x8, x_scales = kernels.quantise_rows(x, True)
    dy8, dy_scales, dy8_t, dy_t_scales = kernels.quantise_both(dy)
    grad = torch.empty_like(w)
    kernels.fp8_wgrad_(grad, dy8_t, dy_t_scales, *kernels.requantise(x8, x_scales), False)
    pairs = {
        "y": (kernels.fp8_mm(x8, x_scales, w8, w_scales, torch.float32), x @ w.t()),
        "dx": (kernels.fp8_mm(dy8, dy_scales, w8_t, w_t_scales, torch.float32), dy @ w),
        "dw": (grad, dy.t() @ x),
    }
    for name, (fp8, exact) in pairs.items():
        assert relative_norm(fp8, exact) <= 4e-2, name
        assert (fp8 - exact).mean().abs() < 0.05 * (fp8 - exact).square().mean().sqrt(), name
    before = grad.clone()
    kernels.fp8_wgrad_(grad, dy8_t, dy_t_scales, *kernels.requantise(x8, x_scales), True)
    assert relative_norm(grad, 2 * before) < 1e-6


def test_grouped_products_are_the_products_of_the_groups():
    m = Maker(7, torch.float32)
    offsets = torch.tensor([128, 128, 384], dtype=torch.int32)
    x8, x_scales, x8_t, x_t_scales = kernels.quantise_both(m.normal(512, 144))
    w8, w_scales, _, _ = kernels.quantise_blocks(m.normal(3, 80, 144))
    y = kernels.grouped_fp8_mm(x8, x_scales, w8, w_scales, offsets)
    assert y.dtype == torch.bfloat16 and (y[384:] == 0).all()
    last = kernels.fp8_mm(x8[128:384], x_scales[128:384], w8[2], w_scales[2])
    assert torch.equal(y[128:384], last)
    dy8_t, dy_scales = kernels.quantise_columns(m.normal(512, 80))
    grad = torch.full((3, 80, 144), math.nan)
    kernels.grouped_fp8_wgrad_(grad, dy8_t, dy_scales, x8_t, x_t_scales, offsets, False)
    expected = torch.empty(80, 144)
    parts = dy8_t[:, 128:384].contiguous(), dy_scales[1:3], x8_t[:, 128:384].contiguous(), x_t_scales[1:3]
    kernels.fp8_wgrad_(expected, *parts, False)
    assert torch.equal(grad[2], expected) and (grad[1] == 0).all()
