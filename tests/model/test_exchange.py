"""Experts over 2 and 4 ranks: values, gradients, order of rows, figures, and faults that must show."""

import pytest
import ranks
import torch
from expert_ranks import (
    CFG,
    DTYPES,
    SABOTAGE,
    SEQ,
    Case,
    build,
    join,
    layout_of,
    on_rank,
    one_process,
    share,
    start,
    tokens,
    worst,
)

from deepv3.arithmetic import buffer_bytes
from deepv3.config.schema import Config
from deepv3.dist import init_distributed
from deepv3.errors import ConfigError
from deepv3.model.exchange import AllToAllDispatch, Leg
from deepv3.precision.saved import Operand

TOLERANCE = {"fp64": 1e-12, "fp32": 1e-6, "bf16": 2e-2}


def compared(case):
    return worst(join([part[0] for part in ranks.run(case.world, on_rank, case)]), one_process(case))


@pytest.mark.parametrize(
    "case",
    [
        Case(2),
        Case(4),
        Case(2, recompute="full", routing="one rank"),
        Case(4, recompute="selective", routing="unused"),
        Case(4, recompute="full", routing="one rank"),
        Case(2, dtype="fp32"),
        Case(4, dtype="fp32", recompute="selective"),
        Case(4, dtype="fp32", routing="one rank"),
        Case(2, dtype="bf16"),
    ],
    ids=str,
)
def test_ranks_equal_one_process(case):
    assert compared(case) <= TOLERANCE[case.dtype]


def test_recomputing_and_repeating_change_no_bit():
    first, again = zip(*ranks.run(4, on_rank, Case(4, dtype="fp32"), 2))
    full = [part[0] for part in ranks.run(4, on_rank, Case(4, dtype="fp32", recompute="full"))]
    for other in (again, full):
        assert all(torch.equal(a[name], b[name]) for a, b in zip(first, other) for name in a)


@pytest.mark.parametrize("fault", [name for name in SABOTAGE if name])
def test_a_fault_shows(fault):
    assert compared(Case(4, sabotage=fault)) > 1e-3


# -- one dispatch ------------------------------------------------------------------------------------------------------


def _dispatched(case):
    """Of one dispatch of tokens that carry their global number: choices, rows, offsets, load."""
    grid, dispatcher = start(case)
    numbers = torch.arange(case.sequences * SEQ, dtype=torch.float64)[:, None].expand(-1, CFG.hidden_size)
    numbers = numbers.to(DTYPES[case.dtype])
    model = build(case, dispatcher)
    routing = model.routers()[0](Operand(share(case, grid.rank, tokens(case, 0)).to(numbers.dtype)), SEQ)
    came = dispatcher.dispatch(Operand(share(case, grid.rank, numbers).contiguous()), routing)
    held = dispatcher.held(CFG.n_routed_experts)
    ends = came.offsets.tolist()
    experts = [held[g] for g, (a, b) in enumerate(zip([0, *ends], ends)) for _ in range(b - a)]
    found = list(zip(experts, came.rows.value[:, 0].int().tolist()))
    return routing.indices, routing.weights.detach(), found, came.gates.detach(), dispatcher.take_load()


@pytest.mark.parametrize("routing", ["natural", "one rank"])
def test_rows_are_in_the_order_expert_source_token(routing):
    parts = ranks.run(4, _dispatched, Case(4, routing=routing))
    indices = torch.cat([part[0] for part in parts]).tolist()
    weights = torch.cat([part[1] for part in parts]).tolist()
    rows = sorted((e, t, w) for t, pair in enumerate(zip(indices, weights)) for e, w in zip(*pair))  # ranks ascend in t
    assert [row for part in parts for row in part[2]] == [(e, t) for e, t, _ in rows]
    assert torch.cat([part[3] for part in parts]).tolist() == [w for _, _, w in rows]


@pytest.mark.parametrize("routing", ["natural", "one rank"])
def test_a_token_comes_once_to_a_rank_however_many_experts_it_has_there(routing):
    parts = ranks.run(4, _dispatched, Case(4, routing=routing))
    reached = torch.cat([part[0] for part in parts]) // 4
    for rank, (_, _, found, _, load) in enumerate(parts):
        assert load.received == int((reached == rank).any(1).sum())
        assert load.rows == len(found) == int((reached == rank).sum())
        assert load.crossed == 0


def test_the_worst_case_is_as_large_as_planned():
    case = Case(4, dtype="fp32", routing="one rank")
    load = ranks.run(4, _dispatched, case)[0][4]
    mean_tokens = case.sequences * SEQ // 4
    planned = buffer_bytes(CFG, mean_tokens, 4, "fp32")
    assert load.received * (CFG.hidden_size * 4 + 8 * CFG.num_experts_per_tok) == planned["received"]
    assert load.rows * CFG.hidden_size * 4 == planned["rows"]


def test_destinations_are_those_of_the_worked_example():
    leg = Leg(None, peers=2, first=4, share=2)
    assert leg.destinations(torch.tensor([[7, 1, 6, 4]], dtype=torch.int32)).tolist() == [[0, 1, -1, -1]]


# -- pieces ------------------------------------------------------------------------------------------------------------


def _cut(tensor):
    return tensor.detach().requires_grad_()


class _Pieces:
    """A micro-batch whose pieces have graphs of their own, as a pipeline walks them."""

    def __init__(self, model, x, end):
        self.block, self.x, self.end = model.block(1), x.requires_grad_(), end
        self.layout = layout_of(model, x)

    def forward(self):
        self.x1, self.u, self.routing = self.block.attention(self.x, self.layout)
        self.cuts = [_cut(t) for t in (self.x1, self.u.value, self.routing.weights)]
        x1, u, weights = self.cuts
        sent = self.block.dispatch(self.u._replace(value=u), self.routing._replace(weights=weights))
        self.base = self.block.shared(self.u._replace(value=u), x1)
        self.sent = sent.rows.value, sent.gates
        self.came = [_cut(t) for t in self.sent]
        arrived = sent._replace(rows=sent.rows._replace(value=self.came[0]), gates=self.came[1])
        self.rows = self.block.experts(arrived)
        self.last = [_cut(self.rows), _cut(self.base)]
        self.out = self.block.combine(self.last[0], arrived, self.last[1])

    def backward(self):
        torch.autograd.backward(self.out, self.end)
        self.rows.backward(self.last[0].grad)
        torch.autograd.backward(self.sent, [t.grad for t in self.came])
        self.base.backward(self.last[1].grad)
        balance = self.routing.balance
        outputs = [self.x1, self.u.value, self.routing.weights, balance]
        torch.autograd.backward(outputs, [*(t.grad for t in self.cuts), torch.ones_like(balance)])


def _interleaved(case, backward_order):
    grid, dispatcher = start(case)
    model = build(case, dispatcher)
    batches = [_Pieces(model, *(share(case, grid.rank, tokens(case, s)) for s in (seed, seed + 1))) for seed in (0, 7)]
    for batch in batches:
        batch.forward()
    for index in backward_order:
        batches[index].backward()
    gradients = {name: parameter.grad for name, parameter in model.block(1).named_parameters()}
    return [{"out": b.out.detach(), "x": b.x.grad, "counts": b.routing.counts, **gradients} for b in batches]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("case", [Case(2), Case(4, per_node=2)], ids=str)
def test_two_micro_batches_in_pieces_keep_apart(case, order):
    parts = list(zip(*ranks.run(case.world, _interleaved, case, order)))
    oracle = build(case)
    expected = [_Pieces(oracle, tokens(case, seed), tokens(case, seed + 1)) for seed in (0, 7)]
    for batch in expected:
        batch.forward()
        batch.backward()
    gradients = {name: parameter.grad for name, parameter in oracle.block(1).named_parameters()}
    for found, batch in zip(parts, expected):
        whole = {"out": batch.out.detach(), "x": batch.x.grad, "counts": batch.routing.counts, **gradients}
        assert worst(join(found), whole) <= 1e-12


# -- refusals ----------------------------------------------------------------------------------------------------------


def _refusal(experts):
    grid = init_distributed(Config())
    try:
        AllToAllDispatch(grid.group("world"), experts)
    except ConfigError as error:
        return str(error)


def test_experts_that_cannot_be_shared_are_refused_with_both_sides():
    for text in ranks.run(2, _refusal, 15):
        assert "n_routed_experts = 15" in text and "ep_size = 2: 15 % 2 = 1" in text
