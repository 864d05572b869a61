"""The model with a cache of latents: a token costs one pass over itself, not over everything before it (V3 2.1.1).

Kept per token and layer: the normed key-value latent and the rotated shared key, kv_lora_rank + qk_rope_head_dim values
(V3: 512 + 64 = 576), instead of 128 heads x (192 + 128). Two forms of the same attention:

    prefill   positions 0, 1, 2 ... of every row at once: the training form, keys and values of all heads are made
    decode    a few positions anywhere: queries enter the latent space instead (V2 2.1.2, "absorbed"),
                  q_i . k_i = (W_UK,i^T q_C,i) . c + q_R,i . k_R        o_i = W_UV,i (sum_j p_ij c_j)
              so that all heads read the same 576 values a token: one query matrix [heads x positions, 576]

Rows of a batch may stand at different positions. Places past a row's end hold rubbish that no mask shows and that the
next write covers, so prompts are padded on the right, and taking tokens back means forgetting that they were there.

Given up: the model lies on one device whole, and a prompt is prefilled in one go, not in pieces.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import deepv3.kernels as kernels
from deepv3.model.block import Block
from deepv3.model.mla import MLA, attend
from deepv3.model.moe import MoE
from deepv3.model.rope import assemble_key, rotate_query
from deepv3.model.transformer import Transformer
from deepv3.precision.saved import Operand


class Span(NamedTuple):
    """The n positions that one call computes in each of B rows, shared by all layers."""

    batch: int
    slots: Tensor  # [B, n] int64, where their latents go; the last slot of the cache takes those nobody needs
    cos: Tensor  # [B * n, rope / 2] FP32
    sin: Tensor
    reach: int  # cached positions looked at, the largest position + 1
    mask: Tensor | None  # [B, 1, heads * n, reach] bool, True where a query may look; None is the prefill form


class CachedModel:
    """`model` with room for the latents of `batch` rows of up to `capacity` tokens.

    latents: [main and MTP blocks, B, capacity + 1, kv_lora_rank + qk_rope_head_dim], in the model's format, zeros first
    (a masked place still enters a sum with factor 0). mtp: with the prediction modules' own blocks.
    """

    def __init__(self, model: Transformer, batch: int, capacity: int, mtp: bool = False) -> None:
        cfg = model.cfg
        self.model, self.capacity = model, capacity
        self.depths = model.depths() if mtp else []
        weight = next(model.parameters())
        width, blocks = cfg.kv_lora_rank + cfg.qk_rope_head_dim, len(model.layers) + len(self.depths)
        self.latents = weight.new_zeros(blocks, batch, capacity + 1, width)
        self.cos, self.sin = model.rotary(1, capacity, weight.device)

    def prefill(self, length: int) -> Span:
        """Positions 0 ... length - 1 of every row."""
        batch = self.latents.shape[1]
        positions = torch.arange(length, device=self.latents.device).expand(batch, -1)
        return self._span(positions, length, None)

    def decode(self, start: Tensor, count: int) -> Span:
        """Positions start[b] ... start[b] + count - 1 of row b. Those outside 0 ... capacity - 1 come out as rubbish
        and leave nothing behind."""
        positions = start[:, None] + torch.arange(count, device=start.device)
        reach = min(int(positions.max()) + 1, self.capacity)
        seen = torch.arange(reach, device=start.device) <= positions.clamp(min=0)[:, :, None]
        mask = seen.repeat_interleave(self.model.cfg.num_attention_heads, dim=1)[:, None]
        return self._span(positions, reach, mask)

    def _span(self, positions: Tensor, reach: int, mask: Tensor | None) -> Span:
        outside = (positions < 0) | (positions >= self.capacity)
        rows = positions.masked_fill(outside, 0).flatten()
        slots = positions.masked_fill(outside, self.capacity)
        return Span(positions.shape[0], slots, self.cos[rows], self.sin[rows], reach, mask)

    @torch.no_grad()
    def trunk(self, tokens: Tensor, span: Span) -> Tensor:
        """Main model up to its final norm. tokens: [B, n] at the span's positions. Returns [B, n, D]."""
        x = self.model.embed_tokens(tokens)
        for index in range(len(self.model.layers)):
            x = _block(self.model.block(index), x, self.latents[index], span)
        return self.model.norm(x).view(*tokens.shape, -1)

    @torch.no_grad()
    def predict(self, depth: int, tokens: Tensor, hidden: Tensor, span: Span) -> Tensor:
        """Prediction module `depth` = 1, 2 ... tokens: [B, n], those `depth` places ahead of the span's positions;
        hidden: [B, n, D], the previous depth's output. Returns its own, [B, n, D]."""
        module = self.depths[depth - 1]
        joined = torch.cat((module.enorm(self.model.embed_tokens(tokens)), module.hnorm(hidden.flatten(0, 1))), dim=-1)
        x = _block(module.block, module.eh_proj(joined), self.latents[len(self.model.layers) + depth - 1], span)
        return module.norm(x).view(hidden.shape)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V] FP32."""
        return self.model.lm_head(hidden.flatten(0, -2)).float().view(*hidden.shape[:-1], -1)

    def keep(self, rows: Tensor) -> None:
        """Forget all rows of the batch but these. rows: int64."""
        self.latents = self.latents[:, rows]


def _block(block: Block, x: Tensor, latents: Tensor, span: Span) -> Tensor:
    """`Block.forward` with attention over the cache. x: [B * n, D]; latents: this layer's, [B, capacity + 1, W]."""
    h, x = block.input_layernorm.with_stream(x)
    u, x = block.post_attention_layernorm.with_stream(_attention(block.self_attn, h, latents, span), residual=x)
    routing = block.mlp.gate(u, u.value.shape[0]) if isinstance(block.mlp, MoE) else None
    dispatched = block.dispatch(u, routing)
    return block.combine(block.experts(dispatched), dispatched, block.shared(u, x))


def _attention(mla: MLA, h: Operand, latents: Tensor, span: Span) -> Tensor:
    """Write the span's latents, then look at all that the mask shows. h: [B * n, D], normed. Returns [B * n, D]."""
    cfg = mla.cfg
    if cfg.q_lora_rank is None:
        q = mla.q_proj(h)
    else:
        q = mla.q_b_proj(mla.q_a_layernorm.operand(mla.q_a_proj(h), cfg.latent_scale_q))
    q = rotate_query(q, mla.heads, span.cos, span.sin).view(q.shape[0], mla.heads, -1)
    latent, k_rope = mla.kv_a_proj_with_mqa(h).split((cfg.kv_lora_rank, cfg.qk_rope_head_dim), dim=-1)
    latent = mla.kv_a_layernorm.operand(latent, cfg.latent_scale_kv).value
    turned = kernels.rope_query_(k_rope[:, None].clone(), span.cos, span.sin)[:, 0]
    rows = torch.arange(span.batch, device=latents.device)[:, None]
    latents[rows, span.slots] = torch.cat((latent, turned), dim=-1).view(*span.slots.shape, -1)
    heads = _expanded(mla, q, latent, k_rope, span) if span.mask is None else _absorbed(mla, q, latents, span)
    out = mla.o_proj(heads.flatten(1))
    return out if cfg.attn_out_scale == 1.0 else out * cfg.attn_out_scale


def _expanded(mla: MLA, q: Tensor, latent: Tensor, k_rope: Tensor, span: Span) -> Tensor:
    """Training form, from position 0 on. q: [B * n, H, nope + rope]. Returns [B * n, H, v]."""
    k, v = assemble_key(mla.kv_b_proj(latent), k_rope, mla.heads, mla.cfg.qk_nope_head_dim, span.cos, span.sin)
    q, k, v = (part.unflatten(0, (span.batch, -1)) for part in (q, k, v))
    return attend(q, k, v, mla.scale, mask=None).flatten(0, 1)


def _absorbed(mla: MLA, q: Tensor, latents: Tensor, span: Span) -> Tensor:
    """Decode form. q: [B * n, H, nope + rope]. Returns [B * n, H, v].

    Values are the whole cached rows, cut afterwards: kernels want keys and values of one width.
    """
    nope, rank = mla.cfg.qk_nope_head_dim, mla.cfg.kv_lora_rank
    up = mla.kv_b_proj.weight.view(mla.heads, -1, rank)
    q = torch.cat((torch.einsum("thd,hdr->thr", q[..., :nope], up[:, :nope]), q[..., nope:]), dim=-1)
    q = q.view(span.batch, 1, -1, q.shape[-1])
    seen = latents[:, None, : span.reach]
    mixed = F.scaled_dot_product_attention(q, seen, seen, attn_mask=span.mask, scale=mla.scale)
    mixed = mixed[..., :rank].reshape(-1, mla.heads, rank)
    return torch.einsum("thr,hvr->thv", mixed, up[:, nope:])
