"""Experts over ranks that share memory, in FP8: the bits of all-to-all, tokens and gradients of sums as codes."""

import expert_ranks
import pytest
import ranks
import torch
from test_exchange8 import CFG, RECIPE, Case, build

from deepv3.config.schema import Config
from deepv3.dist import init_distributed
from deepv3.model.node_exchange import make_dispatch
from deepv3.model.symmetric import Extent


def on_rank(case: Case):
    cfg = Config()
    cfg.parallel.ep_size = case.world
    grid = init_distributed(cfg)
    extent = Extent(2 * expert_ranks.SEQ, CFG.hidden_size, CFG.num_experts_per_tok, torch.bfloat16)
    x, end = (expert_ranks.share(case, grid.rank, expert_ranks.tokens(case, seed)) for seed in (0, 1))
    found = []
    for use in (None, extent):
        dispatcher = make_dispatch(grid, CFG.n_routed_experts, case.world, case.recompute == "full", RECIPE, use)
        found.append(expert_ranks.forward_and_backward(build(case, dispatcher), x, end))
        found.append(dispatcher.take_load())
    return found


@pytest.mark.parametrize(
    "case",
    [Case(2), Case(4, recompute="selective"), Case(4, routing="one rank"), Case(4, recompute="full", routing="unused")],
    ids=str,
)
def test_bits_are_those_of_all_to_all(case):
    for portable, load, shared, other in ranks.run(case.world, on_rank, case):
        assert load == other and load.rows % 128 == 0
        assert [name for name in portable if not torch.equal(portable[name], shared[name])] == []
