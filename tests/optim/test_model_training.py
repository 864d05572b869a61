"""The real model under the engine: data parallel equals plain training, a resumed run the uninterrupted one."""

import pytest
import ranks
import torch
from standin import same, whole

from deepv3.checkpoint import store
from deepv3.config.schema import Config, ModelConfig
from deepv3.dist import init_distributed
from deepv3.kernels.reference import adamw as plain
from deepv3.model.transformer import build_model
from deepv3.optim.engine import build_engine

BATCH, SEQ, LR = 4, 12, 1e-2


def _config(precision: str) -> Config:
    cfg = Config(seed=5)
    cfg.model = ModelConfig(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=40,
        moe_intermediate_size=8,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=2,
        q_lora_rank=12,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    cfg.precision.name = precision
    cfg.optim.clip_norm = 0.2
    cfg.optim.moment_dtype = "float32" if precision == "fp32" else "bfloat16"
    return cfg


def _batch(step: int, sample: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + sample)
    return torch.randint(97, (1, SEQ + 2), generator=generator)


def _train(precision, steps, run_dir=None, resume=False):
    """On a rank: `steps` steps with bias updates; saves at the end where a folder is given."""
    cfg = _config(precision)
    grid = init_distributed(cfg)
    model = build_model(cfg, grid.device)
    engine = build_engine(model, cfg, grid)
    done, objectives, norms = 0, [], []
    if resume:
        done = store.load(store.newest(run_dir, grid), engine, model, None, grid)["done"]
    for step in range(done + 1, done + steps + 1):
        engine.begin_step()
        counts, objective = 0, 0.0
        for sample in range(grid.dp_rank, BATCH, grid.dp_size):
            out = model(_batch(step, sample), loss_scale=1 / (BATCH * SEQ), mtp_weight=0.3)
            out.objective.backward()
            counts, objective = counts + out.counts.double(), objective + out.objective.item()
        stats = engine.finish_step(LR)
        model.update_biases(grid.sum_over_world(counts), 0.001)
        objectives.append(objective)
        norms.append(stats.norm.item())
    if run_dir and not resume:
        store.save(run_dir, done + steps, engine, model, None, grid, cfg, {"done": done + steps})
    state: dict = {}
    for f in engine.fragments():
        state.setdefault(f.name, {})[f.lo] = {
            kind: getattr(f, kind).clone() for kind in ("master", "exp_avg", "exp_avg_sq")
        }
    return state, {n: b.clone() for n, b in store.persistent_buffers(model).items()}, objectives, norms


def _plain(cfg: Config, steps: int, replicas: int):
    """The same without engine or shards, replica by replica. Returns masters and moments, buffers, norms."""
    model = build_model(cfg, "cpu")
    params = dict(model.named_parameters())
    state = {
        name: {"master": p.detach().flatten().clone()} | {k: torch.zeros(p.numel()) for k in ("exp_avg", "exp_avg_sq")}
        for name, p in params.items()
    }
    norms = []
    for step in range(1, steps + 1):
        total = {name: torch.zeros(p.numel()) for name, p in params.items()}
        counts = 0
        for replica in range(replicas):
            for p in params.values():
                p.main_grad, p.grad_ready = torch.zeros(p.shape), False
            for sample in range(replica, BATCH, replicas):
                out = model(_batch(step, sample), loss_scale=1 / (BATCH * SEQ), mtp_weight=0.3)
                out.objective.backward()
                counts = counts + out.counts.double()
            for name, p in params.items():
                total[name] += p.main_grad.flatten()
        norm = sum(t.double().square().sum() for t in total.values()).sqrt().float()
        norms.append(norm.item())
        scale = torch.clamp(cfg.optim.clip_norm / (norm + 1e-6), max=1.0)
        for name, p in params.items():
            decay = cfg.optim.weight_decay if p.ndim > 1 else 0.0
            s, o = state[name], cfg.optim
            moments = s["exp_avg"], s["exp_avg_sq"]
            plain.adamw_(s["master"], total[name], *moments, None, LR, o.beta1, o.beta2, o.eps, decay, step, scale)
            p.data = s["master"].view(p.shape).clone()
        model.update_biases(counts, 0.001)
    return state, {n: b.clone() for n, b in store.persistent_buffers(model).items()}, norms


@pytest.mark.parametrize("world", [1, 2])
def test_the_model_under_the_engine_equals_plain_training_bit_for_bit(world):
    results = ranks.run(world, _train, "fp32", 3)
    state, buffers, norms = _plain(_config("fp32"), 3, world)
    assert same(whole([r[0] for r in results]), state)
    assert all(same(r[1], buffers) and r[3] == norms for r in results)
    assert min(norms) > _config("fp32").optim.clip_norm


def test_every_parameter_of_the_model_gets_a_gradient():
    moments = whole([ranks.run(1, _train, "fp32", 1)[0][0]])
    assert all(kinds["exp_avg"].count_nonzero() > 0 for kinds in moments.values())


@pytest.mark.parametrize("world", [1, 2])
def test_losses_norms_and_biases_of_a_resumed_run_are_the_uninterrupted_ones(tmp_path, world):
    through = ranks.run(world, _train, "bf16", 4)
    ranks.run(world, _train, "bf16", 2, tmp_path)
    resumed = ranks.run(world, _train, "bf16", 2, tmp_path, True)
    for a, b in zip(through, resumed):
        assert same(a[0], b[0]) and same(a[1], b[1])
        assert (a[2][2:], a[3][2:]) == (b[2], b[3])
