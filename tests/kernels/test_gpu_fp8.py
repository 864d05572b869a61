"""The FP8 kernels on a GPU: bits of the references, all implementations of a GEMM against FP64 and each other, races.

The Gluon kernels are tried in a process of their own first: a wrong barrier hangs, it does not fail.
"""

import pathlib
import subprocess
import sys

import pytest
import torch
from inputs import Maker, kernel
from inputs8 import assert_same, bits, hard_values, make, tensors

import deepv3.kernels as kernels
from deepv3.kernels import backends, gemm8, testing
from deepv3.kernels.reference.quantise import dequantise_blocks, dequantise_columns, dequantise_rows

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def memory_is_given_back():
    """Several processes share the GPU: what torch keeps for the next test, another process lacks."""
    yield
    torch.cuda.empty_cache()


def same_as_on_cpu(name: str, *args) -> None:
    """The kernel on the GPU gives the bits of the reference on the CPU."""
    here = [value.cpu() if isinstance(value, torch.Tensor) else value for value in args]
    ours = tuple(value.cpu() for value in tensors(kernel(name)(*args)))
    theirs = tuple(tensors(getattr(kernels, name).__wrapped__(*here)))
    for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        wrong = int((bits(a.contiguous()) != bits(b.contiguous())).sum())
        assert wrong == 0, f"{name}: {wrong} of {a.numel()} elements of result {place} differ"


EXACT = [
    ("quantise_rows", {"rows": 4096, "width": 7168}),
    ("quantise_rows", {"rows": 4097, "width": 576, "pow2": True}),
    ("quantise_columns", {"rows": 4096, "width": 2048}),
    ("quantise_columns", {"rows": 1000, "width": 2112, "pow2": True}),
    ("quantise_both", {"rows": 4096, "width": 7168}),
    ("quantise_both", {"rows": 777, "width": 1408, "pow2": True}),
    ("quantise_blocks", {"n": 2112, "k": 7168}),
    ("quantise_blocks", {"n": 576, "k": 1408, "groups": 5, "pow2": True}),
    ("dequantise_rows", {"rows": 1001, "width": 2112}),
    ("permute_fp8", {"rows": 1000, "width": 7168, "taken": 8192}),
    ("requantise", {"rows": 4096, "width": 2048}),
    ("requantise", {"rows": 1000, "width": 7168, "taken": 8000}),
    ("e5m6_pack", {"rows": 1001, "width": 16384}),
    ("e5m6_unpack", {"rows": 1001, "width": 2048}),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("name", "shape"), EXACT)
def test_quantisers_give_the_bits_of_their_references(name, shape, dtype):
    same_as_on_cpu(name, *make(name, Maker(1, dtype, "cuda"), **shape))


@pytest.mark.parametrize("pow2", [False, True])
def test_hard_values_give_the_bits_of_the_references(pow2):
    for x in hard_values("cuda").values():
        for values in (x, x.bfloat16()):
            same_as_on_cpu("quantise_both", values, pow2)
            same_as_on_cpu("quantise_blocks", values[:128].contiguous(), pow2)
            same_as_on_cpu("e5m6_pack", values[:, :256])


@pytest.mark.parametrize("factor", [1.0, 3.0, 0.1, 2.0**-60])
def test_the_hardware_rounds_every_bf16_number_as_the_integers_do(factor):
    every = (torch.arange(65536, dtype=torch.int32, device="cuda") << 16).view(torch.float32) * factor
    same_as_on_cpu("quantise_rows", every.view(512, 128))
    same_as_on_cpu("e5m6_pack", every.view(512, 128))
    values = every.where(every.isfinite(), 0.0).clamp(-448, 448)
    values[::128] = 448.0  # scale 1: the cast itself
    same_as_on_cpu("quantise_rows", values.view(512, 128))


@pytest.mark.parametrize("align", [1, 128])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(8192, 256, 8), (8192, 64, 6), (16001, 7, 3), (1, 256, 8)])
def test_routing_tables_equal_the_reference(tokens, experts, top_k, align):
    m = Maker(tokens, torch.float32, "cuda")
    indices = m.choices(tokens, experts, top_k)
    for chosen in (indices, indices.where(m.fp32(tokens, top_k) > 0, -1)):
        ours = kernel("routing_tables")(chosen, experts, align)
        theirs = kernels.routing_tables.__wrapped__(chosen.cpu(), experts, align)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("tokens", "width"), [(4096, 7168), (8192, 2048), (333, 1408)])
@pytest.mark.parametrize("residual", [False, True])
def test_norm_with_quantisation_equals_norm_then_quantisation(tokens, width, residual):
    shape = {"tokens": tokens, "width": width, "residual": residual, "output": True}
    x, weight, eps, added, pow2, _ = make("rmsnorm_fp8", Maker(2, torch.bfloat16, "cuda"), **shape)
    y, rstd, summed = kernels.rmsnorm(x, weight, eps, added)
    expected = *kernels.quantise_rows(y, pow2), rstd, summed, y
    assert_same(kernels.rmsnorm_fp8(x, weight, eps, added, pow2, True), expected, "rmsnorm_fp8")
    again = kernels.rmsnorm_fp8_columns(summed, weight, rstd, pow2)
    assert_same(again, kernels.quantise_columns(y, pow2), "rmsnorm_fp8_columns")


@pytest.mark.parametrize(("rows", "width"), [(16384, 2048), (5000, 1408), (1, 128)])
@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_with_quantisation_equals_its_parts(rows, width, weighted):
    m = Maker(3, torch.bfloat16, "cuda")
    h, weight, _, _ = make("swiglu_fp8", m, rows=rows, width=width, weight=weighted)
    codes, scales, kept, kept_scales = kernels.swiglu_fp8(h, weight)
    assert_same((codes, scales), kernels.quantise_rows(kernels.swiglu(h, weight)), "swiglu_fp8")
    assert_same((kept, kept_scales), kernels.quantise_rows(h, True), "the kept input")

    dy = m.normal(rows, width)
    *quantised, dweight = kernels.swiglu_fp8_backward(dy, kept, kept_scales, weight)
    rows_of_dh, columns = tuple(quantised[:2]), tuple(quantised[2:])
    wide = kernels.dequantise_rows(kept, kept_scales, torch.float32)
    dh, dweight_alone, y = kernels.swiglu_backward(dy, wide, weight, True)
    assert_same(rows_of_dh, kernels.quantise_rows(dh.bfloat16()), "dh in rows")
    expected = *kernels.quantise_columns(dh.bfloat16()), *kernels.quantise_columns(y.bfloat16())
    assert_same(columns, expected, "dh and output in columns")
    if weighted:
        assert testing.relative_norm(dweight, dweight_alone) <= 1e-5


@pytest.fixture(scope="session")
def gluon_returns():
    """Gluon kernels finish: tried with few and with many tiles in a process that can be ended."""
    script = pathlib.Path(__file__).with_name("gluon_trial.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


NAMES = [(op, name) for op, table in gemm8.BACKENDS.items() for name in table] if torch.cuda.is_available() else []
DENSE = [(4096, 2112, 7168), (1024, 768, 24576), (2048, 7168, 2048), (128, 128, 128), (64, 576, 512)]
RAGGED = [(1000, 576, 2112), (1, 16, 128), (130, 2112, 144), (4097, 1408, 2048)]
ENDS = {
    "balanced": [1024, 2048, 3072, 4096],
    "first, middle empty": [0, 1280, 1280, 3968],
    "last empty, room left": [128, 256, 3000 // 128 * 128, 3000 // 128 * 128],
    "all to one": [0, 4096, 4096, 4096],
    "all empty": [0, 0, 0, 0],
}


@pytest.mark.parametrize(("op", "name"), NAMES)
def test_every_implementation_agrees_with_fp64(op, name, request):
    if name.startswith("gluon"):
        request.getfixturevalue("gluon_returns")
    backends.force(op, name)
    try:
        m = Maker(4, torch.bfloat16, "cuda")
        if op.startswith("grouped"):
            for ends in ENDS.values():
                check_grouped(op, m, ends, 2048 if name == "deepgemm" else 2112)  # it takes whole blocks only
        else:
            shapes = DENSE if name in ("cublas", "deepgemm") else DENSE + RAGGED
            for rows, n, k in shapes:
                check_dense(op, m, rows, n, k)
    finally:
        backends.force(op, None)


def check_dense(op: str, m: Maker, rows: int, n: int, k: int) -> None:
    if op == "fp8_mm":
        codes, scales, weight, weight_scales, _ = make(op, m, rows=rows, n=n, k=k)
        out = kernels.fp8_mm(codes, scales, weight, weight_scales)
        exact = dequantise_rows(codes, scales, torch.float64) @ dequantise_blocks(weight, weight_scales).double().t()
        assert_near(out, exact, f"{rows} x {n} x {k}")
        return
    for accumulate in (False, True):
        grad, *operands, _ = make(op, m, rows=rows, n=n, k=k)
        exact = dequantise_columns(*operands[:2]).double() @ dequantise_columns(*operands[2:]).double().t()
        exact += grad.double() if accumulate else 0.0
        grad = grad if accumulate else torch.full_like(grad, float("nan"))
        kernels.fp8_wgrad_(grad, *operands, accumulate)
        assert_near(grad, exact, f"{rows} x {n} x {k}, add {accumulate}")


def check_grouped(op: str, m: Maker, ends: list[int], k: int) -> None:
    shape = {"ends": ends, "rows": 4096, "n": 1408, "k": k}
    starts = [0, *ends]
    if op == "grouped_fp8_mm":
        codes, scales, weight, weight_scales, offsets, _ = make(op, m, **shape)
        out = kernels.grouped_fp8_mm(codes, scales, weight, weight_scales, offsets)
        x, w = dequantise_rows(codes, scales, torch.float64), dequantise_blocks(weight, weight_scales).double()
        exact = torch.cat([x[a:b] @ w[g].t() for g, (a, b) in enumerate(zip(starts, ends))])
        assert_near(out[: ends[-1]], exact, str(ends))
        assert (out[ends[-1] :] == 0).all()
        return
    for accumulate in (False, True):
        grad, *operands, offsets, _ = make(op, m, **shape)
        dy, x = dequantise_columns(*operands[:2]).double(), dequantise_columns(*operands[2:]).double()
        exact = torch.stack([dy[:, a:b] @ x[:, a:b].t() for a, b in zip(starts, ends)])
        exact += grad.double() if accumulate else 0.0
        grad = grad if accumulate else torch.full_like(grad, float("nan"))
        kernels.grouped_fp8_wgrad_(grad, *operands, offsets, accumulate)
        assert_near(grad, exact, f"{ends}, add {accumulate}")


def assert_near(actual: torch.Tensor, exact: torch.Tensor, where: str) -> None:
    allowed = testing.product_tolerance(exact.numel(), actual.dtype)
    error, worst = testing.relative_norm(actual, exact), testing.worst_block(actual, exact)
    assert error <= allowed, f"{where}: off by {error:.2e}"
    assert worst <= 50 * allowed, f"{where}: a block is off by {worst:.2e}"


@pytest.mark.parametrize(("op", "name"), NAMES)
def test_fifty_runs_of_every_implementation_give_the_same_bits(op, name, request):
    if name.startswith("gluon"):
        request.getfixturevalue("gluon_returns")
    shape = {"rows": 4096, "n": 1408, "k": 2048} | ({"ends": [0, 1280, 1280, 3968]} if op.startswith("grouped") else {})
    args = make(op, Maker(5, torch.bfloat16, "cuda"), **shape)
    backends.force(op, name)
    try:

        def run() -> torch.Tensor:
            first = args[0].clone()
            result = kernel(op)(first, *args[1:-1], torch.bfloat16 if op.endswith("mm") else True)
            return first if result is None else result

        expected = run()
        assert all(torch.equal(bits(run()), bits(expected)) for _ in range(49))
    finally:
        backends.force(op, None)


REPEATED = {
    "quantise_both": {"rows": 4096, "width": 2048},
    "quantise_blocks": {"n": 2048, "k": 2048},
    "requantise": {"rows": 4096, "width": 2048, "taken": 8192},
    "permute_fp8": {"rows": 4096, "width": 2048, "taken": 8192},
    "swiglu_fp8": {"rows": 8192, "width": 1024},
    "swiglu_fp8_backward": {"rows": 8192, "width": 1024},
    "rmsnorm_fp8": {"tokens": 8192, "width": 2048},
    "e5m6_pack": {"rows": 4096, "width": 2048},
}


@pytest.mark.parametrize("name", REPEATED)
def test_fifty_runs_give_the_same_bits(name):
    args = make(name, Maker(6, torch.bfloat16, "cuda"), **REPEATED[name])
    first = tensors(kernel(name)(*args))
    for _ in range(49):
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(tensors(kernel(name)(*args)), first))


GEMMS = {
    "fp8_mm": {"rows": 512, "n": 384, "k": 256},
    "fp8_wgrad_": {"rows": 512, "n": 384, "k": 256},
    "grouped_fp8_mm": {"ends": [128, 384], "rows": 512, "n": 384, "k": 256},
    "grouped_fp8_wgrad_": {"ends": [128, 384], "rows": 512, "n": 384, "k": 256},
}


@pytest.mark.parametrize("name", [*REPEATED, *GEMMS])
def test_no_kernel_waits_for_the_device_once_its_shape_is_known(name):
    args = make(name, Maker(7, torch.bfloat16, "cuda"), **(REPEATED | GEMMS)[name])
    kernel(name)(*args)  # compiles and chooses
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel(name)(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_choice_is_measured_kept_and_shown(tmp_path):
    backends.use_file(tmp_path / "kernels.json")
    kernels.fp8_mm(*make("fp8_mm", Maker(8, torch.bfloat16, "cuda"), rows=256, n=512, k=384))
    (entry,) = backends.choices().values()
    assert entry["best"] in entry["us"] and len(entry["us"]) >= 2 and (tmp_path / "kernels.json").exists()


def test_experts_run_inside_a_cuda_graph():
    """Tables, gather, both products and the activation with no host in between: replayed, they follow new inputs."""
    m = Maker(9, torch.bfloat16, "cuda")
    indices, x = m.choices(512, 8, 2), m.normal(512, 256)
    up, down = kernels.quantise_blocks(m.normal(8, 512, 256)), kernels.quantise_blocks(m.normal(8, 256, 256))

    def layer() -> torch.Tensor:
        slots, tokens, offsets, _ = kernels.routing_tables(indices, 8, 128)
        rows = kernels.permute_fp8(*kernels.quantise_rows(x, True), tokens)
        act = kernels.swiglu_fp8(kernels.grouped_fp8_mm(*rows, *up[:2], offsets))
        return kernels.unpermute(kernels.grouped_fp8_mm(*act[:2], *down[:2], offsets), slots)

    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer()
    indices.copy_(m.choices(512, 8, 2))
    x.copy_(m.normal(512, 256))
    graph.replay()
    assert torch.equal(out, layer())


def test_rows_beyond_two_to_the_31_elements_are_addressed():
    rows, width = 300_032, 7168
    x = torch.randn(128, width, device="cuda").bfloat16()
    tokens = (torch.arange(rows, device="cuda") % 128).int()
    codes, scales = kernels.quantise_rows(x, True)
    spread, spread_scales = kernels.permute_fp8(codes, scales, tokens)
    assert torch.equal(bits(spread[-128:]), bits(codes)) and torch.equal(spread_scales[-128:], scales)
    columns, column_scales = kernels.requantise(spread, spread_scales)
    first, first_scales = kernels.requantise(codes, scales)
    assert torch.equal(bits(columns[:, -128:].contiguous()), bits(first)) and torch.equal(
        column_scales[-1:], first_scales
    )
    del columns
    out = kernels.fp8_mm(spread, spread_scales, *kernels.quantise_blocks(torch.randn(128, width, device="cuda"))[:2])
    assert torch.equal(out[-128:], out[:128])
