"""Rows of hardware have sources, fabrics have the published counts and costs, unknown machines are refused."""

import pytest

from deepv3.config.schema import ClusterConfig
from deepv3.errors import ConfigError
from deepv3.planner.hardware import DEVICES, FABRICS, cluster_of
from deepv3.planner.topology import table

# HW Table 3: endpoints, switches, links, M$, k$ per endpoint
PUBLISHED = {
    "ft2": (2_048, 96, 2_048, 9, 4.39),
    "mpft": (16_384, 768, 16_384, 72, 4.39),
    "ft3": (65_536, 5_120, 131_072, 491, 7.5),
    "slim_fly": (32_928, 1_568, 32_928, 146, 4.4),
    "dragonfly": (261_632, 16_352, 384_272, 1_522, 5.8),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_network_counts_are_those_of_the_cost_table(name):
    row = table()[name]
    assert (row.ends, row.switches, row.links) == PUBLISHED[name][:3]


@pytest.mark.parametrize("name", PUBLISHED)
def test_three_prices_reproduce_the_five_costs(name):
    row, (*_, millions, per_end) = table()[name], PUBLISHED[name]
    assert row.cost / 1e6 == pytest.approx(millions, rel=0.01)
    assert row.cost_per_end / 1e3 == pytest.approx(per_end, rel=0.015)


def test_every_device_has_a_source_and_more_fp8_than_bf16():
    for row in DEVICES.values():
        assert row.source and row.fp8 == pytest.approx(2 * row.bf16, rel=1e-3) and row.domain > 1
        assert 3e9 < row.host < 5e9, "a clock in Hz"


def test_published_peak_of_the_report():
    assert DEVICES["h800"].bf16 == 989.4e12 and DEVICES["h800"].sms == 132
    assert DEVICES["h100"].nvlink / DEVICES["h800"].nvlink == pytest.approx(900 / 400)


def test_a_cluster_is_read_from_its_configuration():
    cluster = cluster_of(ClusterConfig(nproc_per_node=8, device="h800", devices=2048, network="mpft"))
    assert (cluster.count, cluster.node, cluster.nodes) == (2048, 8, 256)
    rack = cluster_of(ClusterConfig(nproc_per_node=4, device="gb200", devices=256, network="ft2"))
    assert rack.node == 64, "an NVL72 rack is one NVLink domain whatever a host holds"


@pytest.mark.parametrize(
    "given, names",
    [
        ({"device": ""}, ["cluster.device", "h800", "cluster=h800_2048"]),
        ({"device": "h900"}, ["h900", "h800"]),
        ({"device": "h800", "devices": 0}, ["cluster.devices = 0"]),
        ({"device": "h800", "devices": 4096, "network": "ft2"}, ["4096", "2048", "cluster.network=mpft"]),
        ({"device": "h800", "devices": 10**6, "network": "ft3"}, ["65536", "none"]),
    ],
)
def test_what_no_row_describes_is_refused(given, names):
    with pytest.raises(ConfigError) as error:
        cluster_of(ClusterConfig(**{"nproc_per_node": 8, "devices": 64, **given}))
    assert all(name in str(error.value) for name in names)


def test_planes_multiply_a_two_layer_tree():
    assert FABRICS["mpft"].ends == 8 * FABRICS["ft2"].ends
