"""The layer that is timed computes what a rank among its mirrors computes."""

import pytest
import torch

from deepv3.config.compose import compose
from deepv3.errors import ConfigError
from deepv3.model.block import Block
from deepv3.precision.linear import Place
from deepv3.train import layer_bench

TINY = ("+config=tiny", "train.micro_batch_size=2", "data.seq_len=32", "model.first_k_dense_replace=1")


def layer(*overrides: str, ranks: int = 4):
    cfg = compose([*TINY, *overrides])
    torch.manual_seed(0)
    return cfg, *layer_bench.build(cfg, ranks, torch.device("cpu"))


def test_a_rank_among_mirrors_equals_a_layer_whose_experts_repeat():
    cfg, block, layout, x, dy = layer("precision=fp32")
    whole = Block(cfg.model, 1, cfg.train.recompute, place=Place("cpu", torch.float32))
    state = block.state_dict()
    for name in ("mlp.experts.gate_up_proj.weight", "mlp.experts.down_proj.weight"):
        state[name] = state[name].repeat(4, 1, 1)
    whole.load_state_dict(state)
    mine = x.detach().clone().requires_grad_()
    expected, _ = whole(mine, layout)
    expected.backward(dy)
    for _ in range(2):  # the second time from known counts
        y = layer_bench.once(block, layout, x, dy)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(x.grad, mine.grad, rtol=1e-4, atol=1e-6)
    gradient = whole.mlp.experts.down_proj.weight.grad.unflatten(0, (4, -1)).sum(0)
    torch.testing.assert_close(block.mlp.experts.down_proj.weight.main_grad, 2 * gradient, rtol=1e-4, atol=1e-6)


def test_rows_of_a_mirrored_layer_are_those_of_a_balanced_group():
    _, block, layout, x, dy = layer("precision=fp8")
    layer_bench.once(block, layout, x, dy)
    load = block.moe.dispatcher.take_load()
    choices = x.shape[0] * block.moe.gate.cfg.num_experts_per_tok
    assert choices <= load.rows <= choices + 128 * block.moe.dispatcher.share and load.rows % 128 == 0
    assert x.shape[0] <= load.received <= choices
    assert torch.isfinite(x.grad).all()


def test_ranks_that_do_not_divide_the_experts_are_refused():
    with pytest.raises(ConfigError, match="change ranks"):
        layer(ranks=3)
