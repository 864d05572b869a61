"""Experts over nodes, simulated as 2 nodes of 2 ranks: values, gradients, what crosses, which dispatcher is made."""

import pytest
import ranks
import torch
from expert_ranks import CFG, SABOTAGE, Case, start
from test_exchange import TOLERANCE, _dispatched, compared

from deepv3.dist import Grid
from deepv3.errors import ConfigError
from deepv3.model.dispatch import LocalDispatch
from deepv3.model.node_exchange import make_dispatch


@pytest.mark.parametrize(
    "case",
    [
        Case(4, per_node=2),
        Case(4, per_node=2, recompute="full", routing="one rank"),
        Case(4, per_node=2, recompute="selective", routing="unused"),
        Case(4, per_node=2, dtype="fp32"),
        Case(4, per_node=2, dtype="bf16"),
    ],
    ids=str,
)
def test_ranks_on_two_nodes_equal_one_process(case):
    assert compared(case) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("fault", [name for name in SABOTAGE if name])
def test_a_fault_shows(fault):
    assert compared(Case(4, per_node=2, sabotage=fault)) > 1e-3


@pytest.mark.parametrize("routing", ["natural", "one rank"])
def test_a_token_crosses_to_a_node_once_however_many_experts_it_has_there(routing):
    case = Case(4, per_node=2, routing=routing)
    for rank, (indices, _, found, _, load) in enumerate(parts := ranks.run(4, _dispatched, case)):
        pairs = {(token, expert // 8) for token, row in enumerate(indices.tolist()) for expert in row}
        assert load.crossed == sum(node != rank // 2 for _, node in pairs)
        assert load.rows == len(found) == sum(int((part[0] // 4 == rank).sum()) for part in parts)


def test_rows_are_in_the_order_expert_landing_rank_source_node_token():
    parts = ranks.run(4, _dispatched, Case(4, per_node=2))
    sources = [rank for rank, part in enumerate(parts) for _ in part[0]]
    rows = sorted(
        (expert, sources[token] % 2, sources[token] // 2, token)
        for token, choices in enumerate(torch.cat([part[0] for part in parts]).tolist())
        for expert in choices
    )
    assert [row for part in parts for row in part[2]] == [(expert, token) for expert, _, _, token in rows]


def _kind(case):
    return type(start(case)[1]).__name__


def test_the_dispatcher_follows_from_the_nodes():
    assert type(make_dispatch(Grid(1, 0), CFG.n_routed_experts, 8)) is LocalDispatch
    assert set(ranks.run(4, _kind, Case(4, per_node=4))) == {"AllToAllDispatch"}
    assert set(ranks.run(4, _kind, Case(4, per_node=2))) == {"NodeDispatch"}
    assert set(ranks.run(4, _kind, Case(4, per_node=1))) == {"AllToAllDispatch"}, "nothing to fan out to"


def test_an_expert_group_that_covers_a_node_in_part_is_refused_with_both_sides():
    with pytest.raises(ConfigError, match=r"ep_size = 12 covers a node of 8 ranks in part: 12 % 8 = 4"):
        make_dispatch(Grid(12, 0, ep_size=12), 24, 8)
