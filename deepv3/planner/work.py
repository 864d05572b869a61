"""How long the pieces of a layer, the head and an MTP module take on one device, from FLOPs and bytes.

A piece is a sum of kernels by class:

    gemm_fp8, gemm_bf16, attention    FLOPs / (peak of the multiprocessors in use x fraction reached)
    memory                            bytes that fused kernels need x traffic factor / bandwidth reached

A grouped GEMM is never faster than its memory traffic: expert weights are read once per pass. Its weight gradient reads
and writes FP32 sums, 8 bytes an element, after its products: that time comes on top, and with few rows per expert it is
the larger part. Rows per expert are padded by 64 on average (128-row tiles). Backward of attention does 2.6 x the
forward's FLOPs at V3's head sizes: five products of which one repeats. In FP8 the projections of attention and of
feed-forwards multiply in FP8; router, head and eh_proj stay BF16 (V3 3.3.1, deepv3/precision/recipe.py).

A pass over a layer lasts no less than its launches do, whose number may grow with the experts of the rank; the host
goes on while tokens travel. That is what a small model waits for, and software that calls experts one by one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from deepv3.arithmetic import attention_flops
from deepv3.config.schema import ModelConfig
from deepv3.planner.calibration import Calibration
from deepv3.planner.hardware import Device


class Seconds(dict[str, float]):
    """Class of kernel -> seconds; adds class by class."""

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds({key: self.get(key, 0.0) + other.get(key, 0.0) for key in [*self, *other]})

    def total(self) -> float:
        """All classes together."""
        return sum(self.values())


def added(parts: Iterable[Seconds]) -> Seconds:
    """The sum of several."""
    return sum(parts, Seconds())


PADDING = 64  # rows, mean per expert
HOST = 4e9  # Hz, of the core that `launch` is stated for


def attention_backward(m: ModelConfig) -> float:
    """FLOPs of attention's backward over its forward's: q k^T again and two of that width, two of the values'."""
    qk = m.qk_nope_head_dim + m.qk_rope_head_dim
    return (3 * qk + 2 * m.v_head_dim) / (qk + m.v_head_dim)


@dataclass(frozen=True)
class Layer:
    """Pieces of one layer and micro-batch: forward, input gradient, weight gradient of attention and feed-forward.

    shared: the part of ffn_forward that needs no token from elsewhere, and runs while tokens travel.
    """

    moe: bool
    attention_forward: Seconds
    attention_input: Seconds
    attention_weight: Seconds
    ffn_forward: Seconds
    ffn_input: Seconds
    ffn_weight: Seconds
    shared: float

    def total(self) -> Seconds:
        """All six pieces."""
        parts = (self.attention_forward, self.attention_input, self.attention_weight)
        return added((*parts, self.ffn_forward, self.ffn_input, self.ffn_weight))


@dataclass(frozen=True)
class Workload:
    """The arithmetic of one micro-batch on one device.

    tokens: of the micro-batch. precision: fp32 | bf16 | fp8. recompute: train.recompute. ep: ranks that share experts.
    exchange: seconds of a pass's dispatch and combine. gradient_bytes: of an element of summed gradients. replayed:
    whether the host starts whole micro-batches instead of kernels.
    """

    m: ModelConfig
    device: Device
    cal: Calibration
    precision: str
    recompute: str
    seq_len: int
    tokens: int
    ep: int
    exchange: float = 0.0
    gradient_bytes: int = 4
    replayed: bool = False

    @cached_property
    def share(self) -> float:
        """Of the multiprocessors, those that compute."""
        return 1.0 - (self.cal.comm_sms.value / self.device.sms if self.ep > 1 else 0.0)

    @cached_property
    def bandwidth(self) -> float:
        """Bytes/s of device memory that kernels reach."""
        return self.device.hbm * self.cal.hbm.value

    def memory(self, per_token: float, traffic: float) -> Seconds:
        """Memory-bound kernels."""
        return Seconds({"memory": self.tokens * per_token * traffic / self.bandwidth})

    def dense(self, inputs: int, outputs: int, kind: str = "forward", fp8: bool = True) -> Seconds:
        """One GEMM of all tokens. kind: forward | input | weight. fp8: whether FP8 is its format."""
        flops, cal = 2.0 * self.tokens * inputs * outputs, self.cal
        if self.precision == "fp8" and fp8:
            fraction = cal.fp8_dense_wgrad if kind == "weight" else cal.fp8_dense
            return Seconds({"gemm_fp8": flops / (self.device.fp8 * self.share * fraction.value)})
        fraction = cal.bf16_dense_wgrad if kind == "weight" else cal.bf16_dense
        peak = self.device.bf16 / (2.0 if self.precision == "fp32" else 1.0)  # TF32 runs at half the BF16 rate
        return Seconds({"gemm_bf16": flops / (peak * self.share * fraction.value)})

    def grouped(self, inputs: int, outputs: int, kind: str = "forward") -> Seconds:
        """One GEMM over the rank's experts, or its memory traffic where that takes longer."""
        experts, cal = self.m.n_routed_experts // self.ep, self.cal
        rows = self.tokens * self.m.num_experts_per_tok * cal.imbalance.value
        flops = 2.0 * (rows + PADDING * experts) * inputs * outputs
        fp8 = self.precision == "fp8"
        if fp8:
            fraction = {
                "forward": cal.fp8_grouped, "input": cal.fp8_grouped_dgrad, "weight": cal.fp8_grouped_wgrad,
            }[kind]  # fmt: skip
        else:
            fraction = cal.bf16_grouped
        peak = (self.device.fp8 if fp8 else self.device.bf16) * self.share
        width = 1 if fp8 else 2
        weights = experts * inputs * outputs
        if kind == "weight":
            moved, summed = rows * (inputs + outputs) * width, 2 * self.gradient_bytes * weights
        else:
            moved, summed = (rows * (inputs + 2 * outputs) + weights) * width, 0
        seconds = max(flops / (peak * fraction.value), moved / self.bandwidth) + summed / self.bandwidth
        return Seconds({"gemm_fp8" if fp8 else "gemm_bf16": seconds})

    @cached_property
    def _linears(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of attention's projections; the up-projections come first."""
        m = self.m
        d, heads, qk = m.hidden_size, m.num_attention_heads, m.qk_nope_head_dim + m.qk_rope_head_dim
        kv_up = (m.kv_lora_rank, heads * (m.qk_nope_head_dim + m.v_head_dim))
        down = (d, m.kv_lora_rank + m.qk_rope_head_dim + (m.q_lora_rank or 0))
        return ((m.q_lora_rank or d, heads * qk), kv_up, down, (heads * m.v_head_dim, d))

    @cached_property
    def _remade(self) -> Seconds:
        """What selective recompute adds to attention's backward: the up-projections (V3 3.2.3)."""
        ups = self._linears[:2] if self.m.q_lora_rank else self._linears[1:2]
        return added(self.dense(*shape) for shape in ups)

    def _core(self, backward: bool) -> Seconds:
        """Attention's products."""
        m, cal = self.m, self.cal
        flops = self.tokens * attention_flops(m, self.seq_len) * (attention_backward(m) if backward else 1.0)
        reached = (cal.attention_backward if backward else cal.attention).value
        softmax = (cal.softmax_backward if backward else cal.softmax).value
        shorter = 1.0 - softmax * (1.0 - 1.0 / self.device.exponentials)
        return Seconds({"attention": flops * shorter / (self.device.bf16 * self.share * reached)})

    def _codes(self, backward: bool) -> Seconds:
        """Making the FP8 operands of attention's products: queries, keys, values; in backward the output's gradient."""
        m = self.m
        values = m.num_attention_heads * m.v_head_dim
        read = values if backward else 2 * m.num_attention_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim) + values
        return self.memory(read, self.cal.attention_codes.value)

    def _attention_bytes(self, backward: bool) -> float:
        """Per token: norms with the residual, rotation, key assembly, quantisation, and what undoes them."""
        m, fp8 = self.m, self.precision == "fp8"
        d, heads, nope, rope, v = (
            m.hidden_size, m.num_attention_heads, m.qk_nope_head_dim, m.qk_rope_head_dim, m.v_head_dim,
        )  # fmt: skip
        latents = (m.q_lora_rank or 0) + m.kv_lora_rank
        rotate, assemble = 4 * heads * rope, 2 * heads * (2 * nope + rope)
        if not backward:
            store = (3.0 + 3.5) * heads * v if fp8 else 0.0  # E4M3 for W_O, E5M6 for backward
            return (7 if fp8 else 8) * (d + latents) + rotate + assemble + store
        undone = 2 * (rotate + assemble) if self.recompute != "none" else rotate + assemble
        both_ways = 4.0 * heads * (nope + rope + nope + v) + (3.5 + 2.0) * heads * v + 7 * d if fp8 else 0.0
        return 8 * (d + latents) + undone + both_ways

    def _experts_bytes(self, backward: bool) -> float:
        """Per token: norm, permutation, SwiGLU, un-permutation, the shared expert's SwiGLU, the router."""
        m, fp8 = self.m, self.precision == "fp8"
        d, rows, inner = m.hidden_size, m.num_experts_per_tok, m.moe_intermediate_size
        all_inner = (rows * (1.0 - self.cal.fused_experts.value) + m.n_shared_experts) * inner
        routing = 16 * m.n_routed_experts
        if not backward:
            return (
                (7 if fp8 else 8) * d
                + (2 if fp8 else 4) * rows * d
                + (7 if fp8 else 6) * all_inner
                + 4 * rows * d
                + routing
            )
        again = 4 * rows * d if fp8 else 2 * rows * d  # rows made again, or turned for the weight gradient
        return 11 * d + (2 if fp8 else 4) * rows * d + (9 if fp8 else 12) * all_inner + 4 * rows * d + again + routing

    def _dense_bytes(self, backward: bool) -> float:
        """Per token: norm and SwiGLU of a dense layer."""
        d, inner, fp8 = self.m.hidden_size, self.m.intermediate_size, self.precision == "fp8"
        return 11 * d + (9 if fp8 else 12) * inner if backward else (7 if fp8 else 8) * d + (7 if fp8 else 6) * inner

    def fewest_bytes(self, moe: bool) -> dict[str, float]:
        """Bytes of a layer and micro-batch that fused memory-bound kernels need, both passes, by piece."""
        experts = self._experts_bytes if moe else self._dense_bytes
        pieces = {"attention": self._attention_bytes, "experts": experts}
        return {name: self.tokens * (bytes_of(False) + bytes_of(True)) for name, bytes_of in pieces.items()}

    @property
    def head_bytes(self) -> float:
        """Of head and loss: three passes over the logits."""
        return 6.0 * self.tokens * self.m.vocab_size

    def layer(self, moe: bool) -> Layer:
        """The pieces of a dense or an expert layer."""
        traffic = self.cal.traffic_attention.value
        attention_forward = added(self.dense(*shape) for shape in self._linears)
        attention_input = added(self.dense(b, a, "input") for a, b in self._linears)
        attention_weight = added(self.dense(a, b, "weight") for a, b in self._linears)
        attention_forward += self._core(False) + self._codes(False) + self.memory(self._attention_bytes(False), traffic)
        attention_input += self._core(True) + self._codes(True) + self.memory(self._attention_bytes(True), traffic)
        if self.recompute != "none":
            attention_input += self._remade
        forward, inputs, weight, shared = self._experts() if moe else self._dense()
        attention_forward += self._host(False, moe, attention_forward, forward)
        attention_input += self._host(True, moe, attention_input, attention_weight, inputs, weight)
        if self.recompute == "full":
            attention_input, inputs = attention_input + attention_forward, inputs + forward
        return Layer(moe, attention_forward, attention_input, attention_weight, forward, inputs, weight, shared)

    def _host(self, backward: bool, moe: bool, *pieces: Seconds) -> Seconds:
        """What a pass lasts beyond its kernels: the fixed overhead, and launching where that takes longer."""
        cal = self.cal
        launches = (cal.kernels_backward if backward else cal.kernels_forward).value
        if moe:
            calls = (4 if backward else 2) + (2 if self.precision == "fp8" else 0)
            launches += cal.expert_calls.value * calls * self.m.n_routed_experts / self.ep
        busy = added(pieces).total() + (self.exchange if moe else 0.0)
        launching = 0.0 if self.replayed else launches * cal.launch.value * HOST / self.device.host
        return Seconds({"host": cal.layer_overhead.value + max(0.0, launching - busy)})

    def _dense(self) -> tuple[Seconds, Seconds, Seconds, float]:
        d, inner, traffic = self.m.hidden_size, self.m.intermediate_size, self.cal.traffic_experts.value
        forward = self.dense(d, 2 * inner) + self.dense(inner, d)
        forward += self.memory(self._dense_bytes(False), traffic)
        inputs = self.dense(2 * inner, d, "input") + self.dense(d, inner, "input")
        inputs += self.memory(self._dense_bytes(True), traffic)
        weight = self.dense(d, 2 * inner, "weight") + self.dense(inner, d, "weight")
        return forward, inputs, weight, forward.total()

    def _experts(self) -> tuple[Seconds, Seconds, Seconds, float]:
        m, traffic = self.m, self.cal.traffic_experts.value
        d, inner, shared_inner = m.hidden_size, m.moe_intermediate_size, m.n_shared_experts * m.moe_intermediate_size
        shared = self.dense(d, 2 * shared_inner) + self.dense(shared_inner, d) if shared_inner else Seconds()
        forward = self.grouped(d, 2 * inner) + self.grouped(inner, d) + shared
        forward += self.memory(self._experts_bytes(False), traffic)
        inputs = self.grouped(2 * inner, d, "input") + self.grouped(d, inner, "input")
        weight = self.grouped(d, 2 * inner, "weight") + self.grouped(inner, d, "weight")
        if shared_inner:
            inputs += self.dense(2 * shared_inner, d, "input") + self.dense(d, shared_inner, "input")
            weight += self.dense(d, 2 * shared_inner, "weight") + self.dense(shared_inner, d, "weight")
        inputs += self.memory(self._experts_bytes(True), traffic)
        router = self.dense(d, m.n_routed_experts, fp8=False)
        return forward + router, inputs + router, weight + router, shared.total()

    def head(self) -> Seconds:
        """One pass of logits and loss: three GEMMs, all in forward, and three passes over the logits (see head.py)."""
        shape = (self.m.hidden_size, self.m.vocab_size)
        gemms = self.dense(*shape, "forward", False) + self.dense(*shape, "input", False)
        memory = self.memory(self.head_bytes / self.tokens, self.cal.traffic_head.value)
        return gemms + self.dense(*shape, "weight", False) + memory

    def joint(self) -> tuple[Seconds, Seconds, Seconds]:
        """eh_proj of one MTP module, [2d -> d]: forward, input gradient, weight gradient."""
        d = self.m.hidden_size
        return (
            self.dense(2 * d, d, "forward", False),
            self.dense(d, 2 * d, "input", False),
            self.dense(2 * d, d, "weight", False),
        )
