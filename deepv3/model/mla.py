"""Multi-head latent attention in training form (V3 2.1.1, Eq. 1-11).

1. c_q = W_DQ h, c_kv | k_R = W_DKV h | W_KR h; both latents are normed, the rotary key part is not.
2. q = W_UQ norm(c_q), rotated in its last part per head; [k_C | v] = W_UK|UV norm(c_kv); k = [k_C | rotated k_R].
3. o = causal softmax(q k^T * scale) v, then W_O.

The core is torch's scaled_dot_product_attention: cuDNN on GPUs (the one with a fast backward for head dims 192/128).
With `remake`, q, k and v are not kept: backward makes them again from the two latents (V3 3.2.3), the attention output
and its row statistics stay. That costs 2.7 % more FLOPs at V3's shapes and saves 640 values per token and head (v, a
view, would keep its whole up-projection).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from deepv3.config.schema import ModelConfig
from deepv3.model.layers import RMSNorm
from deepv3.model.rope import assemble_key, rotate_query, softmax_scale
from deepv3.precision.linear import DEFAULT, Linear, Place
from deepv3.precision.saved import Operand, Remade


class Layout(NamedTuple):
    """How the flat tokens of a micro-batch lie in sequences."""

    batch: int
    seq_len: int
    cos: Tensor  # [T, rope / 2] FP32
    sin: Tensor
    mask: Tensor | None  # [B, 1, S, S] bool, True where a query may look; None is plain causal


class MLA(nn.Module):
    """Latent attention; parameters carry the published names and row orders."""

    def __init__(
        self,
        cfg: ModelConfig,
        remake: bool = False,
        place: Place = DEFAULT,
    ) -> None:
        super().__init__()
        self.cfg, self.remake, self.heads = cfg, remake, cfg.num_attention_heads
        self.scale = softmax_scale(cfg)
        d, rank = cfg.hidden_size, cfg.q_lora_rank
        query_rows = self.heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)
        if rank is None:
            self.q_proj = Linear(d, query_rows, place)
        else:
            self.q_a_proj = Linear(d, rank, place)
            self.q_a_layernorm = RMSNorm(rank, cfg.rms_norm_eps, remake, place)
            self.q_b_proj = Linear(rank, query_rows, place)
        self.kv_a_proj_with_mqa = Linear(d, cfg.kv_lora_rank + cfg.qk_rope_head_dim, place)
        self.kv_a_layernorm = RMSNorm(cfg.kv_lora_rank, cfg.rms_norm_eps, remake, place)
        self.kv_b_proj = Linear(cfg.kv_lora_rank, self.heads * (cfg.qk_nope_head_dim + cfg.v_head_dim), place)
        self.o_proj = Linear(self.heads * cfg.v_head_dim, d, place)

    def forward(self, h: Operand, layout: Layout) -> Tensor:
        """h: [T, D], normed. Returns [T, D], not yet added to the residual stream."""
        cfg = self.cfg
        if cfg.q_lora_rank is None:
            q_latent = h
        else:
            q_latent = self.q_a_layernorm.operand(self.q_a_proj(h), cfg.latent_scale_q)
        latent, k_rope = self.kv_a_proj_with_mqa(h).split((cfg.kv_lora_rank, cfg.qk_rope_head_dim), dim=-1)
        kv_latent = self.kv_a_layernorm.operand(latent, cfg.latent_scale_kv)
        q, k, v = self._up(q_latent, kv_latent, k_rope, layout)
        again = None
        if self.remake:
            k_rope = k_rope.detach()
            again = Remade(
                lambda ql, kvl: self._up(Operand(ql), Operand(kvl), k_rope, layout),
                q_latent.source(),
                kv_latent.source(),
            )
        out = self.o_proj(attend(q, k, v, self.scale, layout.mask, again).reshape(h.value.shape[0], -1))
        return out if cfg.attn_out_scale == 1.0 else out * cfg.attn_out_scale

    def _up(self, q_latent: Operand, kv_latent: Operand, k_rope: Tensor, layout: Layout) -> tuple[Tensor, ...]:
        """Step 2. Returns q, k [B, S, H, nope + rope] and v [B, S, H, v]."""
        project = self.q_proj if self.cfg.q_lora_rank is None else self.q_b_proj
        cos, sin = layout.cos, layout.sin
        q = rotate_query(project(q_latent), self.heads, cos, sin)
        k, v = assemble_key(self.kv_b_proj(kv_latent), k_rope, self.heads, self.cfg.qk_nope_head_dim, cos, sin)
        shape = (layout.batch, layout.seq_len, self.heads)
        return q.view(*shape, -1), k.view(*shape, -1), v.view(*shape, -1)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, again: Remade | None = None) -> Tensor:
    """Causal attention, or attention under `mask`. q, k: [B, S, H, dk]; v: [B, S, H, dv]. Returns [B, S, H, dv].

    `again` makes (q, k, v) anew for backward, which then keeps none of them.
    """
    with _Dropped((q, k, v), again):
        if q.is_cuda:
            with sdpa_kernel(_backends(q.dtype, mask), set_priority=True):
                return _core(q, k, v, scale, mask)
        # Torch's blocked CPU kernel wants equal head dims; zero columns of v cost less than its fallback (12 against
        # 23 ms at batch 8, 256 tokens, 4 heads of 48/32, two cores).
        padded = F.pad(v, (0, q.shape[-1] - v.shape[-1])) if q.shape[-1] > v.shape[-1] else v
        return _core(q, k, padded, scale, mask)[..., : v.shape[-1]]


def _core(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # views: the kernels take strides
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale).transpose(1, 2)


def _backends(dtype: torch.dtype, mask: Tensor | None) -> list[SDPBackend]:
    """Best first. Measured on H100, forward + backward at 192/128: cuDNN 440-450 TFLOP/s, memory-efficient 60.

    The memory-efficient kernel serves what cuDNN does not: a mask, FP32, and deterministic mode
    (torch.use_deterministic_algorithms), in which its backward runs without atomics while cuDNN's is refused.
    """
    slow = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    fast = dtype in (torch.bfloat16, torch.float16) and mask is None
    return [SDPBackend.CUDNN_ATTENTION, *slow] if fast and not torch.are_deterministic_algorithms_enabled() else slow


class _Dropped(saved_tensors_hooks):
    """Within the block, autograd saves a place holder for each of `tensors` instead of the tensor."""

    def __init__(self, tensors: tuple[Tensor, ...], again: Remade | None) -> None:
        self.again = again if torch.is_grad_enabled() else None
        self.places = {_identity(tensor.transpose(1, 2)): index for index, tensor in enumerate(tensors)}
        super().__init__(self._pack, lambda saved: saved() if callable(saved) else saved)

    def __enter__(self) -> None:
        if self.again is not None:
            super().__enter__()

    def __exit__(self, *exc: object) -> None:
        if self.again is not None:
            super().__exit__(*exc)

    def _pack(self, tensor: Tensor):
        index = self.places.get(_identity(tensor))
        if index is None:
            return tensor.detach()  # the tensor itself would tie the graph's output to the graph
        assert self.again is not None, "the hooks are installed only with something to make the tensors from"
        source = self.again.reserve()
        return lambda: source()[index].transpose(1, 2)


def _identity(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.shape, tensor.stride()
