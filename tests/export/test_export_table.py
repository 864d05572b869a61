"""The name table against the released checkpoint's figures, and its two directions against each other."""

import math

import pytest
import torch

from deepv3.config.schema import ModelConfig
from deepv3.export.table import entries, share
from deepv3.model.transformer import Transformer

UNQUANTISED = ("embed_tokens.weight", "head.weight", "eh_proj.weight", "mlp.gate.weight")


def shapes_of(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    state = Transformer(cfg, device="meta", dtype=torch.bfloat16).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.fixture(scope="module")
def released():
    """The table of the 671B model; the schema's defaults are its architecture."""
    cfg = ModelConfig()
    return cfg, entries(shapes_of(cfg), cfg.num_hidden_layers)


def test_v3_table_has_the_released_number_of_tensors_and_elements(released):
    cfg, table = released
    assert len({entry.name for entry in table}) == len(table)
    # In closed form: 3 outside the layers; attention 7 and norms 2 a layer; dense 3; MoE gate, bias, shared 3, experts
    # 3 each; MTP 6 of its own (two of them copies).
    moe = 9 + 2 + 3 + 3 * cfg.n_routed_experts
    assert len(table) == 3 + 3 * (9 + 3) + 58 * moe + (moe + 6)
    # The release is FP8: one scale for each 128 x 128 block of every quantised matrix comes on top.
    quantised = [entry.shape for entry in table if len(entry.shape) == 2 and not entry.name.endswith(UNQUANTISED)]
    scales = sum(math.ceil(rows / 128) * math.ceil(columns / 128) for rows, columns in quantised)
    assert len(table) + len(quantised) == 91_991
    assert sum(math.prod(entry.shape) for entry in table) + scales == 684_531_386_000


def test_v3_names_are_the_released_ones(released):
    _, table = released
    shapes = {entry.name: entry.shape for entry in table}
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (129280, 7168)
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (18432, 7168)
    assert shapes["model.layers.3.self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)
    assert shapes["model.layers.3.self_attn.kv_b_proj.weight"] == (32768, 512)
    assert shapes["model.layers.60.mlp.experts.255.down_proj.weight"] == (7168, 2048)
    assert shapes["model.layers.60.mlp.gate.e_score_correction_bias"] == (256,)
    assert shapes["model.layers.61.eh_proj.weight"] == (7168, 14336)
    assert shapes["model.layers.61.embed_tokens.weight"] == shapes["model.layers.61.shared_head.head.weight"]
    assert shapes["model.layers.61.shared_head.norm.weight"] == (7168,)
    assert "model.layers.62.eh_proj.weight" not in shapes


def test_an_experts_matrices_are_neighbours_in_ascending_expert_order(released):
    _, table = released
    experts = [entry for entry in table if entry.layer == 60 and entry.expert is not None]
    names = [entry.name.split("experts.")[1] for entry in experts]
    expected = [f"{e}.{p}_proj.weight" for e in range(256) for p in ("gate", "up", "down")]
    assert names == expected


def test_every_element_of_ours_is_covered_once():
    cfg = ModelConfig(
        vocab_size=40, hidden_size=12, intermediate_size=10, moe_intermediate_size=6, num_hidden_layers=2,
        first_k_dense_replace=1, num_attention_heads=2, q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=4,
        qk_rope_head_dim=4, v_head_dim=6, n_routed_experts=4, n_shared_experts=2, num_experts_per_tok=2, n_group=1,
        topk_group=1, num_nextn_predict_layers=2,
    )  # fmt: skip
    shapes = shapes_of(cfg)
    seen = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for entry in entries(shapes, cfg.num_hidden_layers):
        if not entry.copy:
            whole = seen[entry.ours]
            part = share(whole if entry.expert is None else whole[entry.expert], entry)
            assert part.shape == entry.shape
            part += 1
    assert all((tensor == 1).all() for tensor in seen.values())


def test_gate_rows_lie_above_up_rows():
    shapes = {"layers.0.mlp.gate_up_proj.weight": (4, 3)}
    gate, up = entries(shapes, 1)
    whole = torch.arange(12.0).view(4, 3)
    assert gate.name.endswith("gate_proj.weight") and torch.equal(share(whole, gate), whole[:2])
    assert up.name.endswith("up_proj.weight") and torch.equal(share(whole, up), whole[2:])


def test_a_name_that_no_row_covers_is_refused():
    with pytest.raises(AssertionError, match="layers.0.mlp.novelty.weight"):
        entries({"layers.0.mlp.novelty.weight": (2, 2)}, 1)
