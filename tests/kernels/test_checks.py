"""Launchers refuse what their kernels cannot read, before anything is launched, and say what is needed."""

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
