"""The FP8 recipe as data: tensor role -> format (V3 3.3). Weights go by the name of their module, activations by what
they are. A tensor that is no row keeps the model's format: residual stream, queries, keys, values, logits.

Every Linear multiplies in E4M3 except where the report keeps BF16: embedding, head, gate. eh_proj, of which it says
nothing, is BF16 as in the released weights. Norms and the attention core have no matrix. Power-of-two scales are where
a tensor is quantised again along its other dimension.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from deepv3.config.schema import Config, ModelConfig
from deepv3.kernels.reference.quantise import BLOCK
from deepv3.precision.formats import BF16, E5M6, SQUARES, TILES, TILES_POW2, Format

INPUT, EXPERT_INPUT = "input of a linear map", "input of experts, on the wire too"
SWIGLU_INPUT, SWIGLU_OUTPUT = "input of SwiGLU, kept", "output of SwiGLU"
ATTENTION_OUTPUT = "output of attention, kept"
GRADIENT, COMBINE_GRADIENT = "gradient of an output", "gradient of the experts' sum, on the wire too"

V3: Mapping[str, Format] = {
    "q_proj": SQUARES, "q_a_proj": SQUARES, "q_b_proj": SQUARES, "kv_a_proj_with_mqa": SQUARES, "kv_b_proj": SQUARES,
    "o_proj": SQUARES, "gate_up_proj": SQUARES, "down_proj": SQUARES,
    "embed_tokens": BF16, "lm_head": BF16, "gate": BF16, "eh_proj": BF16,
    INPUT: TILES,
    EXPERT_INPUT: TILES_POW2,  # row blocks on the wire, column blocks for Wgrad
    SWIGLU_INPUT: TILES_POW2,
    SWIGLU_OUTPUT: TILES,
    ATTENTION_OUTPUT: E5M6,  # attention's backward is sensitive to it; Wgrad of o_proj reads it by columns
    GRADIENT: TILES,
    COMBINE_GRADIENT: TILES_POW2,
}  # fmt: skip

# `block_gradients` is the mistake that the report warns of (V3 B.2): one scale for the gradients of 128 tokens, some of
# which have outliers. It exists to be seen failing.
RECIPES: Mapping[str, Mapping[str, Format]] = {
    "v3": V3,
    "block_gradients": {**V3, GRADIENT: SQUARES, COMBINE_GRADIENT: BF16},
}


class Result(NamedTuple):
    """What a norm makes: codes in this format, and its value in BF16 where somebody needs it."""

    format: Format
    value: bool


@dataclass(frozen=True)
class Recipe:
    """The table of one run."""

    formats: Mapping[str, Format]
    align: int = BLOCK  # rows of an expert are filled up to a multiple: column blocks must not span two

    def __getitem__(self, role: str) -> Format:
        return self.formats[role]

    def fp8(self, role: str) -> bool:
        """Whether products with this weight are FP8."""
        return self.formats[role] != BF16

    def norm_result(self, feeds: tuple[str, ...]) -> Result | None:
        """What a norm makes for the weights it feeds; None where no product of theirs is FP8."""
        wants = [self.fp8(role) for role in feeds]
        if not any(wants):
            return None
        return Result(self[EXPERT_INPUT if "gate" in feeds else INPUT], not all(wants))


def recipe_of(cfg: Config) -> Recipe | None:
    """The run's recipe; None where nothing is FP8."""
    precision = cfg.precision
    if precision.name != "fp8":
        return None
    formats = dict(RECIPES[precision.recipe])
    for role, width in _key_value_widths(cfg.model).items():
        if width < precision.break_even:
            formats[role] = BF16
    return Recipe(formats)


def _key_value_widths(m: ModelConfig) -> dict[str, float]:
    """in x out / (in + out) of the key-value projections: FLOPs of their product per element quantised for it."""
    down = m.hidden_size, m.kv_lora_rank + m.qk_rope_head_dim
    up = m.kv_lora_rank, m.num_attention_heads * (m.qk_nope_head_dim + m.v_head_dim)
    return {role: a * b / (a + b) for role, (a, b) in {"kv_a_proj_with_mqa": down, "kv_b_proj": up}.items()}
