"""Experts over ranks that share memory: the bits of all-to-all, whatever the routing, the order and the bound.

On the CPU a file stands in for GPUs' memory and the references for the kernels; the protocol is the same.
"""

import dataclasses
import os
import time
from unittest import mock

import pytest
import ranks
import torch
from expert_ranks import CFG, DTYPES, SEQ, Case, build, forward_and_backward, join, one_process, share, tokens, worst
from test_exchange import _Pieces

import deepv3.kernels as kernels
from deepv3.arithmetic import slot_bytes
from deepv3.config.schema import Config
from deepv3.dist import init_distributed
from deepv3.errors import ConfigError, PeerLost
from deepv3.model import symmetric, symmetric_memory
from deepv3.model.exchange import AllToAllDispatch
from deepv3.model.node_exchange import make_dispatch
from deepv3.model.router import Routing
from deepv3.model.symmetric import Extent, SymmetricDispatch
from deepv3.precision.saved import Operand

MOST = 2 * SEQ  # tokens of a rank; some ranks have half


def start(case: Case):
    """The rank's grid, and one dispatcher of each kind."""
    cfg = Config()
    cfg.parallel.ep_size = case.world
    grid = init_distributed(cfg)
    extent = Extent(MOST, CFG.hidden_size, CFG.num_experts_per_tok, DTYPES[case.dtype])
    keep = case.recompute == "full"
    portable = make_dispatch(grid, CFG.n_routed_experts, case.world, keep)
    return grid, portable, make_dispatch(grid, CFG.n_routed_experts, case.world, keep, extent=extent)


def on_rank(case: Case, headroom: float = symmetric.HEADROOM):
    """The block's values and gradients by both, and the loads both noted."""
    grid, portable, shared = start(case)
    shared.bound = min(shared.bound, int(shared.bound * headroom / symmetric.HEADROOM))
    x, end = (share(case, grid.rank, tokens(case, seed)) for seed in (0, 1))
    found = [forward_and_backward(build(case, d), x.clone(), end.clone()) for d in (portable, shared)]
    return *found, portable.take_load(), shared.take_load()


CASES = [
    Case(2), Case(4), Case(4, dtype="fp32", recompute="selective"), Case(4, dtype="bf16"),
    Case(4, dtype="fp32", routing="one rank"), Case(4, routing="unused"), Case(2, dtype="bf16", recompute="full"),
    Case(4, dtype="fp32", recompute="full", routing="one rank"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_are_those_of_all_to_all(case):
    parts = ranks.run(case.world, on_rank, case)
    for portable, shared, load, other in parts:
        assert portable.keys() == shared.keys() and load == other
        assert [name for name in portable if not torch.equal(portable[name], shared[name])] == []
    if case.dtype == "fp64":
        assert worst(join([part[1] for part in parts]), one_process(case)) <= 1e-12


def test_more_rows_than_the_bound_are_computed_all_the_same():
    for portable, shared, load, other in ranks.run(4, on_rank, Case(4, dtype="fp32"), 0.02):
        assert load == other and load.rows > 2
        assert [name for name in portable if not torch.equal(portable[name], shared[name])] == []


# -- many micro-batches in flight --------------------------------------------------------------------------------------


def _in_flight(case: Case, order: list[int]):
    """Forwards of several micro-batches, then backwards in `order`, in pieces, by both dispatchers."""
    grid, *dispatchers = start(case)
    found = []
    for dispatcher in dispatchers:
        model = build(case, dispatcher)
        batches = [
            _Pieces(model, *(share(case, grid.rank, tokens(case, s)).to(DTYPES[case.dtype]) for s in (seed, seed + 1)))
            for seed in range(0, 2 * len(order), 2)
        ]
        for at, batch in enumerate(batches):
            batch.forward()
            if at % 2:  # the backward of the one before, between two forwards
                batches[order[at // 2]].backward()
        for index in order[len(order) // 2 :]:
            batches[index].backward()
        gradients = [parameter.grad for parameter in model.block(1).parameters()]
        found.append([*(t for b in batches for t in (b.out.detach(), b.x.grad, b.routing.counts)), *gradients])
    return found


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [1, 0, 5, 2, 4, 3]])
def test_many_micro_batches_in_flight_keep_apart(order):
    for portable, shared in ranks.run(4, _in_flight, Case(4, dtype="fp32"), order):
        assert all(torch.equal(a, b) for a, b in zip(portable, shared, strict=True))


def exchanges(seed: int, rounds: int, patience: float = 60.0, width: int = 8, dtype=torch.float32):
    """Random choices, token counts from none to all, round after round; expert e scales a row by e + 1."""
    world, most = int(os.environ["WORLD_SIZE"]), 9 * width // 8
    cfg = Config()
    cfg.parallel.ep_size = world
    grid = init_distributed(cfg)
    extent, group = Extent(most, width, 3, dtype), grid.group("ep")
    pair = [AllToAllDispatch(group, 8), SymmetricDispatch(group, 8, extent, grid.device, patience=patience)]
    generator = torch.Generator().manual_seed(seed + grid.rank)
    for number in range(rounds):
        count = 0 if (number + grid.rank) % 5 == 0 else int(torch.randint(0, most + 1, (1,), generator=generator))
        scores = torch.rand(count, 8, generator=generator) + torch.arange(8) * (number % 3)  # skewed more and more
        indices = scores.topk(3, dim=1).indices.int().to(grid.device)
        values = torch.randn(3, count, width, generator=generator).to(grid.device, dtype)
        weights = torch.rand(count, 3, generator=generator).to(grid.device)
        outcomes = [_once(dispatcher, indices, values, weights) for dispatcher in pair]
        for part, (portable, shared) in enumerate(zip(*outcomes, strict=True)):
            if part == 3 and portable.is_cuda:  # torch's sum over a row takes another order with another number of rows
                bound = 1e-5 if dtype == torch.float32 else 2e-2
                torch.testing.assert_close(portable, shared, rtol=bound, atol=bound)
                continue
            assert torch.equal(portable, shared), f"round {number}: {portable} is not {shared}"
    return True


def _once(dispatcher, indices, values, weights):
    """y, du, dbase and dweights of one round trip."""
    u, base, end = values.clone().unbind()
    u, base, weights = (t.clone().requires_grad_() for t in (u, base, weights))
    arrived = dispatcher.dispatch(Operand(u), routing_of(indices, weights, 8))
    held = dispatcher.held(8)

    def experts(rows):
        ends = rows.offsets.tolist()
        scale = torch.zeros(rows.rows.value.shape[0], device=u.device)
        for expert, first, end in zip(held, [0, *ends], ends):
            scale[first:end] = expert + 1
        return rows.rows.value * (scale * rows.gates)[:, None].to(u.dtype)

    y = dispatcher.combine(dispatcher.work(arrived, experts), arrived, base)
    y.backward(end)
    return y.detach(), u.grad, base.grad, weights.grad


def routing_of(indices, weights, experts):
    """As a router gives it, as far as a dispatcher over ranks reads it."""
    counts = torch.bincount(indices.flatten().long(), minlength=experts).int()
    none = counts.new_empty(0)
    return Routing(indices, weights, none, none, none, none, counts)


@pytest.mark.parametrize("seed", [0, 1])
def test_random_rounds_with_empty_ranks_and_skew_equal_all_to_all(seed):
    assert all(ranks.run(4, exchanges, seed, 40))


def _slow_reader(buffers: int):
    """Rank 0 reads what came long after the others have gone on."""
    true, slow = kernels.take, int(os.environ["RANK"]) == 0

    def take(area, counts):
        if slow:
            time.sleep(0.02)
        return true(area, counts)

    with mock.patch.object(kernels, "take", take), mock.patch.object(symmetric_memory, "BUFFERS", buffers):
        try:
            return exchanges(3, 6, patience=60.0 if buffers == 2 else 0.5)
        except (AssertionError, PeerLost, RuntimeError) as error:  # the last: a rank that failed has left the others
            return str(error)


def test_two_buffers_suffice_for_a_slow_reader():
    assert ranks.run(4, _slow_reader, 2) == [True] * 4


def test_one_buffer_does_not():
    found = ranks.run(4, _slow_reader, 1)
    assert True not in found and any("round" in text or "not heard of" in text for text in found)


# -- memory, faults, refusals ------------------------------------------------------------------------------------------


def peer_stays_away(patience: float):
    """What rank 0 says of rank 1, and the seconds it took."""
    cfg = Config()
    cfg.parallel.ep_size = 2
    grid = init_distributed(cfg)
    extent = Extent(4, 8, 2, torch.float32)
    dispatcher = SymmetricDispatch(grid.group("ep"), 4, extent, grid.device, patience=patience)
    said, begin = "", time.monotonic()
    if grid.rank == 0:
        indices = torch.tensor([[0, 2]], dtype=torch.int32, device=grid.device)
        routing = routing_of(indices, torch.ones(1, 2, device=grid.device), 4)
        arrived = dispatcher.dispatch(Operand(torch.ones(1, 8, device=grid.device)), routing)
        try:
            dispatcher.work(arrived, lambda rows: rows.rows.value)
        except PeerLost as error:
            said = str(error)
    seconds = time.monotonic() - begin
    grid.barrier()
    return said, seconds


def test_a_peer_that_stays_away_is_named_in_time():
    (said, seconds), _ = ranks.run(2, peer_stays_away, 0.5)
    assert said == "ranks [1] of the expert group were not heard of for 0.5 s" and seconds < 30


def _fault(name: str):
    case = Case(4, dtype="fp32")
    grid, _, shared = start(case)
    x, end = (share(case, grid.rank, tokens(case, seed)) for seed in (0, 1))
    with FAULTS[name]():
        return forward_and_backward(build(case, shared), x, end)


def _home_by_the_places_of_the_neighbour():
    true = kernels.places

    def places(ranks, slots, counts, capacity):
        found = true(ranks, slots, counts, capacity)
        return torch.where(found < 0, -1, (found + capacity) % (counts.shape[0] * capacity))

    return mock.patch.object(kernels, "places", places)


def _gradients_of_gates_left_behind():
    true = symmetric._Out.backward

    def backward(ctx, dx, dgates, *others):
        return true(ctx, dx, torch.zeros_like(dgates), *others)

    return mock.patch.object(symmetric._Out, "backward", staticmethod(backward))


FAULTS = {
    "home by the neighbour's places": _home_by_the_places_of_the_neighbour,
    "gradients of gates left behind": _gradients_of_gates_left_behind,
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_shows(fault):
    assert worst(join(ranks.run(4, _fault, fault)), one_process(Case(4, dtype="fp32"))) > 1e-3


def _bytes():
    _, _, shared = start(Case(2, dtype="bf16"))
    return shared.transit.bytes


def test_the_buffers_take_what_is_planned():
    planned = slot_bytes(CFG, MOST, 2, "bf16")
    assert ranks.run(2, _bytes) == [planned] * 2
    row, record = CFG.hidden_size * 2, 64  # gates, choices and a scale, filled up to 16 words
    assert planned == 2 * 2 * MOST * (row + record)


def _refusal():
    case = Case(4)
    cfg = Config()
    cfg.parallel = dataclasses.replace(cfg.parallel, ep_size=4)
    grid = init_distributed(cfg)
    try:
        make_dispatch(grid, CFG.n_routed_experts, 2, extent=Extent(1, 32, 4, DTYPES[case.dtype]))
    except ConfigError as error:
        return str(error)


def test_more_ranks_than_a_node_has_are_refused_with_both_sides():
    for text in ranks.run(4, _refusal):
        assert "ep_size = 4 exceeds the 2 ranks" in text and "all_to_all" in text
