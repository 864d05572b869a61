"""Multi-head latent attention in training form (V3 2.1.1, Eq. 1-11).

1. c_q = W_DQ h, c_kv | k_R = W_DKV h | W_KR h; both latents are normed, the rotary key part is not.
2. q = W_UQ norm(c_q), rotated in its last part per head; [k_C | v] = W_UK|UV norm(c_kv); k = [k_C | rotated k_R].
3. o = causal softmax(q k^T * scale) v, then W_O.

The core is torch's scaled_dot_product_attention: cuDNN on GPUs (the one with a fast backward for head dims 192/128).
With `remake`, q, k and v are not kept: backward makes them again from the two latents (V3 3.2.3), the attention output
and its row statistics stay. That costs 2.7 % more FLOPs at V3's shapes and saves 640 values per token and head (v, a
view, would keep its whole up-projection). With an FP8 recipe the output is kept in 12 bits (`precision.packed`).
"""

from collections.abc import Callable
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
from deepv3.precision.packed import Packed
from deepv3.precision.saved import Kept, Operand, Remade


class Layout(NamedTuple):
    """How the flat tokens of a micro-batch lie in sequences."""

    batch: int
    seq_len: int
    cos: Tensor  # [T, rope / 2] FP32
    sin: Tensor
    mask: Tensor | None  # [B, 1, S, S] bool, True where a query may look; None is plain causal


class MLA(nn.Module):
    """Latent attention; parameters carry the published names and row orders.

    packs: whether its output may be kept in 12 bits (not under activation checkpointing, which keeps nothing).
    """

    def __init__(
        self,
        cfg: ModelConfig,
        remake: bool = False,
        place: Place = DEFAULT,
        packs: bool = True,
    ) -> None:
        super().__init__()
        self.cfg, self.remake, self.heads = cfg, remake, cfg.num_attention_heads
        self.scale = softmax_scale(cfg)
        d, rank = cfg.hidden_size, cfg.q_lora_rank
        query_rows = self.heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)
        if rank is None:
            self.q_proj = Linear(d, query_rows, place, "q_proj")
        else:
            self.q_a_proj = Linear(d, rank, place, "q_a_proj")
            self.q_a_layernorm = RMSNorm(rank, cfg.rms_norm_eps, remake, place, feeds=("q_b_proj",))
            self.q_b_proj = Linear(rank, query_rows, place, "q_b_proj")
        key_value_rows = self.heads * (cfg.qk_nope_head_dim + cfg.v_head_dim)
        down = cfg.kv_lora_rank + cfg.qk_rope_head_dim
        self.kv_a_proj_with_mqa = Linear(d, down, place, "kv_a_proj_with_mqa")
        self.kv_a_layernorm = RMSNorm(cfg.kv_lora_rank, cfg.rms_norm_eps, remake, place, feeds=("kv_b_proj",))
        self.kv_b_proj = Linear(cfg.kv_lora_rank, key_value_rows, place, "kv_b_proj")
        self.o_proj = Linear(self.heads * cfg.v_head_dim, d, place, "o_proj")
        self.packs = packs and place.recipe is not None and Packed.fits(self.heads * cfg.v_head_dim)

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
        mixed, packed = attend_packed(q, k, v, self.scale, layout.mask, again, self.packs)
        mixed = mixed.reshape(h.value.shape[0], -1)
        out = self.o_proj(mixed if packed is None else Operand(mixed, columns=packed.columns()))
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
    return attend_packed(q, k, v, scale, mask, again, pack=False)[0]


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, again: Remade | None, pack: bool
) -> tuple[Tensor, Packed | None]:
    """`attend`; with `pack` its backward keeps the output in 12 bits, which the caller gets too."""
    pack = pack and torch.is_grad_enabled()
    saved = _Dropped((q, k, v), again, pack)
    with saved:
        if q.is_cuda:
            with sdpa_kernel(_backends(q.dtype, mask), set_priority=True):
                whole = _core(q, k, v, scale, mask)
        else:
            # Torch's blocked CPU kernel wants equal head dims; zero columns of v cost less than its fallback (12
            # against 23 ms at batch 8, 256 tokens, 4 heads of 48/32, two cores).
            padded = F.pad(v, (0, q.shape[-1] - v.shape[-1])) if q.shape[-1] > v.shape[-1] else v
            whole = _core(q, k, padded, scale, mask)
    out = whole[..., : v.shape[-1]]
    if not pack:
        return out, None
    packed = Packed(out.reshape(out.shape[0] * out.shape[1], -1))
    shape, filled = out.shape, whole.shape[-1] - out.shape[-1]
    saved.replace(whole, lambda: F.pad(packed().view(shape), (0, filled)))
    return out, packed


def _core(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # views: the kernels take strides
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale).transpose(1, 2)


def _backends(dtype: torch.dtype, mask: Tensor | None) -> list[SDPBackend]:
    """Best first. Measured on H100, forward + backward at 192/128: cuDNN 440-450 TFLOP/s, memory-efficient 60.

    The memory-efficient kernel serves what cuDNN does not: a mask, and deterministic mode
    (torch.use_deterministic_algorithms), in which its backward runs without atomics while cuDNN's is refused. FP32 gets
    plain products: that kernel multiplies FP32 in TF32 (gradients off by up to 6e-3 on H200, plainly 3e-6).
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return [SDPBackend.MATH]
    slow = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    fast = mask is None and not torch.are_deterministic_algorithms_enabled()
    return [SDPBackend.CUDNN_ATTENTION, *slow] if fast else slow


class _Dropped(saved_tensors_hooks):
    """Within the block, autograd saves a place holder for each of `tensors` instead of the tensor; with `replaceable`
    what else it saved may be exchanged afterwards. Does nothing with neither, nor without gradients."""

    def __init__(self, tensors: tuple[Tensor, ...], again: Remade | None, replaceable: bool) -> None:
        self.again = again if torch.is_grad_enabled() else None
        self.active, self.replaceable = self.again is not None or replaceable, replaceable
        self.places = {_identity(tensor.transpose(1, 2)): index for index, tensor in enumerate(tensors)}
        self.others: list[list[Callable[[], Tensor]]] = []
        super().__init__(self._pack, lambda saved: saved[0]())

    def __enter__(self) -> None:
        if self.active:
            super().__enter__()

    def __exit__(self, *exc: object) -> None:
        if self.active:
            super().__exit__(*exc)

    def _pack(self, tensor: Tensor) -> list[Callable[[], Tensor]]:
        index = self.places.get(_identity(tensor))
        if self.again is None or index is None:
            kept: list[Callable[[], Tensor]] = [Kept(tensor)]  # detached: itself, it would tie the output to its graph
            if self.replaceable:  # else this object, which is in a cycle, would hold it until the next collection
                self.others.append(kept)
            return kept
        source = self.again.reserve()
        return [lambda: source()[index].transpose(1, 2)]

    def replace(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        """Let backward find make() [B, S, H, d] where `tensor` was saved, if it was."""
        wanted = _identity(tensor.transpose(1, 2))
        for saved in self.others:
            kept = saved[0]
            if isinstance(kept, Kept) and _identity(kept.value) == wanted:
                saved[0] = lambda: make().transpose(1, 2)
        self.others.clear()


def _identity(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.shape, tensor.stride()
