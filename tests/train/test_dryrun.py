"""A layout on paper: roles cover all ranks, built parameters are the model's, impossible grids are refused."""

import pytest

from deepv3.arithmetic import parameters
from deepv3.config.compose import compose
from deepv3.errors import ConfigError
from deepv3.train import dryrun

SMALL = [
    "+config=moe_16b",
    "cluster=h800_2048",
    "train.global_batch_size=512",
    "parallel.pp_size=4",
    "cluster.devices=64",
]


def config(*overrides):
    return compose([*SMALL, *overrides])


@pytest.mark.parametrize(
    ("schedule", "ep", "copies"), [("1f1b", 1, 1), ("dualpipev", 8, 1), ("dualpipe", 4, 2), ("zb1p", 2, 1)]
)
def test_roles_cover_every_rank_and_hold_the_whole_model(schedule, ep, copies):
    cfg = config(f"parallel.schedule={schedule}", f"parallel.ep_size={ep}")
    found = dryrun.roles(cfg)
    assert sum(role.ranks for role in found) == 64
    assert sorted(p for role in found for p in role.positions) == [0, 1, 2, 3]
    total = sum(role.parameters * len(role.positions) for role in found)
    count = parameters(cfg.model)
    whole = count.total + count.mtp
    routed = count.routed_experts
    assert total == copies * (whole - routed + routed // ep)


def test_a_table_line_shows_each_role_and_what_was_proved():
    lines = list(dryrun.table(config("parallel.schedule=dualpipev")))
    assert "actions and transfers of 4 ranks proved" in lines[1]
    roles = dryrun.roles(config("parallel.schedule=dualpipev"))
    assert len(lines) == 4 + len(roles)
    assert all(role.built["weights"] == 2 * role.parameters for role in roles)
    assert all(role.total > sum(role.built.values()) for role in roles)


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        dryrun.roles(config("parallel.pp_size=16", "parallel.schedule=dualpipev"))
