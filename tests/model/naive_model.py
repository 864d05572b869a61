"""DeepSeek-V3's forward and objective written straight from the report: loops, one tensor per expert, autograd.

An oracle for `deepv3.model` that shares no code with it or with its kernels. Weights come by their global names.
"""

import math

import torch
import torch.nn.functional as F


def norm(x, gain, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain


def rope(x, cfg):
    """x: [S, heads, width]; pairs (2j, 2j + 1) as complex numbers; angles in FP32, like every reader of the weights."""
    width = x.shape[-1]
    frequencies = 1.0 / cfg.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.arange(x.shape[0], dtype=torch.float32)[:, None] * frequencies
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turn = torch.complex(angles.cos(), angles.sin()).to(pairs.dtype)
    return torch.view_as_real(pairs * turn[:, None]).flatten(-2)


def attention(w, h, cfg, may_look):
    """h: [S, D] of one sequence; may_look: [S, S] bool (V3 Eq. 1-11)."""
    heads, nope = cfg.num_attention_heads, cfg.qk_nope_head_dim
    if cfg.q_lora_rank is None:
        q = h @ w["q_proj.weight"].T
    else:
        q = norm(h @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"], cfg.rms_norm_eps) * cfg.latent_scale_q
        q = q @ w["q_b_proj.weight"].T
    q = q.unflatten(-1, (heads, -1))
    latent, k_rope = (h @ w["kv_a_proj_with_mqa.weight"].T).split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], -1)
    latent = norm(latent, w["kv_a_layernorm.weight"], cfg.rms_norm_eps) * cfg.latent_scale_kv
    kv = (latent @ w["kv_b_proj.weight"].T).unflatten(-1, (heads, -1))
    q_rope, k_rope = rope(q[..., nope:], cfg), rope(k_rope[:, None], cfg)
    out = []
    for head in range(heads):
        query = torch.cat([q[:, head, :nope], q_rope[:, head]], -1)
        key = torch.cat([kv[:, head, :nope], k_rope[:, 0]], -1)
        scores = (query @ key.T / math.sqrt(query.shape[-1])).masked_fill(~may_look, float("-inf"))
        out.append(scores.softmax(-1) @ kv[:, head, nope:])
    return torch.cat(out, -1) @ w["o_proj.weight"].T * cfg.attn_out_scale


def swiglu(u, gate_up, down):
    gate, up = (u @ gate_up.T).chunk(2, -1)
    return (F.silu(gate) * up) @ down.T


def choose(scores, bias, cfg):
    """Experts of one token (V3 2.1.2): biased choice within the best groups."""
    choice = scores + bias
    groups = choice.view(cfg.n_group, -1)
    strength = groups.sort(descending=True).values[:, :2].sum(-1)
    open_groups = strength.argsort(descending=True)[: cfg.topk_group].tolist()
    size = groups.shape[1]
    allowed = [e for e in range(len(choice)) if e // size in open_groups]
    return sorted(allowed, key=lambda e: -choice[e].item())[: cfg.num_experts_per_tok]


def mixture(w, u, cfg):
    """u: [S, D] of one sequence. Returns output and sum_i f_i P_i (V3 Eq. 12-20)."""
    scores = torch.sigmoid(u @ w["gate.weight"].T)
    rows = []
    for t in range(u.shape[0]):
        chosen = choose(scores[t].detach(), w["gate.e_score_correction_bias"], cfg)
        total = scores[t, chosen].sum()
        y = swiglu(u[t], w["shared_experts.gate_up_proj.weight"], w["shared_experts.down_proj.weight"])
        for e in chosen:
            expert = swiglu(u[t], w["experts.gate_up_proj.weight"][e], w["experts.down_proj.weight"][e])
            y = y + cfg.routed_scaling_factor * scores[t, e] / total * expert
        rows.append(y)
    count, top = scores.shape[1], cfg.num_experts_per_tok
    best = scores.detach().topk(top).indices
    f = torch.stack([(best == e).sum() for e in range(count)]).to(scores.dtype) * (count / (top * u.shape[0]))
    p = (scores / scores.sum(-1, keepdim=True)).mean(0)
    return torch.stack(rows), (f * p).sum()


def block(w, x, cfg, index, may_look):
    x = x + attention(part(w, "self_attn."), norm(x, w["input_layernorm.weight"], cfg.rms_norm_eps), cfg, may_look)
    u, mlp = norm(x, w["post_attention_layernorm.weight"], cfg.rms_norm_eps), part(w, "mlp.")
    if index < cfg.first_k_dense_replace:
        return x + swiglu(u, mlp["gate_up_proj.weight"], mlp["down_proj.weight"]), 0.0
    y, balance = mixture(mlp, u, cfg)
    return x + y, balance


def part(weights, prefix):
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


def sequence(weights, row, cfg, documents=None):
    """One row [S + 1 + D]. Returns logits per depth, each [S, V], and the sum of balance losses over layers."""
    depths = cfg.num_nextn_predict_layers
    length = len(row) - 1 - depths
    may_look = torch.ones(length, length, dtype=torch.bool).tril()
    if documents is not None:
        may_look &= documents[:length, None] == documents[None, :length]
    embedding, head = weights["embed_tokens.weight"], weights["lm_head.weight"]
    x, balance = embedding[row[:length]], 0.0
    for index in range(cfg.num_hidden_layers):
        x, extra = block(part(weights, f"layers.{index}."), x, cfg, index, may_look)
        balance = balance + extra
    h = norm(x, weights["norm.weight"], cfg.rms_norm_eps)
    logits = [h @ head.T]
    for k in range(1, depths + 1):
        w = part(weights, f"mtp.{k - 1}.")
        e = norm(embedding[row[k : k + length]], w["enorm.weight"], cfg.rms_norm_eps)
        x = torch.cat([e, norm(h, w["hnorm.weight"], cfg.rms_norm_eps)], -1) @ w["eh_proj.weight"].T
        x, extra = block(part(w, "block."), x, cfg, cfg.num_hidden_layers + k - 1, may_look)
        h, balance = norm(x, w["norm.weight"], cfg.rms_norm_eps), balance + extra
        logits.append(h @ head.T)
    return logits, balance


def objective(weights, rows, cfg, mtp_weight, documents=None):
    """Mean objective of a batch of rows (V3 Eq. 17, 24, 25), with its parts main, mtp and balance."""
    depths = cfg.num_nextn_predict_layers
    length = rows.shape[1] - 1 - depths
    main, mtp, balance = 0.0, 0.0, 0.0
    for i, row in enumerate(rows):
        logits, extra = sequence(weights, row, cfg, None if documents is None else documents[i])
        main = main + F.cross_entropy(logits[0], row[1 : length + 1]) / len(rows)
        for k in range(1, depths + 1):
            mtp = mtp + F.cross_entropy(logits[k], row[k + 1 : k + 1 + length]) / len(rows) / depths
        balance = balance + cfg.aux_loss_alpha * extra / len(rows)
    return main + mtp_weight * mtp + balance, main, mtp, balance


def weights_of(model, dtype=torch.float64):
    """A model's parameters and biases as fresh leaves under their global names."""
    leaves = {name: p.detach().to(dtype).requires_grad_() for name, p in model.named_parameters()}
    return leaves | {name: b.to(dtype) for name, b in model.named_buffers()}
