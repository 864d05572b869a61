"""Every Triton kernel against its FP64 reference: FP32 operands, small shapes on and off the tiles' edges."""

import zlib

import pytest
import torch
from inputs import Maker, compare, make

CASES = {
    "rmsnorm": [
        {"tokens": 5, "width": 256},
        {"tokens": 3, "width": 576},
        {"tokens": 1, "width": 8, "residual": False},
        {"tokens": 2, "width": 2049},
    ],
    "rmsnorm_backward": [
        {"tokens": 37, "width": 256},
        {"tokens": 19, "width": 576, "residual": False},
        {"tokens": 1, "width": 8},
        {"tokens": 21, "width": 2100},
    ],
    "rope_query_": [
        {"tokens": 5, "heads": 3, "nope": 8, "rope": 8},
        {"tokens": 5, "heads": 3, "nope": 8, "rope": 8, "inverse": True},
        {"tokens": 33, "heads": 4, "nope": 16, "rope": 12},
        {"tokens": 1, "heads": 1, "nope": 0, "rope": 2},
    ],
    "assemble_key": [
        {"tokens": 5, "heads": 3, "nope": 8, "rope": 8, "v": 8},
        {"tokens": 2, "heads": 33, "nope": 12, "rope": 6, "v": 20},
        {"tokens": 1, "heads": 1, "nope": 1, "rope": 2, "v": 1},
    ],
    "assemble_key_backward": [
        {"tokens": 5, "heads": 3, "nope": 8, "rope": 8, "v": 8},
        {"tokens": 2, "heads": 33, "nope": 12, "rope": 6, "v": 20},
        {"tokens": 1, "heads": 1, "nope": 1, "rope": 2, "v": 1},
    ],
    "router_topk": [
        {"tokens": 9, "experts": 64, "top_k": 8, "groups": 8, "kept": 4},
        {"tokens": 3, "experts": 256, "top_k": 8, "groups": 8, "kept": 4},
        {"tokens": 5, "experts": 16, "top_k": 3, "groups": 1, "kept": 1},
        {"tokens": 5, "experts": 24, "top_k": 5, "groups": 6, "kept": 2},
        {"tokens": 1, "experts": 8, "top_k": 3, "groups": 8, "kept": 3},
        {"tokens": 4, "experts": 16, "top_k": 16, "groups": 4, "kept": 4},
    ],
    "router_topk_backward": [
        {"tokens": 9, "experts": 64, "top_k": 8},
        {"tokens": 5, "experts": 24, "top_k": 1},
        {"tokens": 17, "experts": 256, "top_k": 6},
    ],
    "balance_loss": [
        {"sequences": 2, "seq_len": 24, "experts": 16, "top_k": 4},
        {"sequences": 3, "seq_len": 5, "experts": 20, "top_k": 3},
        {"sequences": 1, "seq_len": 1, "experts": 256, "top_k": 8},
    ],
    "balance_loss_backward": [
        {"sequences": 2, "seq_len": 24, "experts": 16, "top_k": 4},
        {"sequences": 3, "seq_len": 5, "experts": 20, "top_k": 3},
        {"sequences": 1, "seq_len": 1, "experts": 256, "top_k": 8},
    ],
    "routing_tables": [
        {"tokens": 200, "experts": 16, "top_k": 6},
        {"tokens": 64, "experts": 256, "top_k": 8},
        {"tokens": 1, "experts": 3, "top_k": 2},
        {"tokens": 600, "experts": 5, "top_k": 1},
    ],
    "permute": [
        {"tokens": 13, "width": 256, "top_k": 3},
        {"tokens": 5, "width": 300, "top_k": 2},
        {"tokens": 1, "width": 1, "top_k": 1},
    ],
    "unpermute": [
        {"tokens": 13, "width": 256, "top_k": 3},
        {"tokens": 5, "width": 1300, "top_k": 8, "base": False},
        {"tokens": 1, "width": 1, "top_k": 1},
    ],
    "swiglu": [
        {"rows": 9, "width": 256},
        {"rows": 5, "width": 176, "weight": False},
        {"rows": 1, "width": 1408},
    ],
    "swiglu_backward": [
        {"rows": 9, "width": 256},
        {"rows": 5, "width": 176, "weight": False},
        {"rows": 3, "width": 2100},
        {"rows": 3, "width": 64, "output": False},
    ],
    "cross_entropy": [{"rows": 5, "vocabulary": 1000}, {"rows": 1, "vocabulary": 1}],
    "cross_entropy_": [{"rows": 5, "vocabulary": 1000}, {"rows": 2, "vocabulary": 16500}, {"rows": 4, "vocabulary": 3}],
    "grouped_wgrad_": [
        {"rows": 150, "groups": 5, "n": 64, "k": 64},
        {"rows": 150, "groups": 5, "n": 100, "k": 72, "accumulate": True},
        {"rows": 1, "groups": 3, "n": 8, "k": 8},
        {"rows": 70, "groups": 1, "n": 576, "k": 16, "accumulate": True},
    ],
    "embedding_wgrad_": [
        {"tokens": 150, "vocabulary": 40, "width": 96},
        {"tokens": 300, "vocabulary": 1, "width": 130},
        {"tokens": 1, "vocabulary": 7, "width": 5},
    ],
    "adamw_": [
        {"n": 2500, "param": torch.float32},
        {"n": 1024, "param": None, "step": 1},
        {"n": 7, "param": None, "step": torch.tensor(1)},
        {"n": 100, "param": torch.float32, "step": torch.tensor(2000.0)},
    ],
    "sum_of_squares": [{"n": 50_000}, {"n": 1}, {"n": 4096}],
}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(name, shape, id=f"{name}-{index}")
        for name, shapes in CASES.items()
        for index, shape in enumerate(shapes)
    ],
)
def test_kernel_agrees_with_reference(name, shape, request):
    seed = zlib.crc32(request.node.nodeid.encode())
    compare(name, make(name, Maker(seed, torch.float32), **shape))
