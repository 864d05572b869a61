"""FP8 in the released format: E4M3 matrices in blocks of 128 x 128, an FP32 scale each, named ``<weight>_scale_inv``.

weight = code * scale, scale = amax(block) / 448; the format calls the multiplier an inverse. The quantiser is the
kernels', from the FP32 masters (FP8 training itself quantises the BF16 weights, docs/numerics.md). Quantised are the
matrices of attention and feed-forward, those of the MTP layers included; embeddings, heads, routers and eh_proj stay
BF16, as in the release.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from deepv3.config.schema import ModelConfig
from deepv3.errors import ConfigError
from deepv3.kernels import quantise_blocks
from deepv3.kernels.reference.quantise import BLOCK, dequantise_blocks

__all__ = ["BLOCK", "dequantise_blocks", "is_quantised", "quantise", "require_blockable"]
SCALE_SUFFIX = "_scale_inv"
KEPT = ("embed_tokens.weight", "head.weight", "eh_proj.weight", "mlp.gate.weight")  # matrices that stay BF16
QUANTIZATION_CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}


def is_quantised(name: str, shape: Sequence[int]) -> bool:
    """Whether their tensor `name` is stored in FP8."""
    return len(shape) == 2 and not name.endswith(KEPT)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: [R, C] FP32. Returns E4M3 codes [R, C] and FP32 scales [ceil(R / 128), ceil(C / 128)]."""
    codes, scales, *_ = quantise_blocks(weight)
    return codes, scales.contiguous()


def require_blockable(cfg: ModelConfig) -> None:
    """Raise ConfigError for sizes that FP8 readers cannot cut into blocks.

    Activations are quantised 1 x 128 along every matrix's input, and engines lay gate above up and q_a above kv_a, so
    each of these widths must be whole blocks. The rows of kv_a, q_b and kv_b may end inside one (V3's kv_a has 576).
    """
    widths = {"model.hidden_size": cfg.hidden_size, "model.kv_lora_rank": cfg.kv_lora_rank}
    widths |= {"model.num_attention_heads x model.v_head_dim": cfg.num_attention_heads * cfg.v_head_dim}
    if cfg.q_lora_rank is not None:
        widths["model.q_lora_rank"] = cfg.q_lora_rank
    if cfg.first_k_dense_replace:
        widths["model.intermediate_size"] = cfg.intermediate_size
    widths["model.moe_intermediate_size"] = cfg.moe_intermediate_size
    ragged = [
        f"{name} = {width} = {width // BLOCK} x {BLOCK} + {width % BLOCK}"
        for name, width in widths.items()
        if width % BLOCK
    ]
    if ragged:
        raise ConfigError(
            f"dtype=float8 stores blocks of {BLOCK} x {BLOCK}, into which readers cannot cut {'; '.join(ragged)}: "
            f"train with multiples of {BLOCK}, or export with dtype=bfloat16"
        )
