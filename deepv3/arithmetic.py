"""Parameters and FLOPs of a model in closed form; torch-free, read by the MFU row, the planner and the tests.

Every figure is a function of ModelConfig alone and is held against the model built on the meta device and against the
published 671B numbers. Nothing of the optimizer or of a parallel layout is counted here.

Conventions: a multiply-add is 2 FLOPs; backward is twice forward; norms, softmax, RoPE, SwiGLU and the router's top-k
are left out, as usual; recompute is left out, because MFU counts useful work only. Router biases are state, not
parameters.
"""

from dataclasses import dataclass

from deepv3.config.schema import ModelConfig


@dataclass(frozen=True)
class Block:
    """Parameters of the pieces of one layer."""

    attention: int  # MLA with its latent norms
    attention_norms: int  # of those, the latent norms' gains
    norms: int  # the two norms before attention and feed-forward
    dense: int  # SwiGLU of a dense layer
    expert: int  # one routed expert
    shared: int  # all shared experts together
    router: int  # the gate's matrix

    def moe(self, experts: int) -> int:
        """A MoE feed-forward of which ``experts`` routed experts are counted."""
        return self.router + self.shared + experts * self.expert


def block(m: ModelConfig) -> Block:
    """Sizes of one layer's pieces (spec of the shapes: V3 2.1, released names)."""
    d, heads, qk = m.hidden_size, m.num_attention_heads, m.qk_nope_head_dim + m.qk_rope_head_dim
    if m.q_lora_rank is None:
        query, query_norm = d * heads * qk, 0
    else:
        query, query_norm = m.q_lora_rank * (d + heads * qk), m.q_lora_rank
    key_value = d * (m.kv_lora_rank + m.qk_rope_head_dim) + m.kv_lora_rank * heads * (m.qk_nope_head_dim + m.v_head_dim)
    latent_norms = query_norm + m.kv_lora_rank
    return Block(
        attention=query + key_value + heads * m.v_head_dim * d + latent_norms,
        attention_norms=latent_norms,
        norms=2 * d,
        dense=3 * d * m.intermediate_size,
        expert=3 * d * m.moe_intermediate_size,
        shared=3 * d * m.moe_intermediate_size * m.n_shared_experts,
        router=m.n_routed_experts * d,
    )


@dataclass(frozen=True)
class Parameters:
    """Counts of a whole model. "Active" is what one token uses: num_experts_per_tok routed experts per MoE layer."""

    embedding: int  # equal to the head
    dense_layer: int
    moe_layer: int
    routed_experts: int  # of the main model, all layers
    total: int  # main model: embedding, layers, final norm, head
    active: int  # main model, head counted, embedding not (a look-up multiplies nothing)
    active_with_embedding: int
    active_without_head: int  # neither embedding nor head
    mtp: int  # MTP modules without the embedding and head they share
    mtp_active: int  # the same with the active experts only

    @property
    def stored(self) -> int:
        """Everything that is trained and kept: main model and MTP."""
        return self.total + self.mtp


def parameters(m: ModelConfig) -> Parameters:
    """Parameter counts by part. V3: total 671,026,404,352; active 36,625,603,584; MTP 11,610,067,968."""
    b, d = block(m), m.hidden_size
    embedding, dense_layers = m.vocab_size * d, min(m.first_k_dense_replace, m.num_hidden_layers)
    moe_layers = m.num_hidden_layers - dense_layers
    dense_layer = b.attention + b.norms + b.dense
    moe_layer = b.attention + b.norms + b.moe(m.n_routed_experts)
    active_moe_layer = b.attention + b.norms + b.moe(m.num_experts_per_tok)
    joint = 2 * d * d + 3 * d  # eh_proj and the norms enorm, hnorm, norm of one MTP module
    body = d + dense_layers * dense_layer + moe_layers * active_moe_layer
    return Parameters(
        embedding=embedding,
        dense_layer=dense_layer,
        moe_layer=moe_layer,
        routed_experts=moe_layers * m.n_routed_experts * b.expert,
        total=2 * embedding + d + dense_layers * dense_layer + moe_layers * moe_layer,
        active=embedding + body,
        active_with_embedding=2 * embedding + body,
        active_without_head=body,
        mtp=m.num_nextn_predict_layers * (joint + moe_layer),
        mtp_active=m.num_nextn_predict_layers * (joint + active_moe_layer),
    )


def flops_per_token(m: ModelConfig, seq_len: int, causal: bool = True, mtp: bool = True) -> float:
    """FLOPs of forward and backward per trained token.

    seq_len: S, tokens. causal: count the half of the S x S square that the mask leaves, else all of it (the 250 GFLOP
    published for V3 are the causal count without MTP). mtp: count the MTP modules and their passes through the head.
    """
    b, count, d = block(m), parameters(m), m.hidden_size
    layers, depth = m.num_hidden_layers, m.num_nextn_predict_layers if mtp else 0
    gains = b.norms + b.attention_norms
    multiplied = count.active - d - layers * gains
    if depth:
        multiplied += count.mtp_active + depth * (count.embedding - 3 * d - gains)
    return 3 * (2.0 * multiplied + (layers + depth) * attention_flops(m, seq_len, causal))


def attention_flops(m: ModelConfig, seq_len: int, causal: bool = True) -> float:
    """FLOPs of the attention core (scores and their product with the values), forward, per token and layer."""
    square = 2.0 * seq_len * m.num_attention_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim + m.v_head_dim)
    return square / 2 if causal else square


BLOCK = 128  # elements that share one FP8 scale
SCALE = 4  # bytes of a scale


def fp8_bytes(width: int) -> int:
    """A row in E4M3 with an FP32 scale per 128 elements: 7168 -> 7392 bytes."""
    return width + -(-width // BLOCK) * SCALE


@dataclass(frozen=True)
class Wire:
    """Bytes of one token's one copy on the wire. Forward dispatch and backward of combine carry the dispatch format."""

    dispatch: int  # a token to an expert's rank, and in backward its output's gradient
    combine: int  # an expert's output back, and in backward the input's gradient: BF16 (V3 3.3.3)
    boundary: int  # between pipeline stages, either way


def wire_bytes(m: ModelConfig, precision: str) -> Wire:
    """Sizes on the wire. precision: fp32 | bf16 | fp8, the last with FP8 in dispatch only (V3 3.3.3, HW 3.2)."""
    wide = m.hidden_size * (4 if precision == "fp32" else 2)
    return Wire(fp8_bytes(m.hidden_size) if precision == "fp8" else wide, wide, wide)


def activation_bytes(m: ModelConfig, precision: str, recompute: str, moe: bool, sent: bool = True) -> dict[str, int]:
    """Bytes per token that one layer keeps from forward to backward, by part.

    precision: fp32 | bf16 | fp8 (V3 3.3.3: linear inputs E4M3, W_O's input E5M6, SwiGLU inputs E4M3). recompute:
    train.recompute. moe: expert layer or dense. sent: expert rows came from other ranks and are kept; rows of a local
    permutation are made again. V3 in FP8, selective: 156,768 bytes.
    """
    d, heads, value = m.hidden_size, m.num_attention_heads, m.v_head_dim
    width = 4 if precision == "fp32" else 2
    if recompute == "full":
        return {"residual stream": width * d}
    fp8 = precision == "fp8"
    inner = fp8_bytes if fp8 else lambda elements: width * elements
    latent = (m.q_lora_rank or 0) + m.kv_lora_rank + m.qk_rope_head_dim
    kept = {
        "residual stream": 2 * width * d,
        "latents": width * latent,
        "attention output": heads * value * 3 // 2 + heads * value // BLOCK * SCALE if fp8 else width * heads * value,
        "softmax statistics": 4 * heads,
    }
    if moe:
        per_token, width_e = m.num_experts_per_tok, m.moe_intermediate_size
        kept["router"] = 4 * m.n_routed_experts + 12 * per_token
        kept["dispatched rows"] = per_token * inner(d) if sent else 0
        kept["expert SwiGLU input"] = per_token * inner(2 * width_e)
        kept["shared SwiGLU input"] = inner(2 * width_e) * m.n_shared_experts
    else:
        kept["dense SwiGLU input"] = inner(2 * m.intermediate_size)
    if recompute == "none":
        kept["norm outputs"] = inner(d) * 2 + inner(latent - m.qk_rope_head_dim)
        kept["queries, keys, values"] = width * heads * (2 * (m.qk_nope_head_dim + m.qk_rope_head_dim) + value)
    return kept


def kv_cache_bytes(m: ModelConfig) -> int:
    """Bytes per token of the latent cache in BF16 over all main layers: V3 70,272 (HW Table 1)."""
    return 2 * (m.kv_lora_rank + m.qk_rope_head_dim) * m.num_hidden_layers


def flops_by_part(m: ModelConfig, seq_len: int, causal: bool = True) -> dict[str, float]:
    """`flops_per_token` by what multiplies: the parts sum to it, with MTP as a part of its own."""
    b, count, d = block(m), parameters(m), m.hidden_size
    dense = min(m.first_k_dense_replace, m.num_hidden_layers)
    moe, layers = m.num_hidden_layers - dense, m.num_hidden_layers
    whole, without = (flops_per_token(m, seq_len, causal, mtp) for mtp in (True, False))
    return {
        "attention projections": 6.0 * layers * (b.attention - b.attention_norms),
        "attention scores": 3.0 * layers * attention_flops(m, seq_len, causal),
        "dense feed-forward": 6.0 * dense * b.dense,
        "routed experts": 6.0 * moe * m.num_experts_per_tok * b.expert,
        "shared experts": 6.0 * moe * b.shared,
        "router": 6.0 * moe * m.n_routed_experts * d,
        "head": 6.0 * count.embedding,
        "MTP": whole - without,
    }


def buffer_bytes(
    m: ModelConfig,
    tokens: int,
    ep_size: int,
    precision: str,
    nodes: int = 1,
    reached: tuple[float, float] | None = None,
) -> dict[str, float]:
    """Bytes that one layer's dispatch of one micro-batch takes on one rank, by buffer; combine's are no larger.

    tokens: of the micro-batch, T. nodes: that the ep_size ranks lie on, N. reached: nodes and ranks that a token goes
    to on average; None is the worst case, when all tokens of all P ranks choose experts here. Copies, mean and worst:

        sent      T reached nodes or, inside the node, ranks     T max(min(K, N), N min(K, P/N))
        landed    T reached nodes; none for N = 1                T N
        received  T reached ranks                                T P
        rows      T K                                            T P min(K, E/P)

    A copy takes its row and, but for `rows`, K gates (FP32) and choices (int32). What is received is kept for backward.
    """
    top_k, held = m.num_experts_per_tok, m.n_routed_experts // ep_size
    if reached is None:
        fanned = nodes * min(top_k, ep_size // nodes)
        sent, landed = float(max(min(top_k, nodes), fanned)), float(nodes)
        received, rows = float(ep_size), float(ep_size * min(top_k, held))
    else:
        landed, received = reached
        sent, rows = max(reached), float(top_k)
    wire = wire_bytes(m, precision)
    copy = wire.dispatch + 8 * top_k
    return {
        "sent": tokens * sent * copy,
        "landed": tokens * landed * copy if nodes > 1 else 0.0,
        "received": tokens * received * copy,
        "rows": tokens * rows * wire.dispatch,
    }


def slot_bytes(m: ModelConfig, tokens: int, ep_size: int, precision: str) -> float:
    """Bytes that `parallel.dispatcher = symmetric` holds on one rank throughout: two buffers of P slots of T rows in
    the model's format, each row with a record of its scales, K gates and K choices, filled up to 64 bytes."""
    record = 4 * (-(-m.hidden_size // 128) + 2 * m.num_experts_per_tok)
    row = m.hidden_size * (4 if precision == "fp32" else 2)
    return 2.0 * ep_size * tokens * (row + -(-record // 64) * 64)
