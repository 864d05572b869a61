"""The FP8 kernels against their references, bit by bit where nothing but rounding to a format happens."""

import math

import pytest
import torch
from inputs import Maker, kernel
from inputs8 import assert_same, bits, hard_values, make, same_bits

import deepv3.kernels as kernels
from deepv3.kernels import routing, triton8
from deepv3.kernels.reference.e5m6 import e5m6_values
from deepv3.kernels.testing import relative_norm

NAN = float("nan")
HARD = hard_values()

EXACT = [
    ("quantise_rows", {"rows": 70, "width": 272}),
    ("quantise_rows", {"rows": 1, "width": 16, "pow2": True}),
    ("quantise_columns", {"rows": 130, "width": 144}),
    ("quantise_columns", {"rows": 1, "width": 128, "pow2": True}),
    ("quantise_both", {"rows": 129, "width": 144}),
    ("quantise_both", {"rows": 64, "width": 128, "pow2": True}),
    ("quantise_blocks", {"n": 144, "k": 272}),
    ("quantise_blocks", {"n": 16, "k": 128, "groups": 3, "pow2": True}),
    ("dequantise_rows", {"rows": 33, "width": 144}),
    ("permute_fp8", {"rows": 20, "width": 1040, "taken": 37}),
    ("permute_fp8", {"rows": 3, "width": 16, "taken": 1}),
    ("requantise", {"rows": 140, "width": 144}),
    ("requantise", {"rows": 20, "width": 144, "taken": 150}),
    ("requantise", {"rows": 20, "width": 128, "taken": 128, "pow2": False}),
    ("e5m6_pack", {"rows": 33, "width": 256}),
    ("e5m6_unpack", {"rows": 33, "width": 256}),
    ("quantise_rows", {"rows": 0, "width": 128}),
    ("quantise_both", {"rows": 0, "width": 128}),
    ("quantise_columns", {"rows": 0, "width": 128}),
    ("quantise_blocks", {"n": 0, "k": 128}),
    ("permute_fp8", {"rows": 5, "width": 128, "taken": 0}),
    ("requantise", {"rows": 0, "width": 128}),
    ("e5m6_pack", {"rows": 0, "width": 128}),
]


@pytest.mark.parametrize(("name", "shape"), EXACT, ids=lambda value: value if isinstance(value, str) else None)
def test_quantisers_give_the_bits_of_their_references(name, shape):
    same_bits(name, *make(name, Maker(1, torch.float32), **shape))


@pytest.mark.parametrize("case", HARD)
def test_hard_values_give_the_bits_of_the_references(case):
    x = HARD[case]
    same_bits("quantise_both", x, False)
    same_bits("quantise_both", x, True)
    same_bits("quantise_blocks", x[:128, :144].contiguous(), True)
    same_bits("e5m6_pack", x[:33, :256])


def test_every_bf16_number_is_rounded_as_torch_rounds():
    every = (torch.arange(65536, dtype=torch.int32) << 16).view(torch.float32).bfloat16().view(512, 128)
    same_bits("quantise_rows", every)
    same_bits("e5m6_pack", every)
    finite = every.float().where(every.isfinite(), 0.0).clamp(-1e4, 1e4).view(256, 256)
    same_bits("quantise_both", finite)


def test_strided_rows_are_quantised_where_they_lie():
    x = torch.randn(40, 300)[:, 7:151]
    same_bits("quantise_rows", x)
    same_bits("quantise_both", x)


def test_every_e5m6_number_survives_packing():
    words = torch.arange(4096, dtype=torch.int32)
    values = e5m6_values(words).where((words & 0x7C0) != 0x7C0, 65024.0).view(32, 128)
    values[:, 0] = 65024.0  # fixes the scale at 1
    packed, scales = kernel("e5m6_pack")(values)
    assert (scales == 1).all()
    assert torch.equal(kernel("e5m6_unpack")(packed, scales, torch.float32), values)
    assert torch.equal(kernels.e5m6_unpack.__wrapped__(packed, scales, torch.float32), values)


def test_power_of_two_scales_without_division_are_those_of_the_rounded_quotient():
    """Amax of every exponent, mantissas beside those of 448 and of 65024, which is E5M6's largest."""
    mantissas = torch.tensor([0, 1, 0x5FFFFF, 0x600000, 0x600001, 0x7DFFFF, 0x7E0000, 0x7E0001, 0x7FFFFF])
    amax = ((torch.arange(255)[:, None] << 23) + mantissas).flatten().int().view(torch.float32)
    x = torch.zeros(len(amax) + 1, 128)
    x[:-1, 5], x[-1, 7] = amax, float("inf")
    same_bits("quantise_rows", x, True)
    same_bits("e5m6_pack", x)


TABLES = [(200, 16, 6), (40, 256, 8), (1, 3, 2), (600, 5, 1), (33, 8, 2)]


@pytest.mark.parametrize("align", [1, 128])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), TABLES)
def test_routing_tables_with_filling_and_absent_choices_equal_the_reference(tokens, experts, top_k, align):
    m = Maker(tokens, torch.float32)
    indices = m.choices(tokens, experts, top_k)
    same_bits("routing_tables", indices, experts, align)
    same_bits("routing_tables", indices.where(m.fp32(tokens, top_k) > 0, -1), experts, align)


@pytest.mark.parametrize(("programs", "summed"), [(2, 16), (4, 64)])
def test_routing_tables_of_many_blocks_a_program_equal_the_reference(programs, summed, monkeypatch):
    monkeypatch.setattr(routing, "PROGRAMS", programs)
    monkeypatch.setattr(routing, "SUMMED", summed)
    same_bits("routing_tables", Maker(6, torch.float32).choices(300, 8, 6), 8, 128)


def test_absent_rows_are_zeros_and_add_nothing():
    m = Maker(2, torch.float32)
    indices = m.choices(20, 4, 2).where(m.fp32(20, 2) > -0.5, -1)
    slots, tokens, _, _ = kernel("routing_tables")(indices, 4, 16)
    x = m.integers(8, 20, 40).float()
    rows = kernel("permute")(x, tokens)
    assert torch.equal(rows, kernels.permute.__wrapped__(x, tokens)) and (rows[tokens < 0] == 0).all()
    assert torch.equal(kernel("unpermute")(rows, slots), (indices >= 0).sum(1, keepdim=True) * x)


def test_norm_with_quantisation_equals_norm_then_quantisation():
    for shape in ({"tokens": 21, "width": 272}, {"tokens": 3, "width": 80, "residual": False, "output": True}):
        x, weight, eps, residual, pow2, output = make("rmsnorm_fp8", Maker(3, torch.float32), **shape)
        y, rstd, summed = kernel("rmsnorm")(x, weight, eps, residual)
        expected = *kernel("quantise_rows")(y, pow2), rstd, summed, y if output else None
        assert_same(kernel("rmsnorm_fp8")(x, weight, eps, residual, pow2, output), expected, "rmsnorm_fp8")
        again = kernel("rmsnorm_fp8_columns")(summed, weight, rstd, pow2)
        assert_same(again, kernel("quantise_columns")(y, pow2), "rmsnorm_fp8_columns")


def test_zeros_of_a_norm_keep_the_signs_of_its_weight():
    """x + residual is often exactly 0; times a negative weight it is -0, with code 0x80. Beyond the rows all is +0."""
    m = Maker(8, torch.float32)
    x, weight = m.normal(21, 272), m.normal(272)
    x[::3, ::2] = 0.0
    y, rstd, _ = kernel("rmsnorm")(x, weight, 1e-6)
    codes, scales = kernel("rmsnorm_fp8_columns")(x, weight, rstd)
    assert_same((codes, scales), kernel("quantise_columns")(y), "rmsnorm_fp8_columns")
    assert (bits(codes) == 0x80).any() and not bits(codes)[:, 21:].any()


@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_with_quantisation_equals_swiglu_then_quantisation(weighted):
    h, weight, _, _ = make("swiglu_fp8", Maker(4, torch.float32), rows=70, width=256, weight=weighted)
    codes, scales, kept, kept_scales = kernel("swiglu_fp8")(h, weight)
    expected = kernel("quantise_rows")(kernel("swiglu")(h, weight))
    assert_same((codes, scales), expected, "swiglu_fp8")
    assert_same((kept, kept_scales), kernel("quantise_rows")(h, True), "the kept input")
    assert kernel("swiglu_fp8")(h, weight, True, False)[2:] == (None, None)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pow2", [False, True])
def test_swiglu_backward_equals_its_parts(weighted, pow2):
    shape = {"rows": 140, "width": 128, "weight": weighted, "pow2": pow2}
    dy, codes, scales, weight, _ = make("swiglu_fp8_backward", Maker(5, torch.float32), **shape)
    *quantised, dweight = kernel("swiglu_fp8_backward")(dy, codes, scales, weight, pow2)
    h = kernel("dequantise_rows")(codes, scales, torch.float32)
    dh, dweight_alone, y = kernel("swiglu_backward")(dy, h, weight, True)
    expected = *kernel("quantise_both")(dh, pow2), *kernel("quantise_columns")(y, pow2)
    assert_same(tuple(quantised), expected, "swiglu_fp8_backward")
    assert (dweight is None) == (weight is None)
    if weighted:
        assert relative_norm(dweight, dweight_alone) <= 1e-6


def test_fused_kernels_take_no_rows():
    for name, shape in (
        ("rmsnorm_fp8", {"tokens": 0, "width": 128}),
        ("rmsnorm_fp8_columns", {"tokens": 0, "width": 128}),
        ("swiglu_fp8", {"rows": 0, "width": 128}),
        ("swiglu_fp8_backward", {"rows": 0, "width": 128}),
    ):
        same_bits(name, *make(name, Maker(0, torch.float32), **shape))


TILES = [triton8.Tile(64, 64, 4, 2), triton8.Tile(128, 128, 8, 3)]
EXACT_PRODUCTS = 1e-6  # of FP32 sums; the interpreter has no 14-bit accumulator


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("rows", "n", "k"), [(70, 144, 272), (1, 16, 128), (128, 576, 128), (3, 128, 16)])
def test_product_of_any_shape(rows, n, k, tile):
    *operands, _ = make("fp8_mm", Maker(6, torch.float32), rows=rows, n=n, k=k)
    out = torch.full((rows, n), NAN)
    triton8.launch_mm(out, *operands, None, tile)
    assert relative_norm(out, kernels.fp8_mm.__wrapped__(*operands, torch.float32)) <= EXACT_PRODUCTS


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("rows", "n", "k"), [(70, 144, 272), (1, 16, 32), (300, 208, 16)])
def test_weight_gradient_of_any_shape(rows, n, k, accumulate):
    grad, *operands, _ = make("fp8_wgrad_", Maker(7, torch.float32), rows=rows, n=n, k=k)
    grad = grad if accumulate else torch.full_like(grad, NAN)  # storing must not read
    expected = grad.clone()
    kernel("fp8_wgrad_")(grad, *operands, accumulate)
    kernels.fp8_wgrad_.__wrapped__(expected, *operands, accumulate)
    assert relative_norm(grad, expected) <= EXACT_PRODUCTS


ENDS = {
    "first empty": [0, 128, 384],
    "middle empty": [128, 128, 256],
    "last empty": [128, 384, 384],
    "all to one": [0, 384, 384],
    "all empty": [0, 0, 0],
    "full buffer": [128, 256, 512],
}


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_grouped_product_of_uneven_experts(ends):
    *operands, offsets, _ = make("grouped_fp8_mm", Maker(8, torch.float32), ends=ends, rows=512, n=144, k=208)
    expected = kernels.grouped_fp8_mm.__wrapped__(*operands, offsets, torch.float32)
    for tile in TILES:
        out = torch.full((512, 144), NAN)  # rows of nobody must be written too
        triton8.launch_mm(out, *operands, offsets, tile)
        assert relative_norm(out, expected) <= EXACT_PRODUCTS
        assert (out[ends[-1] :] == 0).all()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_grouped_weight_gradient_of_uneven_experts(ends, accumulate):
    grad, *operands, offsets, _ = make("grouped_fp8_wgrad_", Maker(9, torch.float32), ends=ends, rows=512, n=144, k=80)
    grad = grad if accumulate else torch.full_like(grad, NAN)
    expected = grad.clone()
    kernel("grouped_fp8_wgrad_")(grad, *operands, offsets, accumulate)
    kernels.grouped_fp8_wgrad_.__wrapped__(expected, *operands, offsets, accumulate)
    assert relative_norm(grad, expected) <= EXACT_PRODUCTS


def test_rows_of_nobody_full_of_nan_reach_no_gradient_and_no_other_row():
    m = Maker(10, torch.float32)
    x, dy = m.normal(256, 128), m.normal(256, 128)
    x[128:], dy[128:] = NAN, math.inf
    offsets = torch.tensor([128, 128], dtype=torch.int32)
    weight = kernels.quantise_blocks(m.normal(2, 128, 128))[:2]
    out = kernel("grouped_fp8_mm")(*kernels.quantise_rows(x), *weight, offsets, torch.float32)
    assert torch.isfinite(out).all() and (out[128:] == 0).all()
    grad = torch.zeros(2, 128, 128)
    columns = *kernels.quantise_columns(dy), *kernels.quantise_columns(x)
    kernel("grouped_fp8_wgrad_")(grad, *columns, offsets, True)
    assert torch.isfinite(grad).all() and (grad[1] == 0).all()


@pytest.mark.parametrize("poison", [NAN, math.inf])
def test_a_poisoned_element_poisons_exactly_its_row(poison):
    m = Maker(11, torch.float32)
    x = m.normal(70, 256)
    x[37, 200] = poison
    weight = kernels.quantise_blocks(m.normal(128, 256))[:2]
    out = kernel("fp8_mm")(*kernel("quantise_rows")(x), *weight, torch.float32)
    assert torch.isnan(out).all(dim=1).nonzero().flatten().tolist() == [37]
    assert torch.isfinite(out).all(dim=1).sum() == 69


def test_an_outlier_in_another_row_changes_no_bit():
    m = Maker(12, torch.float32)
    x = m.normal(70, 256)
    loud = x.clone()
    loud[5] = 1e4
    weight = kernels.quantise_blocks(m.normal(128, 256))[:2]
    quiet_out, loud_out = (
        kernel("fp8_mm")(*kernel("quantise_rows")(value), *weight, torch.float32) for value in (x, loud)
    )
    others = torch.arange(70) != 5
    assert torch.equal(quiet_out[others], loud_out[others])
