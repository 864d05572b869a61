"""Measures this device for the planner: rows of a calibration file (deepv3/planner/measured.py has the format).

The products, attention, copy and optimizer update that training runs, at the shapes of a configuration's own model and
micro-batch, each through the function that training calls. Not measured here: exchanges between devices, memory-bound
kernels and overlapped pairs, which keep the values of the base calibration.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import deepv3.kernels as kernels
from deepv3.config.schema import Config
from deepv3.model.mla import attend

Clock = Callable[[Callable[[], Any]], float]
"""Seconds of a call."""
ATTENTION_BACKWARD = 2.6  # FLOPs over the forward's, as the planner counts them
UPDATE = 1 << 27  # parameters


class Bench:
    """One configuration's shapes on one device."""

    def __init__(self, cfg: Config, device: torch.device, clock: Clock, dtype: torch.dtype = torch.bfloat16) -> None:
        self.m, self.device, self.clock, self.dtype = cfg.model, device, clock, dtype
        self.batch, self.seq_len = cfg.train.micro_batch_size, cfg.data.seq_len
        self.tokens = self.batch * self.seq_len
        self.ep_size = cfg.parallel.ep_size

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def rows(self, fp8: bool) -> Iterator[dict[str, Any]]:
        """All rows, as they are measured."""
        yield self._copy()
        yield self._update()
        yield from self._attention()
        for n, k in self._matrices():
            yield from self._dense(n, k, fp8)
        experts, rows = self.m.n_routed_experts // self.ep_size, self.tokens * self.m.num_experts_per_tok
        for n, k in (
            (2 * self.m.moe_intermediate_size, self.m.hidden_size),
            (self.m.hidden_size, self.m.moe_intermediate_size),
        ):
            yield from self._grouped(experts, rows // experts // 128 * 128 or 128, n, k, fp8)

    def _matrices(self) -> list[tuple[int, int]]:
        """(out, in) of the dense projections of a layer."""
        m = self.m
        qk = m.qk_nope_head_dim + m.qk_rope_head_dim
        query = m.num_attention_heads * qk
        first = [(query, m.hidden_size)] if m.q_lora_rank is None else [(m.q_lora_rank, m.hidden_size)]
        second = [] if m.q_lora_rank is None else [(query, m.q_lora_rank)]
        up = (m.num_attention_heads * (m.qk_nope_head_dim + m.v_head_dim), m.kv_lora_rank)
        out = (m.hidden_size, m.num_attention_heads * m.v_head_dim)
        return [*first, *second, up, out, (2 * m.intermediate_size, m.hidden_size)]

    def _copy(self) -> dict[str, Any]:
        source = self._random(UPDATE)
        target = torch.empty_like(source)
        size = 2 * source.numel() * source.element_size()
        return {"kind": "copy", "bytes": size, "seconds": self.clock(lambda: target.copy_(source))}

    def _update(self) -> dict[str, Any]:
        master, grad = (torch.randn(UPDATE, device=self.device) for _ in range(2))
        first, second, low = (torch.zeros(UPDATE, device=self.device, dtype=self.dtype) for _ in range(3))
        step = torch.ones((), dtype=torch.int64, device=self.device)
        scale = torch.ones((), device=self.device)

        def update() -> None:
            kernels.sum_of_squares(grad)
            kernels.adamw_(master, grad, first, second, low, 1e-4, 0.9, 0.95, 1e-8, 0.1, step, scale)

        return {"kind": "update", "parameters": UPDATE, "seconds": self.clock(update)}

    def _attention(self) -> Iterator[dict[str, Any]]:
        m, heads = self.m, self.m.num_attention_heads
        qk = m.qk_nope_head_dim + m.qk_rope_head_dim
        q, k = (self._random(self.batch, self.seq_len, heads, qk).requires_grad_() for _ in range(2))
        v = self._random(self.batch, self.seq_len, heads, m.v_head_dim).requires_grad_()
        flops = self.batch * heads * self.seq_len**2 * (qk + m.v_head_dim)  # causal half of 2 x 2 S^2 (dk + dv) / 2
        with torch.no_grad():
            forward = self.clock(lambda: attend(q, k, v, qk**-0.5, None))
        yield {"kind": "attention", "pass": "forward", "flops": flops, "seconds": forward}
        out = attend(q, k, v, qk**-0.5, None)
        gradient = torch.randn_like(out)
        seconds = self.clock(lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True))
        yield {"kind": "attention", "pass": "backward", "flops": ATTENTION_BACKWARD * flops, "seconds": seconds}

    def _gemm(self, form: str, shape: str, which: str, flops: float, call: Callable[[], Any]) -> dict[str, Any]:
        row = {"kind": "gemm", "format": form, "shape": shape, "pass": which, "flops": flops}
        return row | {"seconds": self.clock(call)}

    def _dense(self, n: int, k: int, fp8: bool) -> Iterator[dict[str, Any]]:
        x, dy, w = self._random(self.tokens, k), self._random(self.tokens, n), self._random(n, k)
        grad, flops = torch.zeros(n, k, device=self.device), 2.0 * self.tokens * n * k
        yield self._gemm("bf16", "dense", "forward", flops, lambda: torch.mm(x, w.t()))
        yield self._gemm("bf16", "dense", "input", flops, lambda: torch.mm(dy, w))
        yield self._gemm("bf16", "dense", "weight", flops, lambda: kernels.dense_wgrad_(grad, dy, x, True))
        if fp8:
            codes, turned = kernels.quantise_rows(x), kernels.quantise_blocks(w)
            columns = (*kernels.quantise_columns(dy), *kernels.quantise_columns(x))
            yield self._gemm("fp8", "dense", "forward", flops, lambda: kernels.fp8_mm(*codes, *turned[:2]))
            yield self._gemm("fp8", "dense", "weight", flops, lambda: kernels.fp8_wgrad_(grad, *columns, True))

    def _grouped(self, experts: int, each: int, n: int, k: int, fp8: bool) -> Iterator[dict[str, Any]]:
        rows = experts * each
        offsets = (torch.arange(experts, device=self.device) + 1).mul_(each).int()
        x, dy, w = self._random(rows, k), self._random(rows, n), self._random(experts, n, k)
        grad, flops = torch.zeros(experts, n, k, device=self.device), 2.0 * rows * n * k
        yield self._gemm("bf16", "grouped", "forward", flops, lambda: kernels.grouped_mm(x, w, offsets))
        yield self._gemm("bf16", "grouped", "input", flops, lambda: kernels.grouped_mm_t(dy, w, offsets))
        wgrad = lambda: kernels.grouped_wgrad_(grad, dy, x, offsets, True)  # noqa: E731
        yield self._gemm("bf16", "grouped", "weight", flops, wgrad)
        if fp8:
            codes, blocks = kernels.quantise_rows(x), kernels.quantise_blocks(w)
            columns = (*kernels.quantise_columns(dy), *kernels.quantise_columns(x))
            forward = lambda: kernels.grouped_fp8_mm(*codes, *blocks[:2], offsets)  # noqa: E731
            yield self._gemm("fp8", "grouped", "forward", flops, forward)
            weight = lambda: kernels.grouped_fp8_wgrad_(grad, *columns, offsets, True)  # noqa: E731
            yield self._gemm("fp8", "grouped", "weight", flops, weight)


def document(cfg: Config, device_name: str, fp8: bool) -> dict[str, Any]:
    """The calibration file of this CUDA device, named as in the planner's table of devices."""
    import triton

    from deepv3.kernels.testing import time_gpu

    device = torch.device("cuda")
    bench = Bench(cfg, device, lambda call: time_gpu(call).median_us / 1e6)
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}
    name = torch.cuda.get_device_name(device)
    rows = list(bench.rows(fp8))
    return {"format": 1, "name": name, "device": device_name, "versions": versions, "rows": rows}
