"""Every kernel at real shapes on a GPU: BF16 against the FP64 reference of the same inputs, FP32 at small shapes.

Also: bit-equal repetition, addresses beyond 2^31 elements, and no synchronisation with the host.
"""

import zlib

import pytest
import torch
from inputs import Maker, compare, kernel, make

import deepv3.kernels as kernels
from deepv3.kernels import gemm, testing

pytestmark = pytest.mark.gpu

GEMM = 3e-3  # BF16 output; FP32 output has its own below
WGRAD = 1e-3

CASES = [
    ("rmsnorm", {"tokens": 8192, "width": 2048}, 3e-3),  # the sum is rounded before its statistics are taken
    ("rmsnorm", {"tokens": 4096, "width": 7168}, 3e-3),
    ("rmsnorm", {"tokens": 4097, "width": 512, "residual": False}, None),
    ("rmsnorm", {"tokens": 33, "width": 1000}, 3e-3),
    ("rmsnorm_backward", {"tokens": 8192, "width": 2048}, 5e-3),
    ("rmsnorm_backward", {"tokens": 4096, "width": 7168}, 5e-3),
    ("rmsnorm_backward", {"tokens": 4097, "width": 512, "residual": False}, 5e-3),
    ("rmsnorm_backward", {"tokens": 33, "width": 1000}, 5e-3),
    ("rope_query_", {"tokens": 8192, "heads": 16, "nope": 128, "rope": 64}, None),
    ("rope_query_", {"tokens": 1024, "heads": 128, "nope": 128, "rope": 64, "inverse": True}, None),
    ("assemble_key", {"tokens": 8192, "heads": 16, "nope": 128, "rope": 64, "v": 128}, None),
    ("assemble_key", {"tokens": 1024, "heads": 128, "nope": 128, "rope": 64, "v": 128}, None),
    ("assemble_key_backward", {"tokens": 8192, "heads": 16, "nope": 128, "rope": 64, "v": 128}, 5e-3),
    ("assemble_key_backward", {"tokens": 1024, "heads": 128, "nope": 128, "rope": 64, "v": 128}, 5e-3),
    ("router_topk", {"tokens": 8192, "experts": 64, "top_k": 8, "groups": 8, "kept": 4}, None),
    ("router_topk", {"tokens": 4096, "experts": 256, "top_k": 8, "groups": 8, "kept": 4}, None),
    ("router_topk", {"tokens": 1000, "experts": 64, "top_k": 6, "groups": 1, "kept": 1}, None),
    ("router_topk_backward", {"tokens": 8192, "experts": 64, "top_k": 8}, None),
    ("router_topk_backward", {"tokens": 4096, "experts": 256, "top_k": 8}, None),
    ("balance_loss", {"sequences": 2, "seq_len": 4096, "experts": 64, "top_k": 8}, None),
    ("balance_loss", {"sequences": 3, "seq_len": 1001, "experts": 256, "top_k": 8}, None),
    ("balance_loss_backward", {"sequences": 2, "seq_len": 4096, "experts": 64, "top_k": 8}, 1e-5),
    ("balance_loss_backward", {"sequences": 3, "seq_len": 1001, "experts": 256, "top_k": 8}, 1e-5),
    ("routing_tables", {"tokens": 8192, "experts": 64, "top_k": 8}, None),
    ("routing_tables", {"tokens": 8192, "experts": 256, "top_k": 8}, None),
    ("routing_tables", {"tokens": 16001, "experts": 7, "top_k": 3}, None),
    ("permute", {"tokens": 8192, "width": 2048, "top_k": 8}, None),
    ("permute", {"tokens": 1000, "width": 7168, "top_k": 8}, None),
    ("unpermute", {"tokens": 8192, "width": 2048, "top_k": 8}, None),
    ("unpermute", {"tokens": 1000, "width": 7168, "top_k": 8, "base": False}, None),
    ("swiglu", {"rows": 65536, "width": 1024}, None),
    ("swiglu", {"rows": 4096, "width": 18432, "weight": False}, None),
    ("swiglu_backward", {"rows": 65536, "width": 1024}, 5e-3),
    ("swiglu_backward", {"rows": 4000, "width": 2048}, 5e-3),
    ("swiglu_backward", {"rows": 1000, "width": 1408}, 5e-3),
    ("swiglu_backward", {"rows": 1000, "width": 18432, "weight": False}, 5e-3),
    ("cross_entropy_", {"rows": 512, "vocabulary": 129280}, 5e-3),
    ("cross_entropy", {"rows": 512, "vocabulary": 129280}, None),
    ("cross_entropy_", {"rows": 64, "vocabulary": 50257}, 5e-3),
    ("grouped_mm", {"rows": 8192, "groups": 16, "n": 2048, "k": 1024}, GEMM),
    ("grouped_mm_t", {"rows": 8192, "groups": 16, "n": 2048, "k": 1024}, GEMM),
    ("dense_wgrad_", {"rows": 8192, "n": 2048, "k": 1024}, WGRAD),
    ("dense_wgrad_", {"rows": 8192, "n": 576, "k": 2048, "accumulate": True}, WGRAD),
    ("embedding_wgrad_", {"tokens": 8192, "vocabulary": 5000, "width": 2048}, None),
    ("embedding_wgrad_", {"tokens": 4096, "vocabulary": 129280, "width": 7168}, None),
    ("adamw_", {"n": 10_000_019}, None),
    ("adamw_", {"n": 4096, "param": None, "step": 1}, None),
    ("sum_of_squares", {"n": 100_000_003}, None),
]


def identify(case) -> str:
    name, shape, _ = case
    return name + "-" + "-".join(str(value) for value in shape.values())


@pytest.mark.parametrize("case", CASES, ids=identify)
def test_bf16_kernel_agrees_with_fp64_at_real_shapes(case, request):
    name, shape, tolerance = case
    compare(
        name, make(name, Maker(zlib.crc32(request.node.nodeid.encode()), torch.bfloat16, "cuda"), **shape), tolerance
    )


FP32 = [case for case in CASES if "grouped_mm" not in case[0] and "dense" not in case[0]]  # those are torch's own


@pytest.mark.parametrize("case", FP32, ids=identify)
def test_fp32_kernel_agrees_with_fp64(case):
    name, shape, _ = case
    sizes = ("tokens", "rows", "n")
    small = {key: min(value, 300) if key in sizes else value for key, value in shape.items()}
    if name == "adamw_":
        small["param"] = None
    # Exponentials and roots of the hardware are good to a few units in the last place.
    compare(name, make(name, Maker(1, torch.float32, "cuda"), **small), 5e-6)


OFFSETS = {
    "balanced": [512 * (g + 1) for g in range(16)],
    "random": None,
    "first, middle and last empty": [
        0,
        0,
        3000,
        3001,
        3001,
        3001,
        5000,
        5001,
        5555,
        6000,
        6001,
        6002,
        8000,
        8192,
        8192,
        8192,
    ],
    "all to one": [0] * 5 + [8192] * 11,
}


@pytest.mark.parametrize("tile", [*gemm.TILES, gemm.UNALIGNED], ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("ends", OFFSETS.values(), ids=OFFSETS.keys())
def test_grouped_weight_gradient_of_every_tile(ends, accumulate, tile):
    maker = Maker(3, torch.bfloat16, "cuda")
    dy, x = maker.normal(8192, 1408), maker.normal(8192, 1000)  # off the tiles' edges
    offsets = maker.offsets(8192, 16) if ends is None else torch.tensor(ends, dtype=torch.int32, device="cuda")
    grad = maker.fp32(16, 1408, 1000) if accumulate else torch.full((16, 1408, 1000), float("nan"), device="cuda")
    expected = grad.double()
    gemm.launch_grouped_wgrad(grad, dy, x, offsets, accumulate, tile)
    kernels.grouped_wgrad_.__wrapped__(expected, dy.double(), x.double(), offsets, accumulate)
    assert testing.relative_norm(grad, expected) <= WGRAD
    assert testing.worst_block(grad, expected) <= 10 * WGRAD


@pytest.mark.parametrize(("n", "k"), [(100, 52), (136, 72), (8, 8)])
def test_grouped_weight_gradient_of_odd_widths(n, k):
    shape = {"rows": 777, "groups": 5, "n": n, "k": k, "accumulate": True}
    compare("grouped_wgrad_", make("grouped_wgrad_", Maker(4, torch.bfloat16, "cuda"), **shape), WGRAD)


@pytest.mark.parametrize("accumulate", [False, True])
def test_grouped_weight_gradient_in_fp32(accumulate):
    shape = {"rows": 777, "groups": 5, "n": 100, "k": 52, "accumulate": accumulate}
    compare("grouped_wgrad_", make("grouped_wgrad_", Maker(4, torch.float32, "cuda"), **shape), 5e-6)


def test_descriptors_do_not_read_another_experts_rows():
    dy, x = torch.ones(64, 64, device="cuda").bfloat16(), torch.ones(64, 64, device="cuda").bfloat16()
    dy[33:], x[33:] = float("nan"), float("inf")
    grad = torch.zeros(2, 64, 64, device="cuda")
    kernels.grouped_wgrad_(grad, dy, x, torch.tensor([33, 64], dtype=torch.int32, device="cuda"), False)
    assert (grad[0] == 33).all() and torch.isnan(grad[1]).all()


REPEATED = {
    "rmsnorm_backward": {"tokens": 8192, "width": 2048},
    "assemble_key_backward": {"tokens": 2048, "heads": 16, "nope": 128, "rope": 64, "v": 128},
    "balance_loss": {"sequences": 2, "seq_len": 4096, "experts": 64, "top_k": 8},
    "routing_tables": {"tokens": 8192, "experts": 256, "top_k": 8},
    "unpermute": {"tokens": 8192, "width": 2048, "top_k": 8},
    "swiglu_backward": {"rows": 8192, "width": 1024},
    "cross_entropy_": {"rows": 256, "vocabulary": 129280},
    "grouped_wgrad_": {"rows": 8192, "groups": 16, "n": 512, "k": 512, "accumulate": True},
    "embedding_wgrad_": {"tokens": 8192, "vocabulary": 5000, "width": 2048},
    "sum_of_squares": {"n": 10_000_000},
}


@pytest.mark.parametrize("name", REPEATED)
def test_fifty_runs_give_the_same_bits(name):
    positional, keyword = make(name, Maker(5, torch.bfloat16, "cuda"), **REPEATED[name])

    def run() -> list[torch.Tensor]:
        copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in positional]
        result = kernel(name)(*copies, **keyword)
        values = [*(result if isinstance(result, tuple) else (result,)), *copies]
        return [value for value in values if isinstance(value, torch.Tensor)]

    first = run()
    for _ in range(49):
        assert all(torch.equal(a, b) for a, b in zip(run(), first))


ALL = {name: shape for name, shape, _ in reversed(CASES)} | {
    "grouped_wgrad_": {"rows": 8192, "groups": 16, "n": 512, "k": 512, "accumulate": True}
}


@pytest.mark.parametrize("name", ALL)
def test_no_kernel_waits_for_the_device(name):
    positional, keyword = make(name, Maker(6, torch.bfloat16, "cuda"), **ALL[name])
    kernel(name)(*positional, **keyword)  # compiles, which may synchronise
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel(name)(*positional, **keyword)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_rows_beyond_two_to_the_31_elements_are_addressed():
    rows, width = 300_032, 7168  # 2.15e9 elements, 4.3 GB
    x = torch.randn(16, width, device="cuda").bfloat16()
    tokens = (torch.arange(rows, device="cuda") % 16).int()
    spread = kernels.permute(x, tokens)
    assert torch.equal(spread[-16:], x) and torch.equal(spread[:16], x)
    slots = torch.stack((torch.arange(16), torch.arange(rows - 16, rows)), dim=1).int().cuda()
    assert torch.equal(kernels.unpermute(spread, slots), (2 * x.float()).bfloat16())
    y, _, _ = kernels.rmsnorm(spread, torch.ones(width, device="cuda").bfloat16(), 1e-6)
    assert torch.equal(y[-16:], y[:16])
    del y
    act = kernels.swiglu(spread)
    assert torch.equal(act[-16:], act[:16])


def test_logits_beyond_two_to_the_31_elements_are_addressed():
    logits = torch.zeros(16_640, 129_280, device="cuda", dtype=torch.bfloat16)
    logits[-1, 5] = 4.0
    labels = torch.full((16_640,), 5, device="cuda")
    loss = kernels.cross_entropy_(logits, labels, 1.0)
    expected = torch.zeros(2, 129_280, device="cuda")
    expected[1, 5] = 4.0
    assert torch.allclose(loss[[0, -1]], kernels.cross_entropy.__wrapped__(expected, labels[:2]), rtol=1e-5)
    assert logits[-1, 5] < 0 < logits[-1, 6]


@pytest.mark.parametrize("scale", [float("inf"), float("nan")])
def test_adamw_skips_on_the_device(scale):
    positional, _ = make("adamw_", Maker(7, torch.bfloat16, "cuda"), n=1_000_001)
    before = [tensor.clone() for tensor in positional[:5]]
    kernels.adamw_(*positional[:-1], torch.tensor(scale, device="cuda"))
    assert all(torch.equal(a, b) for a, b in zip(positional, before))


def test_adamw_counts_steps_on_the_device():
    for step in (1, 7, 100_000):
        positional, _ = make("adamw_", Maker(8, torch.bfloat16, "cuda"), n=100_003)
        host = [value.clone() if isinstance(value, torch.Tensor) else value for value in positional]
        kernels.adamw_(*host[:10], step, host[11])
        kernels.adamw_(*positional[:10], torch.tensor(step, device="cuda"), positional[11])
        assert torch.allclose(host[0], positional[0], rtol=1e-5, atol=1e-7)


def test_bf16_moments_are_rounded_to_nearest_even():
    positional, _ = make("adamw_", Maker(9, torch.bfloat16, "cuda"), n=1_000_000)
    wide = [value.clone() if isinstance(value, torch.Tensor) else value for value in positional]
    wide[2], wide[3] = wide[2].float(), wide[3].float()
    kernels.adamw_(*positional)
    kernels.adamw_(*wide)
    assert torch.equal(positional[2], wide[2].bfloat16()) and torch.equal(positional[3], wide[3].bfloat16())
    assert torch.equal(positional[4], positional[0].bfloat16())


def test_backward_thread_can_launch_descriptor_kernels():
    """Autograd runs backward on its own thread, where Triton's allocator is not set unless each launch sets it."""
    maker = Maker(10, torch.bfloat16, "cuda")
    dy, x, grad = maker.normal(256, 256), maker.normal(256, 256), torch.zeros(2, 256, 256, device="cuda")
    offsets = torch.tensor([100, 256], dtype=torch.int32, device="cuda")

    class Launch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            kernels.grouped_wgrad_(grad, dy, x, offsets, False)
            return gradient

    Launch.apply(torch.ones(1, device="cuda", requires_grad=True)).sum().backward()
    expected = torch.stack((dy[:100].float().t() @ x[:100].float(), dy[100:].float().t() @ x[100:].float()))
    assert testing.relative_norm(grad, expected) <= WGRAD


@pytest.mark.parametrize("experts", [64, 256])
def test_router_and_tables_take_less_than_15_microseconds_of_the_gpu_for_4096_tokens(experts):
    shape = {"tokens": 4096, "experts": experts, "top_k": 8, "groups": 8, "kept": 4}
    (logits, bias, *rest), _ = make("router_topk", Maker(11, torch.float32, "cuda"), **shape)

    def both() -> None:
        indices, _ = kernels.router_topk(logits, bias, *rest)
        kernels.routing_tables(indices, experts)

    assert testing.time_graph(both).median_us < 15
