"""FP8 codes of weights: made once per step, never stale."""

import ranks
import torch
from emulated import normal
from test_linear8 import dense

import deepv3.kernels as kernels
from deepv3.config.schema import Config, ModelConfig
from deepv3.dist import init_distributed
from deepv3.model.transformer import build_model
from deepv3.optim.engine import build_engine

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    first_k_dense_replace=1, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16,
    qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
    max_position_embeddings=64, initializer_range=0.2, num_nextn_predict_layers=1,
)  # fmt: skip


def is_fresh(module) -> bool:
    """Whether the module multiplies by the codes of its weight as it is."""
    return all(torch.equal(a, b) for a, b in zip(module.fp8.codes(), kernels.quantise_blocks(module.weight.detach())))


def test_codes_are_made_at_first_use_and_then_kept():
    module = dense()
    first = module.fp8.codes()
    assert module.fp8.codes() is first and is_fresh(module)


def test_writing_the_weight_in_any_way_makes_new_codes():
    module = dense()
    for write in (
        lambda w: w.data.__setitem__(slice(None), 0.0) or setattr(w, "revision", 1),  # as a kernel does: unseen
        lambda w: w.detach().mul_(0).add_(1),
        lambda w: setattr(w, "data", normal(*w.shape, seed=9)),
    ):
        module.fp8.codes()
        write(module.weight)
        assert is_fresh(module)


def fp8_modules(model) -> list:
    return [
        module for module in model.modules() if getattr(module, "fp8", None) is not None and hasattr(module, "queue")
    ]


def _count(steps: int, micro_batches: int) -> dict:
    """On a rank: quantisations per step of training, and whether codes were fresh after steps and a load."""
    cfg = Config(model=MODEL)
    cfg.precision.name, cfg.optim.moment_dtype = "fp8", "float32"
    grid = init_distributed(cfg)
    model = build_model(cfg, grid.device)
    engine = build_engine(model, cfg, grid)
    modules, made, true = fp8_modules(model), [0], kernels.quantise_blocks

    def counted(*args):
        made[0] += 1
        return true(*args)

    kernels.quantise_blocks = counted
    rows = torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(grid.rank))
    found = {"modules": len(modules), "made": [], "fresh": []}
    try:
        for _ in range(steps):
            engine.begin_step()
            before = made[0]
            for _ in range(micro_batches):
                model(rows, 1 / 18, 0.3).objective.backward()
            engine.finish_step(1e-2)
            found["made"].append(made[0] - before)
            found["fresh"].append(all(is_fresh(module) for module in modules))
        for master in engine.masters():
            master.mul_(0.5)  # what loading a checkpoint does to them
        engine.refresh_weights()
        found["fresh"].append(all(is_fresh(module) for module in modules))
    finally:
        kernels.quantise_blocks = true
    return found


def test_each_weight_is_quantised_once_per_step_and_again_after_a_load():
    for world in (1, 2):
        for found in ranks.run(world, _count, 2, 3):
            assert found["modules"] >= 20
            assert found["made"] == [found["modules"], 0]  # `is_fresh` after the first step made the second's
            assert found["fresh"] == [True, True, True]
