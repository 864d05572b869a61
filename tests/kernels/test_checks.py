"""Launchers refuse what their kernels cannot read, before anything is launched, and say what is needed."""

import inputs8
import pytest
import torch
from inputs import Maker, kernel, make

REFUSED = [
    ("rmsnorm", {"tokens": 4, "width": 8}, 1, lambda w: w[:5], ValueError, r"weight has shape \[5\], needed \[8\]"),
    ("rmsnorm", {"tokens": 4, "width": 8}, 0, lambda x: x.double(), TypeError, "x is torch.float64"),
    ("rmsnorm", {"tokens": 8, "width": 8}, 0, lambda x: x.t(), ValueError, "needed 1 in the last dimension"),
    ("rmsnorm", {"tokens": 4, "width": 8}, 3, lambda r: r.to("meta"), ValueError, "residual is on meta"),
    ("rmsnorm_backward", {"tokens": 4, "width": 8}, 3, lambda r: r[:3], ValueError, "rstd has shape"),
    ("rope_query_", {"tokens": 2, "heads": 2, "nope": 0, "rope": 4}, 0, lambda q: q[..., :2], ValueError, "room for 2"),
    ("assemble_key", {"tokens": 2, "heads": 2, "nope": 4, "rope": 4, "v": 4}, 4, lambda _: 9, ValueError, "nope is 9"),
    (
        "router_topk",
        {"tokens": 2, "experts": 8, "top_k": 2, "groups": 2, "kept": 1},
        2,
        lambda _: 5,
        ValueError,
        "top_k",
    ),
    (
        "router_topk",
        {"tokens": 2, "experts": 8, "top_k": 2, "groups": 2, "kept": 1},
        3,
        lambda _: 3,
        ValueError,
        "n_group",
    ),
    ("balance_loss", {"sequences": 2, "seq_len": 3, "experts": 8, "top_k": 2}, 2, lambda _: 4, ValueError, "seq_len 4"),
    ("routing_tables", {"tokens": 2, "experts": 8, "top_k": 2}, 0, lambda i: i.long(), TypeError, "needed torch.int32"),
    ("permute", {"tokens": 2, "width": 8, "top_k": 2}, 1, lambda t: t[::2], ValueError, "needed contiguous"),
    ("unpermute", {"tokens": 2, "width": 8, "top_k": 2}, 2, lambda b: b[:1], ValueError, "base has shape"),
    ("swiglu", {"rows": 2, "width": 8}, 0, lambda h: h[:, :7].clone(), ValueError, "even number"),
    ("swiglu_backward", {"rows": 2, "width": 8}, 2, lambda w: w.bfloat16(), TypeError, "weight is torch.bfloat16"),
    ("cross_entropy_", {"rows": 2, "vocabulary": 8}, 1, lambda y: y.int(), TypeError, "labels is torch.int32"),
    ("grouped_mm", {"rows": 5, "groups": 3, "n": 8, "k": 8}, 2, lambda o: o[:2], ValueError, "offsets has shape"),
    ("grouped_mm_t", {"rows": 5, "groups": 3, "n": 8, "k": 4}, 1, lambda w: w[:, :7], ValueError, "weight has shape"),
    ("grouped_wgrad_", {"rows": 5, "groups": 3, "n": 8, "k": 8}, 0, lambda g: g.bfloat16(), TypeError, "grad is"),
    ("dense_wgrad_", {"rows": 5, "n": 8, "k": 4}, 2, lambda x: x[:4], ValueError, "x has shape"),
    ("embedding_wgrad_", {"tokens": 5, "vocabulary": 8, "width": 4}, 2, lambda d: d[:4], ValueError, "dy has shape"),
    ("adamw_", {"n": 9}, 1, lambda g: g[:8], ValueError, "grad has shape"),
    ("adamw_", {"n": 9}, 10, lambda _: 0, ValueError, "counts from 1"),
    ("sum_of_squares", {"n": 9}, 0, lambda f: f.view(3, 3), ValueError, "flat has shape"),
]


@pytest.mark.parametrize(("name", "shape", "place", "damage", "error", "message"), REFUSED)
def test_a_wrong_argument_is_named(name, shape, place, damage, error, message):
    positional, keyword = make(name, Maker(0, torch.float32), **shape)
    damaged = [damage(value) if index == place else value for index, value in enumerate(positional)]
    with pytest.raises(error, match=message):
        kernel(name)(*damaged, **keyword)


REFUSED8 = [
    ("quantise_rows", {"rows": 4, "width": 40}, 0, lambda x: x, ValueError, "rows of 40, FP8 needs a multiple of 16"),
    ("quantise_both", {"rows": 4, "width": 16}, 0, lambda x: x.double(), TypeError, "x is torch.float64"),
    ("quantise_columns", {"rows": 16, "width": 16}, 0, lambda x: x.t(), ValueError, "needed 1 in the last dimension"),
    ("quantise_blocks", {"n": 24, "k": 16}, 0, lambda w: w, ValueError, "transposed, has rows of 24"),
    ("dequantise_rows", {"rows": 4, "width": 16}, 0, lambda c: c.float(), TypeError, "needed torch.float8_e4m3fn"),
    ("permute_fp8", {"rows": 4, "width": 16, "taken": 3}, 2, lambda t: t.long(), TypeError, "token_of_slot is"),
    ("permute_fp8", {"rows": 8, "width": 256, "taken": 3}, 1, lambda s: s.contiguous(), ValueError, "first dimension"),
    ("requantise", {"rows": 8, "width": 256}, 1, lambda s: s[:, :1], ValueError, r"needed \[8, 2\]"),
    ("requantise", {"rows": 6, "width": 256}, 1, lambda s: s.t().contiguous().t(), ValueError, "rounded up to 4"),
    ("fp8_mm", {"rows": 8, "n": 16, "k": 32}, 2, lambda w: w[:, :16].contiguous(), ValueError, r"needed \[any, 32\]"),
    ("fp8_mm", {"rows": 8, "n": 272, "k": 256}, 3, lambda s: s.contiguous(), ValueError, "rows at multiples of 4"),
    ("fp8_mm", {"rows": 8, "n": 16, "k": 32}, 3, lambda s: s.to("meta"), ValueError, "weight_scales is on meta"),
    ("fp8_mm", {"rows": 8, "n": 16, "k": 32}, 4, lambda _: torch.float16, TypeError, "dtype is torch.float16"),
    ("fp8_wgrad_", {"rows": 8, "n": 16, "k": 32}, 0, lambda g: g.bfloat16(), TypeError, "grad is torch.bfloat16"),
    ("fp8_wgrad_", {"rows": 8, "n": 16, "k": 32}, 1, lambda c: c[:, :64].contiguous(), ValueError, "x_codes has shape"),
    ("fp8_wgrad_", {"rows": 8, "n": 16, "k": 32}, 4, lambda s: s[:, :16], ValueError, "x_scales has shape"),
    ("grouped_fp8_mm", {"ends": [8], "rows": 8, "n": 16, "k": 32}, 0, lambda c: c, ValueError, "multiple of 128"),
    ("grouped_fp8_mm", {"ends": [128], "rows": 128, "n": 16, "k": 32}, 4, lambda o: o[:0], ValueError, "offsets has"),
    (
        "grouped_fp8_wgrad_",
        {"ends": [128], "rows": 8, "n": 16, "k": 32},
        5,
        lambda o: o.long(),
        TypeError,
        "offsets is",
    ),
    ("swiglu_fp8", {"rows": 2, "width": 64}, 0, lambda h: h, ValueError, "SwiGLU of width 64, FP8 needs a multiple"),
    ("swiglu_fp8_backward", {"rows": 4, "width": 128}, 1, lambda c: c[:, :128], ValueError, "h_codes has shape"),
    ("rmsnorm_fp8", {"tokens": 4, "width": 24}, 0, lambda x: x, ValueError, "rows of 24"),
    ("rmsnorm_fp8_columns", {"tokens": 4, "width": 32}, 2, lambda r: r[:3], ValueError, "rstd has shape"),
    ("e5m6_pack", {"rows": 2, "width": 128}, 0, lambda x: x[:, :64], ValueError, "packs multiples of 128"),
    ("e5m6_unpack", {"rows": 2, "width": 128}, 0, lambda w: w[:, :40].contiguous(), ValueError, "multiple of 48"),
]


@pytest.mark.parametrize(("name", "shape", "place", "damage", "error", "message"), REFUSED8)
def test_a_wrong_argument_of_an_fp8_kernel_is_named(name, shape, place, damage, error, message):
    maker = Maker(0, torch.float32)
    made = inputs8.make(name, maker, **shape)
    damaged = [damage(value) if index == place else value for index, value in enumerate(made)]
    with pytest.raises(error, match=message):
        kernel(name)(*damaged)


def test_routing_tables_need_at_least_one_row_a_filling():
    with pytest.raises(ValueError, match="align 0"):
        kernel("routing_tables")(torch.zeros(2, 1, dtype=torch.int32), 4, 0)
