"""Communication times: reach of a token, bytes on the wire, and that more bandwidth never costs time."""

from dataclasses import replace

import pytest
from plans import REPORT, constants, faster, model, on, v3

from deepv3.arithmetic import fp8_bytes, wire_bytes
from deepv3.planner.network import CROSS_LEAF, SAME_LEAF, Network, reached

V3 = model("v3_671b")


def test_a_token_reaches_four_nodes_and_seven_ranks():
    assert reached(8, 8, 4, 256, 8) == 4.0
    assert reached(64, 8, 4, 256, 8) == pytest.approx(7.36, abs=0.01)
    assert reached(1, 8, 4, 256, 8) == 1.0


@pytest.mark.parametrize("holders", [2, 4, 8, 16, 32, 64, 128, 256])
def test_a_token_reaches_no_more_than_its_experts_or_the_holders(holders):
    for groups, chosen in ((1, 1), (8, 4), (8, 8)):
        assert 0.99 <= reached(holders, groups, chosen, 256, 8) <= min(holders, 8) + 1e-9


def test_sizes_on_the_wire_are_the_reports():
    assert fp8_bytes(7168) == 7392
    wire = wire_bytes(V3, "fp8")
    assert (wire.dispatch, wire.combine) == (7392, 14336)
    assert 2 * 4 * (wire.dispatch + wire.combine) == pytest.approx(173.8e3, rel=1e-3)
    assert 4096 * wire.boundary == pytest.approx(58.7e6, rel=1e-3)


def test_all_to_all_moves_the_derived_bytes():
    a2a = Network(v3().cluster, REPORT).all_to_all(V3, "fp8", 4096, 64)
    assert a2a.bytes_nic == pytest.approx(4096 * 3.5 * (7392 + 14336))
    assert 2.4e-3 < a2a.dispatch < 4.6e-3, "kernel times of the trace: 3.1-4.6 ms"
    assert 5.8e-3 < a2a.combine < 6.5e-3, "5.8-6.5 ms"


def test_experts_of_one_rank_need_no_network():
    a2a = Network(v3().cluster, REPORT).all_to_all(V3, "fp8", 4096, 1)
    assert a2a.dispatch == a2a.combine == a2a.bytes_nic == 0.0


def test_experts_inside_a_node_stay_on_nvlink():
    a2a = Network(v3().cluster, REPORT).all_to_all(V3, "bf16", 4096, 8)
    assert a2a.bytes_nic == 0.0 and a2a.bytes_nvlink > 0.0


@pytest.mark.parametrize("name", ["nic", "nvlink"])
@pytest.mark.parametrize("ep", [8, 64])
def test_more_bandwidth_never_slows_an_all_to_all(name, ep):
    cluster = v3().cluster
    quick = replace(cluster, device=faster("h800", name))
    for precision in ("bf16", "fp8"):
        before = Network(cluster, REPORT).all_to_all(V3, precision, 4096, ep)
        after = Network(quick, REPORT).all_to_all(V3, precision, 4096, ep)
        assert after.dispatch <= before.dispatch and after.combine <= before.combine


def test_a_ring_over_whole_nodes_uses_all_their_cards():
    network = Network(v3().cluster, REPORT)
    size = 10e9
    assert network.ring(size, 128) == pytest.approx(size * 127 / 128 / min(160e9, 8 * 40e9), rel=1e-3)
    assert network.ring(size, 4, stride=64) == pytest.approx(size * 3 / 4 / 40e9, rel=1e-3)
    assert network.ring(size, 1) == network.ring(0.0, 128) == 0.0


def test_latency_is_that_of_the_table():
    assert Network(v3().cluster, REPORT).latency == CROSS_LEAF
    assert Network(on("h800", 16).cluster, REPORT).latency == SAME_LEAF


def test_a_message_inside_a_node_is_faster():
    network = Network(v3().cluster, constants())
    assert network.message(58.7e6, True) < network.message(58.7e6, False) == pytest.approx(58.7e6 / 40e9, rel=0.01)
