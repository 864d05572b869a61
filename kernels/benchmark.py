"""Every kernel at the shapes of mini and of V3 (671B), timed beside torch in one run on the current CUDA device.

`rows()` gives dictionaries, `table()` markdown, `tile_table()` the candidates for the grouped weight gradient,
`report()` all of it after the FP8 kernels' checks and tables (`benchmark8`): `python -m deepv3.kernels.benchmark`. A
row's floor is max(bytes / copy bandwidth, FLOP / BF16 rate), both measured first, in the same run: bytes are those that
must move once, the rate is cuBLAS on 8192^3. Inputs are random, L2 is cold.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import deepv3.kernels as kernels
from deepv3.kernels import benchmark8
from deepv3.kernels.shapes import MINI, V3, Shape, bf16, fp32, machine_rates
from deepv3.kernels.testing import time_gpu

VOCABULARY, LOSS_ROWS, PARAMETERS, TOP_K = 129_280, 2048, 1 << 27, 8


class Work(NamedTuple):
    """One row: our call, torch's, and what has to move or be multiplied."""

    name: str
    shape: str
    ours: Callable[[], Any]
    peer: Callable[[], Any] | None
    peer_name: str
    bytes: float
    flops: float = 0.0


def _size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _compiled(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """The reference under torch.compile."""
    compiled = torch.compile(function.__wrapped__, dynamic=False)  # type: ignore[attr-defined]
    return lambda: compiled(*args)


def _streaming(name: str, shape: str, moved: int, *args: Any) -> Work:
    """A memory-bound kernel beside its compiled reference."""
    function = getattr(kernels, name)
    return Work(name, shape, lambda: function(*args), _compiled(function, *args), "torch.compile", moved)


def _norms(s: Shape) -> Iterator[Work]:
    x, r, weight, where = bf16(s.tokens, s.hidden), bf16(s.tokens, s.hidden), bf16(s.hidden), f"{s.tokens} x {s.hidden}"
    rstd = torch.rsqrt(x.float().square().mean(-1) + 1e-6)
    yield _streaming("rmsnorm", where, 4 * _size(x), x, weight, 1e-6, r)
    yield _streaming("rmsnorm_backward", where, 4 * _size(x), bf16(s.tokens, s.hidden), x, weight, rstd, r)


def _attention(s: Shape) -> Iterator[Work]:
    angle, where = fp32(s.tokens, 32), f"{s.tokens} x {s.heads} heads"
    cos, sin = angle.cos(), angle.sin()
    q, kv, k_rope = bf16(s.tokens, s.heads, 192), bf16(s.tokens, s.heads, 256), bf16(s.tokens, 576)[:, 512:]
    dk, dv = bf16(s.tokens, s.heads, 192), bf16(s.tokens, s.heads, 128)
    yield _streaming("rope_query_", where, 2 * _size(q) // 3, q, cos, sin)
    yield _streaming("assemble_key", where, _size(kv) // 2 + _size(q), kv, k_rope, cos, sin)
    yield _streaming("assemble_key_backward", where, _size(dk, dv, kv), dk, dv, cos, sin)


def _routing(s: Shape) -> Iterator[Work]:
    logits, bias, where = fp32(s.tokens, s.experts), torch.zeros(s.experts, device="cuda"), f"{s.tokens} x {s.experts}"
    indices, weights = kernels.router_topk(logits, bias, TOP_K, 8, 4, 2.5)

    def eager(name: str, moved: int, *args: Any) -> Work:
        function = getattr(kernels, name)
        return Work(name, where, lambda: function(*args), lambda: function.__wrapped__(*args), "eager", moved)

    yield eager("router_topk", _size(logits, indices, weights), logits, bias, TOP_K, 8, 4, 2.5)
    yield eager("router_topk_backward", 2 * _size(logits), weights, logits, indices, 2.5)
    yield eager("balance_loss", _size(logits), logits, TOP_K, s.tokens // 2)
    yield eager("balance_loss_backward", 3 * _size(logits), torch.ones(2, device="cuda"), logits, TOP_K, s.tokens // 2)
    yield eager("routing_tables", 3 * _size(indices), indices, s.experts)


def _experts(s: Shape) -> Iterator[Work]:
    tokens = s.rows // TOP_K
    order = torch.randperm(s.rows, device="cuda")
    token_of_slot, slots = (order // TOP_K).int(), order.argsort().view(tokens, TOP_K).int()
    x, rows, where = bf16(tokens, s.hidden), bf16(s.rows, s.hidden), f"{s.rows} x {s.hidden}"
    yield _streaming("permute", where, _size(x, rows), x, token_of_slot)
    yield _streaming("unpermute", where, _size(x, x, rows), rows, slots, bf16(tokens, s.hidden))
    h, gate, where = bf16(s.rows, 2 * s.width), torch.rand(s.rows, device="cuda"), f"{s.rows} x {s.width}"
    dy = bf16(s.rows, s.width)
    yield _streaming("swiglu", where, _size(h, dy), h, gate)
    yield _streaming("swiglu_backward", where, _size(h, h, dy, dy), dy, h, gate, True)


def _grouped(s: Shape) -> Iterator[Work]:
    offsets = even_offsets(s)
    for n, k in ((2 * s.width, s.hidden), (s.hidden, s.width)):
        where, flops = f"{s.groups} experts, {s.rows} rows, {n} x {k}", 2.0 * s.rows * n * k
        x, dy, weight = bf16(s.rows, k), bf16(s.rows, n), bf16(s.groups, n, k)
        once = _size(x, dy, weight)
        yield Work("grouped_mm", where, lambda x=x, w=weight: kernels.grouped_mm(x, w, offsets), None, "", once, flops)
        yield Work(
            "grouped_mm_t", where, lambda d=dy, w=weight: kernels.grouped_mm_t(d, w, offsets), None, "", once, flops
        )
        del weight
        grad = fp32(s.groups, n, k)

        def peer(d: Tensor = dy, x: Tensor = x) -> Tensor:
            return torch.nn.functional.grouped_mm(d.t(), x, offs=offsets)

        for accumulate in (False, True):

            def ours(g: Tensor = grad, d: Tensor = dy, x: Tensor = x, add: bool = accumulate) -> None:
                kernels.grouped_wgrad_(g, d, x, offsets, add)

            name = f"grouped_wgrad_ {'add' if accumulate else 'store'}"
            yield Work(
                name, where, ours, peer, "grouped_mm, BF16 out", _size(x, dy) + (1 + accumulate) * _size(grad), flops
            )


def _dense(s: Shape) -> Iterator[Work]:
    n, k = s.hidden, s.heads * 128  # the attention's output projection
    dy, x, grad = bf16(s.tokens, n), bf16(s.tokens, k), fp32(n, k)
    for accumulate in (False, True):

        def ours(add: bool = accumulate) -> None:
            kernels.dense_wgrad_(grad, dy, x, add)

        name, moved = f"dense_wgrad_ {'add' if accumulate else 'store'}", _size(dy, x) + (1 + accumulate) * _size(grad)
        peer, flops = (lambda: torch.mm(dy.t(), x)), 2.0 * s.tokens * n * k
        yield Work(name, f"{s.tokens} tokens, {n} x {k}", ours, peer, "mm, BF16 out", moved, flops)


def _ends(s: Shape) -> Iterator[Work]:
    logits = bf16(LOSS_ROWS, VOCABULARY)
    labels = torch.randint(VOCABULARY, (LOSS_ROWS,), device="cuda")
    yield _streaming("cross_entropy_", f"{LOSS_ROWS} x {VOCABULARY}", 2 * _size(logits), logits, labels, 1e-4)
    del logits
    ids, dy = torch.randint(VOCABULARY, (s.tokens,), device="cuda"), bf16(s.tokens, s.hidden)
    skewed = ids.where(torch.rand(s.tokens, device="cuda") > 0.25, 7)
    grad = fp32(VOCABULARY, s.hidden)
    for kind, chosen in (("", ids), (", a quarter one token", skewed)):

        def ours(i: Tensor = chosen) -> None:
            kernels.embedding_wgrad_(grad, i, dy)

        def peer(i: Tensor = chosen) -> None:
            grad.index_add_(0, i, dy.float())

        moved = _size(dy) + 8 * s.hidden * int(chosen.unique().numel())
        yield Work("embedding_wgrad_", f"{s.tokens} x {s.hidden}{kind}", ours, peer, "index_add_", moved)


def _optimizer() -> Iterator[Work]:
    n = PARAMETERS
    master, grad, scale = fp32(n), fp32(n), torch.tensor(0.5, device="cuda")
    m, v, out = bf16(n) * 0.01, bf16(n).square(), bf16(n)
    step = torch.ones((), device="cuda", dtype=torch.int64)
    parameter = torch.nn.Parameter(fp32(n))
    parameter.grad = grad
    theirs = torch.optim.AdamW([parameter], lr=1e-4, fused=True)

    def ours() -> None:
        kernels.adamw_(master, grad, m, v, out, 1e-4, 0.9, 0.95, 1e-8, 0.1, step, scale)

    yield Work("adamw_", f"{n >> 20} Mi", ours, theirs.step, "fused AdamW, FP32 moments, 28 B", 22.0 * n)
    norm = torch.linalg.vector_norm
    yield Work(
        "sum_of_squares", f"{n >> 20} Mi", lambda: kernels.sum_of_squares(grad), lambda: norm(grad), "norm", 4.0 * n
    )


def _works() -> Iterator[Work]:
    for shape in (MINI, V3):
        for family in (_norms, _attention, _routing, _experts, _grouped, _dense, _ends):
            for work in family(shape):
                yield work._replace(name=f"{shape.name} {work.name}")
            torch.cuda.empty_cache()
    yield from _optimizer()


def even_offsets(s: Shape) -> Tensor:
    """Ends of the experts' rows, within an eighth of balance: real loads are not multiples of a tile."""
    ends = torch.arange(1, s.groups + 1) * (s.rows // s.groups)
    ends[:-1] += torch.randint(-s.rows // s.groups // 16, s.rows // s.groups // 16 + 1, (s.groups - 1,))
    return ends.int().cuda()


def rows() -> list[dict[str, Any]]:
    """Name, shape, us, spread_us, gb_s, tflops (None without products), of_floor (1 is the floor), peer, peer_us."""
    bandwidth, rate = machine_rates()
    results = []
    for work in _works():
        ours = time_gpu(work.ours)
        peer = None if work.peer is None else time_gpu(work.peer)
        floor_us = max(work.bytes / bandwidth, work.flops / rate) * 1e6
        results.append(
            {
                "name": work.name,
                "shape": work.shape,
                "us": ours.median_us,
                "spread_us": ours.spread_us,
                "gb_s": work.bytes / ours.median_us / 1e3,
                "tflops": work.flops / ours.median_us / 1e6 if work.flops else None,
                "of_floor": floor_us / ours.median_us,
                "peer": work.peer_name,
                "peer_us": None if peer is None else peer.median_us,
            }
        )
    return results


def table() -> str:
    """The rows as markdown, under the machine and its measured rates."""
    bandwidth, rate = machine_rates()
    head = f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e9:.0f} GB/s, BF16 8192^3 {rate / 1e12:.0f} TFLOP/s\n\n"
    lines = ["| kernel | shape | us | GB/s | TFLOP/s | of floor | torch us | torch by |", "|" + "---|" * 8]
    for row in rows():
        flops = "" if row["tflops"] is None else f"{row['tflops']:.0f}"
        peer = "" if row["peer_us"] is None else f"{row['peer_us']:.1f}"
        figures = f"{row['us']:.1f} ± {row['spread_us']:.1f} | {row['gb_s']:.0f} | {flops} | {row['of_floor']:.2f}"
        lines.append(f"| {row['name']} | {row['shape']} | {figures} | {peer} | {row['peer']} |")
    return head + "\n".join(lines)


def tile_table() -> str:
    """TFLOP/s of every candidate tile of the grouped weight gradient, to choose `gemm.BEST` on a device."""
    from deepv3.kernels import gemm

    lines = ["| tile | shape | store TFLOP/s | add TFLOP/s |", "|---|---|---|---|"]
    for shape in (MINI, V3):
        offsets = even_offsets(shape)
        for n, k in ((2 * shape.width, shape.hidden), (shape.hidden, shape.width)):
            dy, x, grad = bf16(shape.rows, n), bf16(shape.rows, k), fp32(shape.groups, n, k)
            for tile in gemm.TILES:
                speeds = []
                for add in (False, True):
                    timing = time_gpu(lambda a=add, t=tile: gemm.launch_grouped_wgrad(grad, dy, x, offsets, a, t))  # noqa: B023
                    speeds.append(f"{2.0 * shape.rows * n * k / timing.median_us / 1e6:.0f}")
                lines.append(f"| {tuple(tile)} | {shape.name} {n} x {k} | {' | '.join(speeds)} |")
    return "\n".join(lines)


def report(every: bool = False) -> Iterator[str]:
    """All tables as they are made. FP8 first: its implementations are checked before anything is timed."""
    yield benchmark8.check(every)
    yield benchmark8.table(every)
    yield tile_table()
    yield table()


def main() -> None:
    """`every` as argument: Gluon with a version of Triton too with which it has not passed its tests."""
    for part in report(sys.argv[1:] == ["every"]):
        print(part, flush=True)


if __name__ == "__main__":
    main()
