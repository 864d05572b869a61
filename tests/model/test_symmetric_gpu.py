"""Experts over ranks that share the memory of GPUs: the bits of all-to-all, no wait of the host, no endless kernel.

Ranks have a GPU each where there are as many, else they share one (`shared_gpu`). A block's products see more rows than
with all-to-all, filled up to the bound, for which a library may choose another kernel: there the tolerance is a
rounding's, while the exchange itself is compared to the bit.
"""

from functools import partial

import pytest
import shared_gpu
import small_model as small
import test_symmetric
import torch
from expert_ranks import CFG, Case, forward_and_backward, layout_of, share, tokens
from test_exchange_gpu import _sync_mode

from deepv3.config.schema import Config
from deepv3.dist import init_distributed
from deepv3.model.node_exchange import make_dispatch
from deepv3.model.symmetric import Extent
from deepv3.precision.recipe import V3, Recipe
from deepv3.train import exchange_bench

pytestmark = pytest.mark.gpu

run = partial(shared_gpu.run, fresh=True)

TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp8": 2e-2}


def start(case: Case):
    """The rank's grid, and a dispatcher of each kind."""
    cfg = Config()
    cfg.parallel.ep_size = case.world
    grid = init_distributed(cfg)
    dtype = torch.float32 if case.dtype == "fp32" else torch.bfloat16
    extent = Extent(test_symmetric.MOST, case.cfg.hidden_size, CFG.num_experts_per_tok, dtype)
    options = (CFG.n_routed_experts, case.world, case.recompute == "full", recipe_of(case))
    return grid, make_dispatch(grid, *options), make_dispatch(grid, *options, extent)


def recipe_of(case: Case) -> Recipe | None:
    return Recipe(V3) if case.dtype == "fp8" else None


def build(case: Case, dispatcher):
    dtype = torch.float32 if case.dtype == "fp32" else torch.bfloat16
    options = {"recompute": case.recompute, "dispatcher": dispatcher, "recipe": recipe_of(case)}
    return small.build(case.cfg, dtype=dtype, **options).to(case.device)


def _both(case: Case):
    """The block's values and gradients by both dispatchers, and the loads."""
    grid, *dispatchers = start(case)
    x, end = (share(case, grid.rank, tokens(case, seed)) for seed in (0, 1))
    found = []
    for dispatcher in dispatchers:
        found += [forward_and_backward(build(case, dispatcher), x.clone(), end.clone()), dispatcher.take_load()]
    return found


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_rounds_with_empty_ranks_and_skew_equal_all_to_all(world, dtype):
    assert all(run(world, test_symmetric.exchanges, 5, 12, 60.0, 256, dtype))


@pytest.mark.parametrize(
    "case",
    [
        Case(2, dtype="bf16", device="cuda"), Case(4, dtype="bf16", device="cuda", recompute="selective"),
        Case(2, dtype="fp32", device="cuda", recompute="full"), Case(4, dtype="fp32", device="cuda"),
        Case(2, dtype="fp8", device="cuda"), Case(4, dtype="fp8", device="cuda", recompute="selective"),
    ],
    ids=str,
)  # fmt: skip
def test_a_block_computes_what_it_does_with_all_to_all(case):
    for portable, load, shared, other in run(case.world, _both, case):
        assert load == other and torch.equal(portable["counts"], shared["counts"])
        for name, expected in portable.items():
            far = small.distance(shared[name].double(), expected.double())
            assert far <= TOLERANCE[case.dtype], f"{name}: {far:.1e}"


def _rounds(case: Case, times: int):
    """The same forward and backward again and again, without stopping in between; how many differ from the first, in
    any bit forward, in more than a rounding backward, where attention adds in any order."""
    grid, _, dispatcher = start(case)
    model = build(case, dispatcher)
    x, end = (share(case, grid.rank, tokens(case, seed)).to(torch.bfloat16) for seed in (0, 1))
    block, layout, found = model.block(1), layout_of(model, x), []
    for _ in range(times):
        leaf = x.clone().requires_grad_()
        out, _ = block(leaf, layout)
        out.backward(end)
        found.append((out.detach(), leaf.grad))
    first, gradient = found[0]
    far = (small.distance(dx.double(), gradient.double()) for _, dx in found)
    return sum(not (torch.equal(y, first) and d <= 5e-3) for (y, _), d in zip(found, far))


@pytest.mark.parametrize("world", [2, 4])
def test_twenty_rounds_without_a_stop_are_twenty_times_the_same(world):
    """A slot written too early or read too late would show in some of them."""
    assert run(world, _rounds, Case(world, dtype="bf16", device="cuda"), 20) == [0] * world


def _waits(case: Case):
    """Nothing but the look of `work` waits, and that is an event of its own."""
    grid, _, dispatcher = start(case)
    model = build(case, dispatcher)
    x, end = (share(case, grid.rank, tokens(case, seed)) for seed in (0, 1))
    forward_and_backward(model, x.clone(), end.clone())  # compiles kernels, makes the tables of addresses
    forward_and_backward(model, x.clone(), end.clone())
    block, layout = model.block(1), layout_of(model, x)
    x = x.to(torch.bfloat16).requires_grad_()
    with _sync_mode("error"):
        out, _ = block(x, layout)
        out.sum().backward()
    return True


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_the_host_waits_for_nothing_but_the_look_behind_the_experts(dtype):
    assert all(run(2, _waits, Case(2, dtype=dtype, device="cuda")))


def test_a_peer_that_stays_away_is_named_and_the_kernel_ends():
    (said, seconds), _ = run(2, test_symmetric.peer_stays_away, 2.0)
    assert said == "ranks [1] of the expert group were not heard of for 2 s" and seconds < 60


def test_shared_memory_is_timed_where_each_rank_has_a_gpu():
    world = min(4, torch.cuda.device_count())
    if world < 2:  # ranks that take turns on a device have no bandwidth worth a number: only that it runs
        text = run(2, exchange_bench.report, 1, 256)[0]
    else:
        text = run(world, exchange_bench.report, 5)[0]
    print(text)
    assert text.count("| symmetric |") == 4
