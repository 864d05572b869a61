"""The engine against the same training written plainly, on 1, 2 and 4 ranks, and its guards."""

import gc
import os
import weakref

import deepspeed.runtime.bf16_optimizer
import pytest
import ranks
import torch
import torch.distributed as dist
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups as deepspeed_groups
from standin import BATCH, Net, config, reference, same, sample, start, whole

from deepv3.optim import engine as engines
from deepv3.optim.flat import ALIGN, GATHER

STEPS = 4


def _train(precision, moments, early=False, poison=None):
    """On a rank: STEPS steps; step 2 is poisoned on data rank `poison`."""
    run = start(config(precision, moments))
    for number in range(1, STEPS + 1):
        run.step(number, poison if number == 2 else None, early)
    return run.state(), run.weights(), run.norms, run.skips, run.engine.counters()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("precision", "moments"), [("fp32", "float32"), ("bf16", "float32"), ("bf16", "bfloat16")])
def test_data_parallel_training_equals_plain_training_bit_for_bit(world, precision, moments):
    results = ranks.run(world, _train, precision, moments)
    expected, norms = reference(config(precision, moments), STEPS, world)
    assert same(whole([state for state, *_ in results]), expected)
    for _, weights, found, skips, _ in results:
        assert found == norms and not any(skips)
        assert all(torch.equal(w.flatten(), expected[n]["master"].to(w.dtype)) for n, w in weights.items())


def test_clipping_acts_in_these_tests():
    _, norms = reference(config("fp32", "float32"), STEPS, 1)
    assert min(norms) > 2 * config().optim.clip_norm


def test_four_ranks_agree_among_themselves_and_with_plain_training():
    results = ranks.run(4, _train, "fp32", "float32")
    expected, norms = reference(config("fp32", "float32"), STEPS, 4)
    found = whole([state for state, *_ in results])
    for name, kinds in expected.items():
        torch.testing.assert_close(found[name]["master"], kinds["master"], rtol=1e-5, atol=1e-6)
    for _, weights, theirs, _, _ in results:
        assert theirs == results[0][2] == pytest.approx(norms, rel=1e-6)
        assert same(weights, results[0][1])


def test_reducing_a_chunk_early_changes_nothing():
    late, early = (ranks.run(2, _train, "bf16", "bfloat16", flag) for flag in (False, True))
    assert same(whole([state for state, *_ in late]), whole([state for state, *_ in early]))


@pytest.mark.parametrize("rank", [0, 1])
def test_nan_on_one_rank_skips_the_step_on_all(rank):
    """Nothing moves, not even AdamW's step number: the steps after it are those of a run without it."""
    results = ranks.run(2, _train, "bf16", "bfloat16", False, rank)
    expected, _ = reference(config("bf16", "bfloat16"), STEPS, 2, omit=2)
    assert same(whole([state for state, *_ in results]), expected)
    for _, _, norms, skips, counters in results:
        assert skips == [False, True, False, False]
        assert norms[1] != norms[1]
        assert counters == {"applied_steps": STEPS - 1, "skipped_steps": 1}


def _two_stages():
    cfg = config("fp32", "float32", clip_norm=1e9)
    cfg.parallel.pp_size = 2
    run = start(cfg, seed=int(os.environ["RANK"]) // 2)
    run.step(1)
    return run.norms[0]


def test_the_norm_is_the_worlds_even_where_stages_hold_different_parameters():
    """2 pipeline stages x 2 data ranks, each stage a stand-in of its own."""
    norms = ranks.run(4, _two_stages)
    single = [_single_norm(seed) for seed in (0, 1)]
    assert len(set(norms)) == 1 and norms[0] == pytest.approx((single[0] ** 2 + single[1] ** 2) ** 0.5, rel=1e-6)


def _single_norm(seed):
    model = Net(seed)
    for n in range(BATCH):
        (model(sample(1, n, torch.float32)) / BATCH).backward()
    return sum(p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None) ** 0.5


def _skip_moves_nothing():
    run = start(config())
    run.step(1)
    before = run.state(), run.weights()
    run.step(2, poison=run.grid.dp_rank)
    return same(before[0], run.state()) and same(before[1], run.weights())


def test_a_skipped_step_leaves_every_bit_in_place():
    assert ranks.run(2, _skip_moves_nothing) == [True, True]


def _collectives():
    run = start(config())
    calls = []
    for name in ("all_reduce", GATHER, "reduce_scatter_tensor", "broadcast", "all_gather"):
        real = getattr(dist, name)

        def counted(tensor, *args, _name=name, _real=real, **kwargs):
            calls.append((_name, tensor.numel()))
            return _real(tensor, *args, **kwargs)

        setattr(dist, name, counted)
    try:
        run.step(1)
    finally:
        for name in ("all_reduce", GATHER, "reduce_scatter_tensor", "broadcast", "all_gather"):
            setattr(dist, name, getattr(dist.distributed_c10d, name))
    sizes = [group.grad.numel() for group in run.engine.flat_groups]
    return calls, sizes


def test_a_step_reduces_each_buffer_once_in_fp32_and_gathers_each_once():
    calls, sizes = ranks.run(2, _collectives)[0]
    expected = [("all_reduce", size) for size in sizes] + [("all_reduce", 1)]
    assert calls == expected + [(GATHER, 2 * size) for size in sizes]  # BF16 as bytes


@pytest.fixture
def run():
    """One rank in this process."""
    from deepv3 import dist as ours

    yield start(config())
    ours.shutdown()


def test_seal_refuses_a_gradient_left_in_grad(run):
    run.model.first.weight.grad = torch.zeros_like(run.model.first.weight)
    with pytest.raises(AssertionError, match="first.weight has a .grad"):
        run.engine.finish_step(1e-3)


def test_seal_refuses_a_gradient_buffer_that_moved(run):
    run.model.norm.weight.main_grad = torch.zeros(37)
    with pytest.raises(AssertionError, match="norm.weight.main_grad no longer lies"):
        run.engine.finish_step(1e-3)


def test_seal_refuses_a_weight_that_moved(run):
    run.model.norm.weight.data = run.model.norm.weight.data.clone()
    with pytest.raises(AssertionError, match="norm.weight no longer lies"):
        run.engine.finish_step(1e-3)


def test_a_weight_gradient_written_after_the_reduction_began_is_refused(run):
    run.engine.begin_step()
    run.engine.reduce(0)
    run.model.second.weight.grad_ready = True
    with pytest.raises(AssertionError, match="second.weight: a weight gradient was written after"):
        run.engine.finish_step(1e-3)


def test_a_chunk_is_reduced_once_a_step(run):
    run.engine.reduce(0)
    with pytest.raises(AssertionError, match="reduced twice"):
        run.engine.reduce(0)


def test_an_untouched_parameter_has_no_gradient_even_after_it_had_one(run):
    run.model.unused.weight.main_grad.fill_(7.0)
    run.step(1)
    assert run.model.unused.weight.main_grad.count_nonzero() == 0


@pytest.mark.parametrize("method", ["__call__", "forward", "backward", "step"])
def test_deepspeeds_own_path_is_refused(run, method):
    with pytest.raises(AssertionError, match="call the model"):
        getattr(run.engine, method)(torch.zeros(1, 13))


def test_the_model_carries_no_hooks_of_deepspeed(run):
    assert not run.model._forward_hooks and not run.model._forward_pre_hooks


@pytest.mark.parametrize(("precision", "per_param"), [("bf16", 14), ("fp32", 12)])
def test_bytes_per_parameter_are_what_the_module_says(precision, per_param):
    """FP32: 4 weight, which is the master, 4 gradient, 2 x 2 moments."""
    from deepv3 import dist as ours

    run = start(config(precision))
    state = run.engine.optimizer.adamw.state
    held = [t for g in run.engine.flat_groups for t in (g.low, g.grad, g.master, *state[g.master].values())]
    held += [p.data for p in run.model.parameters()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    padded = sum(g.low.numel() for g in run.engine.flat_groups)
    assert sum(storages.values()) == per_param * padded
    assert padded - sum(p.numel() for p in run.model.parameters()) < ALIGN * len(list(run.model.parameters()))
    ours.shutdown()


def test_release_leaves_the_weights_alone_in_memory(run):
    run.step(1)
    weights, engine = run.weights(), run.engine
    held = [weakref.ref(t) for g in engine.flat_groups for t in (g.grad, g.master, engine.optimizer.adamw)]
    engine.release()
    gc.collect()
    assert all(ref() is None for ref in held)
    assert same(weights, run.weights())
    run.model(sample(1, 1, torch.bfloat16)).backward()
    assert run.model.first.weight.grad is not None


def test_groups_tell_matrices_gains_and_experts_apart(run):
    found = {(g.expert, g.decay): [p.name for p in g.pieces] for g in run.engine.flat_groups}
    assert found == {
        (False, True): ["first.weight", "second.weight", "unused.weight"],
        (False, False): ["norm.weight"],
        (True, True): ["mlp.experts.up.weight"],
    }
    for group in run.engine.flat_groups:
        offsets = [piece.param.main_grad.data_ptr() - group.grad.data_ptr() for piece in group.pieces]
        assert all(offset % (4 * ALIGN) == 0 for offset in offsets)


def _differing_weights():
    with pytest.raises(AssertionError, match="hold different initial weights"):
        start(config(), seed=int(os.environ["RANK"]))
    return True


def test_ranks_that_start_from_other_weights_are_refused():
    assert all(ranks.run(2, _differing_weights))


def test_the_optimizer_is_ours_for_every_precision():
    from deepv3 import dist as ours

    for precision in ("fp32", "bf16"):
        optimizer = start(config(precision)).engine.optimizer
        assert type(optimizer) is engines.ShardedOptimizer
        assert isinstance(optimizer, deepspeed.runtime.bf16_optimizer.BF16_Optimizer)
        assert {p.dtype for g in optimizer.bf16_groups for p in g} == {
            {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        }
        ours.shutdown()


def test_every_private_name_of_deepspeed_that_is_relied_on_exists():
    assert deepspeed.__version__ == "0.19.8"
    bf16 = deepspeed.runtime.bf16_optimizer.BF16_Optimizer
    assert issubclass(bf16, ZeROOptimizer)
    for name in ("_setup_for_real_optimizer", "step", "update_lp_params", "clear_lp_grads", "state_dict"):
        assert callable(getattr(bf16, name)), name
    for name in (
        "_do_optimizer_sanity_check",
        "_configure_bf16_optimizer",
        "_configure_distributed_model",
        "_cast_module_mixed_precision",
        "_broadcast_model",
        "_create_module_forward_pre_hook",
    ):
        assert callable(getattr(DeepSpeedEngine, name)), name
    assert callable(deepspeed_groups._release_process_group_references)
    run = start(config())
    for name in ("module_forward_pre_hook", "module_forward_post_hook", "param_names", "_config"):
        assert hasattr(run.engine, name), name
    assert run.engine._config.managed_gradient_accumulation is False
    assert run.engine.get_data_types() == (torch.bfloat16, torch.float32)
    assert run.engine.communication_data_type == torch.float32
    assert run.engine.gradient_average is False
    assert run.engine.zero_optimization_stage() == 1
    from deepv3 import dist as ours

    ours.shutdown()
